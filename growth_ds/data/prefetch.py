"""Making the next results while the current one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_DEPTH = 2


def prefetch(make: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map(make, items)`, in order, with a few results made ahead of time by a thread.

    An exception of the thread, in `make` or in `items`, is raised here. The thread starts with the first result asked
    for, and ends when the iterator is used up or closed (at the latest when it is collected).
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(_DEPTH)
    stop = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stop.is_set():
            try:
                return ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                put("result", make(item))
            put("end", None)
        except BaseException as error:  # handed over: it belongs to whoever waits for the result
            put("error", error)

    thread = threading.Thread(target=work, name="growth_ds-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stop.set()
        thread.join()
