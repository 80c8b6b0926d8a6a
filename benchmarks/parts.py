"""Seconds of the parts of a training step, from outside: hooks on modules and wrappers round functions.

A second belongs to the innermost part that is open, so the parts add up to the whole. On a GPU every border waits for
what is queued: the parts are right then, and their sum is more than a step without borders takes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from benchmarks.common import synchronize

COMMUNICATION = "communication"
COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "barrier", "gather", "scatter", "all_gather", "reduce_scatter",
    "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "all_reduce_coalesced",
)  # fmt: skip


class Parts:
    """Seconds by name since `clear`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[str, Any]] = []
        self._since = 0.0

    def clear(self) -> None:
        """Forget all seconds."""
        self.seconds = {}

    def begin(self, name: str) -> None:
        """From here on time belongs to `name`."""
        self._account()
        label = record_function(name)
        label.__enter__()
        self._open.append((name, label))

    def end(self) -> None:
        """From here on time belongs to the part in which this one lay."""
        self._account()
        self._open.pop()[1].__exit__(None, None, None)

    def _account(self) -> None:
        synchronize()
        now = time.perf_counter()
        if self._open:
            name = self._open[-1][0]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The block belongs to `name`."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Every later call of `owner.attribute` belongs to `name`; calls outside any part are not timed."""
        function: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._open:
                return function(*args, **kwargs)
            with self.part(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)

    def hook(self, module: torch.nn.Module, name: str) -> None:
        """The forward of a module belongs to `name`."""
        module.register_forward_pre_hook(lambda *_: self.begin(name))
        module.register_forward_hook(lambda *_: self.end())

    def communication(self) -> None:
        """Time in collectives, and the wait for those that were left running. Before the process group is made."""
        for name in COLLECTIVES:
            if hasattr(dist, name):
                self.wrap(dist, name, COMMUNICATION)
        self.wrap(dist.Work, "wait", COMMUNICATION)

    def engine(self, engine: Any) -> None:
        """Backward and optimizer of a `ZeroEngine`, gradient norm and clipping with the latter."""
        self.wrap(engine._ds, "backward", "backward")
        self.wrap(engine._ds, "step", "optimizer")
        self.wrap(engine, "_clip_here", "optimizer")

    def model(self, module: Any) -> None:
        """The parts of BERT's forward; what is in none of them stays with the part around."""
        self.hook(module.embeddings, "embeddings")
        self.hook(module.head, "head and loss")
        self.wrap(torch.nn.functional, "cross_entropy", "head and loss")
        for layer in module.layers:
            self.wrap(layer, "_attention", "attention")
            self.wrap(layer, "_ffn", "ffn")
        for child in module.modules():
            if isinstance(child, torch.nn.LayerNorm):
                self.hook(child, "norms")


def measured_steps(parts: Parts, made: Any, steps: int, skipped: int, around: str) -> list[dict[str, float]]:
    """Seconds by part of each step of a `Training` but the first `skipped`; `around` is what is in no other part."""
    records = []
    batches = made.batches(steps + skipped)
    for step in range(steps + skipped):
        parts.clear()
        with parts.part("data"):
            micro_batches = next(batches)
        with parts.part(around):
            made.step(micro_batches)
        if step >= skipped:
            records.append(dict(parts.seconds))
    batches.close()
    return records
