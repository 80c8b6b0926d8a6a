"""How long a rank's own work takes, apart from its waits for the others: the forward, which has no collective.

A slow rank does not show in the time of a step, which is the slowest rank's on all of them; nor in the backward, where
the others wait for it. Under ZeRO-3 the forward gathers weights: there its time is the slowest rank's too, and that of
the data alone tells ranks apart.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


class Pace:
    """Seconds that this rank spent on its data and its forwards, since they were last taken."""

    def __init__(self, on_gpu: bool = False) -> None:
        self.data = self._forward = 0.0
        self.steps = 0
        """Optimizer steps since they were taken; counted by who takes them."""
        self.on_gpu = on_gpu
        self._events: list[tuple[Any, Any]] = []

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; the time until each is there counts as data's."""
        source = iter(items)
        while True:
            began = time.monotonic()
            try:
                item = next(source)
            except StopIteration:
                return
            finally:
                self.data += time.monotonic() - began
            yield item

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward. On a GPU nothing waits for it here: two events are left in its stream."""
        if self.on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        began = time.monotonic()
        yield
        self._forward += time.monotonic() - began

    def take(self) -> tuple[float, float]:
        """(seconds of data, seconds of forwards) since the last time. On a GPU it waits for the last forward."""
        if self._events:
            self._events[-1][1].synchronize()
            self._forward += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()
        taken = self.data, self._forward
        self.data, self._forward, self.steps = 0.0, 0.0, 0
        return taken
