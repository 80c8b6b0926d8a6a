"""An ordered map over worker processes that reads its input no faster than it is used up."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_WAITING_PER_WORKER = 3
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def default_workers() -> int:
    """The number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """`map(function, items)` over `workers` processes, results in order; one worker means this process.

    Processes are spawned, not forked: the caller may hold threads (tokenizer, progress bar) that a fork would break.
    They do not import the program that was started, unless `function` is in it: it may have no `if __name__` guard, and
    take seconds to import.
    """
    if workers <= 1:
        if initializer:
            initializer(*initargs)
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    line, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (line, initializer, initargs))
    try:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            with _signals_held_back(), _main_left_out(function):
                waiting.append(pool.submit(function, item))
            if len(waiting) >= workers * _WAITING_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        held.close()  # one of them was killed and may have held a lock, for which the others would wait
        raise
    finally:
        pool.shutdown(cancel_futures=True)  # a result that is being sent arrives whole: no worker is ended in it
        held.close()
        line.close()


def _begin_worker(line: Connection, initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    """Ctrl-C and launchers signal the whole group, and the pool would break; what ends a worker is its parent."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    if initializer:
        initializer(*initargs)


def _end_with(line: Connection) -> None:
    """Wait for the end of the line, whose other end the parent closes, or the system when the parent was killed."""
    with contextlib.suppress(EOFError, OSError):
        line.recv_bytes()
    os._exit(0)


@contextlib.contextmanager
def _main_left_out(function: Callable[..., Any]) -> Iterator[None]:
    """Processes that are started in the block know nothing of `__main__`."""
    main = sys.modules["__main__"]
    if getattr(function, "__module__", None) == "__main__":
        yield
        return
    hidden = {name: vars(main)[name] for name in ("__spec__", "__file__") if vars(main).get(name) is not None}
    vars(main).update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        vars(main).update(hidden)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Signals in the block arrive after it: a process is started whole, and starts with them blocked."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in _SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for late in heard:
            signal.raise_signal(late)
