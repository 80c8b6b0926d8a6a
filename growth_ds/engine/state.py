"""What the training state of one parameter is, and the interface every holder of such states offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""What a parameter's state is made of, besides the step count."""


@dataclass(frozen=True)
class StateSlice:
    """Elements [begin, begin + n) of one flattened parameter: 1-D fp32 tensors of n elements (0: no part of it)."""

    begin: int
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int


@dataclass(frozen=True)
class TensorState:
    """Weight, Adam moments and step count of one parameter; fp32, full (unsharded) shape.

    A moment that is None was never made (a checkpoint without optimizer state): a store that needs one starts it
    from zero. `step` counts applied optimizer steps; bias correction depends on it.
    """

    weight: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    step: int

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ValueError, naming the parameter, unless this is fp32 of `shape` with both moments or neither."""
        if (self.exp_avg is None) != (self.exp_avg_sq is None):
            raise ValueError(f"{name}: give both moments or neither")
        if self.step < 0:
            raise ValueError(f"{name}: step {self.step} is negative")
        for part in ("weight", "exp_avg", "exp_avg_sq"):
            tensor = getattr(self, part)
            if tensor is None:
                continue
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name}: {part} has shape {tuple(tensor.shape)}, the parameter has {tuple(shape)}")
            if tensor.dtype != torch.float32:
                raise ValueError(f"{name}: {part} is {tensor.dtype}, states are torch.float32")


class StateStore(Protocol):
    """Named tensor states, in the module's parameter order.

    For a distributed store `read` and `write` are collective: every rank calls them, in the same order. `read` gives
    the state on rank 0 and None elsewhere; `write` takes it on rank 0 and None elsewhere. One tensor at a time: no
    implementation holds more than one full state.
    """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> full shape, in canonical module parameter order."""
        ...

    def read(self, name: str) -> TensorState | None:
        """The state of `name`; KeyError for an unknown name."""
        ...

    def write(self, name: str, state: TensorState | None) -> None:
        """Replace the state of `name`; ValueError on a wrong shape or dtype, KeyError for an unknown name."""
        ...


class DictStore:
    """A StateStore in plain memory, for tests and for growing a checkpoint without an engine."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], states: dict[str, TensorState] | None = None) -> None:
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._states: dict[str, TensorState] = {}
        for name, state in (states or {}).items():
            self.write(name, state)

    @classmethod
    def from_states(cls, states: dict[str, TensorState]) -> DictStore:
        """A store whose names, order and shapes are those of `states`."""
        return cls({name: tuple(state.weight.shape) for name, state in states.items()}, states)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def read(self, name: str) -> TensorState | None:
        """The state written last; KeyError when the name is unknown or nothing was written."""
        return self._states[name]

    def write(self, name: str, state: TensorState | None) -> None:
        """Keep `state` (not copied); None is refused with ValueError, for there is no other rank to hold it."""
        if state is None:
            raise ValueError(f"{name}: a DictStore has one holder, and it was given None")
        state.check(name, self._shapes[name])
        self._states[name] = state
