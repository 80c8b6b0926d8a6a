"""The largest update of any weight in units of the learning rate, measured on the fp32 masters of every rank."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from growth_ds.engine.zero import ZeroEngine

Size = tuple[float, str]
"""A largest update and the parameter it belongs to."""


class Recorder:
    """While the block runs, every engine's `step` is measured: |weight after - weight before| / learning rate.

    Left out are the rows of tokens that no step before has shown (their Adam state begins with that step), and the
    keys' bias, whose gradient is 0 but for rounding: softmax does not see what all keys share.
    """

    def __init__(self, seen: Tensor | None = None, skip: int = 0) -> None:
        """`seen`: bool (1024,), tokens of earlier steps; `skip`: steps at the start that are not measured."""
        self.seen = torch.zeros(1024, dtype=torch.bool) if seen is None else seen.clone()
        self.skip, self.steps = skip, 0
        self.largest: list[tuple[Size, Size]] = []
        """For each measured step, of this rank: the largest update, and the largest of dense tensors."""
        self.engine: ZeroEngine | None = None
        self.places: list[_Places] = []

    def __enter__(self) -> Recorder:
        self.original = ZeroEngine.step
        recorder = self

        def step(engine: ZeroEngine, batches: Any, lr: float, stop: bool = False) -> Any:
            return recorder.measured(engine, batches, lr, stop)

        ZeroEngine.step = step  # type: ignore[method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ZeroEngine.step = self.original  # type: ignore[method-assign]
        self.engine, self.places = None, []

    def measured(self, engine: ZeroEngine, batches: Any, lr: float, stop: bool) -> Any:
        """The step itself, and what it did."""
        self.steps += 1
        if engine is not self.engine:
            self.engine, self.places = engine, [_Places(engine, each) for each in engine._fragments.masters()]
        before = [places.master.detach().clone() for places in self.places]
        result = self.original(engine, batches, lr, stop)
        if self.steps > self.skip:
            each = [places.largest(old, lr, self.seen) for places, old in zip(self.places, before, strict=True)]
            self.largest.append((max(size for size, _ in each), max(size for _, size in each)))
        self._see(batches)
        return result

    def _see(self, batches: Any) -> None:
        """Tokens of this step, of all ranks."""
        shown = torch.zeros(len(self.seen), dtype=torch.int32)
        for batch in batches:
            shown[batch.ids.reshape(-1)] = 1
            shown[batch.labels[batch.labels >= 0]] = 1
        dist.all_reduce(shown, dist.ReduceOp.MAX)
        self.seen |= shown.bool()

    def figures(self) -> dict[str, Any]:
        """The largest update, its parameter and step (from 1); the largest of dense tensors, of each step. Collective.

        A dense tensor is one whose elements all have a gradient in every step: not the embeddings and their bias.
        """
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self.largest)
        steps = [max(any_of for any_of, _ in ranks) for ranks in zip(*gathered, strict=True)]
        dense = [max(dense for _, dense in ranks) for ranks in zip(*gathered, strict=True)]
        largest = max(steps)
        return {
            "largest": largest[0],
            "where": largest[1],
            "step": steps.index(largest) + 1,
            "largest_dense": max(dense)[0],
            "where_dense": max(dense)[1],
            "by_step": [round(size, 3) for size, _ in steps],
        }


class _Places:
    """What each element of one fp32 master of this rank is."""

    def __init__(self, engine: ZeroEngine, master: Tensor) -> None:
        self.master = master
        flat = master.detach().view(-1)
        self.token = torch.full(flat.shape, -1, dtype=torch.int64)
        self.counted, self.dense = torch.zeros_like(flat), torch.zeros_like(flat)
        self.names: list[tuple[int, int, str]] = []
        for name, param in engine._store._params.items():
            fragment = engine._fragments.locate(param)
            if fragment is None or fragment.master is not master:
                continue
            index = torch.arange(fragment.start, fragment.start + fragment.numel)
            self.names.append((fragment.offset, fragment.offset + fragment.numel, name))
            if name in ("embeddings.word.weight", "head.bias"):
                fragment.of(self.token).copy_(index // (param.numel() // len(param)))
            is_key = index // (param.numel() // 3) == 1 if name.endswith("qkv.bias") else index < 0
            fragment.of(self.counted).copy_((~is_key).float())
            dense = not name.startswith("embeddings.") and name != "head.bias"
            fragment.of(self.dense).copy_((~is_key).float() * dense)

    def largest(self, before: Tensor, lr: float, seen: Tensor) -> tuple[Size, Size]:
        """The largest update, and the largest of dense tensors."""
        moved = (self.master.detach() - before).view(-1).abs_().div_(lr)
        shown = moved * self.counted * (seen[self.token] | (self.token < 0))
        return self._named(shown), self._named(moved * self.dense)

    def _named(self, sizes: Tensor) -> Size:
        at = int(sizes.argmax())
        return float(sizes[at]), next((name for begin, end, name in self.names if begin <= at < end), "")
