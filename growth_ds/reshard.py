"""Moving a state into a new engine: grown by the plan, cut as the new engine needs it. Two ways, the same bits.

    rank0    rank 0 assembles each old tensor, grows it and broadcasts it; every rank keeps its part. The reference.
    sharded  every rank computes its own part, from the old tensor alone (`grown_range`); nothing is sent, and a tensor
             that only moves is read as the part that is needed.

The old state is a checkpoint, which every rank can read, or at the start of a run the initial weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from growth_ds import faults
from growth_ds.checkpoint import Checkpoint
from growth_ds.config import Model
from growth_ds.engine import distributed
from growth_ds.engine.state import TensorState
from growth_ds.engine.zero import ZeroEngine
from growth_ds.errors import Stopped, UserError
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.state import Source, grown_range, grown_step, grown_tensor, has_moments
from growth_ds.model import cost
from growth_ds.model.init import initial
from growth_ds.model.layout import parameter_shapes
from growth_ds.ops.growth_gather import gather


class InitialState:
    """The state before the first step, as a source: weights from the seed, no moments."""

    moments = False

    def __init__(self, model: Model, seed: int) -> None:
        self.model, self.seed = model, seed
        self.steps: Mapping[str, int] = dict.fromkeys(parameter_shapes(model), 0)

    def tensor(self, kind: str, name: str) -> Tensor:
        return initial(self.model, name, self.seed)

    def range(self, kind: str, name: str, begin: int, end: int) -> Tensor:
        return self.tensor(kind, name).reshape(-1)[begin:end]


class _Once:
    """A source that keeps the tensor it gave last: one parameter asks for it piece by piece."""

    def __init__(self, source: Source) -> None:
        self.source, self.moments, self.steps = source, source.moments, source.steps
        self.key: tuple[str, str] = ("", "")
        self.value = torch.empty(0)

    def tensor(self, kind: str, name: str) -> Tensor:
        if self.key != (kind, name):
            self.value = torch.empty(0)  # the old one goes before the next comes
            self.value, self.key = self.source.tensor(kind, name), (kind, name)
        return self.value

    def range(self, kind: str, name: str, begin: int, end: int) -> Tensor:
        return self.source.range(kind, name, begin, end)


def choose_mode(wanted: str, plan: GrowthPlan, peak: int, available: int) -> str:
    """`rank0` or `sharded`. `peak`: bytes that the first would need on rank 0, of `available` ones."""
    if wanted != "auto":
        return wanted
    return "sharded" if plan.is_identity or peak > available else "rank0"


def peaks(old: Model, new: Model, zero: int, ranks: int, low: bool) -> dict[str, int]:
    """Bytes that a growth needs at most on the rank that needs most, by mode; see `cost.growth_peak`."""
    return {mode: cost.growth_peak(old, new, zero, ranks, low, mode) for mode in ("rank0", "sharded")}


def inject(
    engine: ZeroEngine, model: Model, plan: GrowthPlan, source: Source, mode: str, interrupted: Callable[[], bool]
) -> None:
    """Fill every parameter of the engine. Collective.

    What fails on one rank, between two tensors, is raised on all: UserError for a source that cannot be grown. Raises
    Stopped on all when `interrupted` says so on any.
    """
    source = _Once(source)
    for name, shape in parameter_shapes(model).items():
        faults.point("growth.inject")
        state: TensorState | None = None
        problem: Exception | None = None
        try:
            if mode == "sharded":
                _fill(engine, plan, source, name)
            elif distributed.rank() == 0:
                state = _whole(plan, source, name)
                state.check(name, shape)
        except ValueError as error:
            problem = UserError(f"{source_name(source)}: {error}")
        except Exception as error:  # any: the other ranks wait for this one
            problem = error
        if distributed.settle(problem, interrupted()):
            raise Stopped
        if mode == "rank0":
            engine.state.write(name, state)


def source_name(source: Any) -> str:
    """What an error calls the state that is grown."""
    inner = getattr(source, "source", source)
    return str(inner.path) if isinstance(inner, Checkpoint) else "the initial state"


def _fill(engine: ZeroEngine, plan: GrowthPlan, source: Source, name: str) -> None:
    """This rank's part of one parameter."""
    moments = has_moments(plan, name, source)

    def make(kind: str, begin: int, end: int) -> Tensor | None:
        if begin == end:
            return torch.empty(0)
        if kind != "weight" and not moments:
            return None
        return grown_range(plan, name, kind, source, begin, end, gather)

    engine.state.fill(name, make, grown_step(plan, name, source))


def _whole(plan: GrowthPlan, source: Source, name: str) -> TensorState:
    weight = grown_tensor(plan, name, "weight", source, gather)
    step = grown_step(plan, name, source)
    if not has_moments(plan, name, source):
        return TensorState(weight, None, None, step)
    exp_avg, exp_avg_sq = (grown_tensor(plan, name, kind, source, gather) for kind in ("exp_avg", "exp_avg_sq"))
    return TensorState(weight, exp_avg, exp_avg_sq, step)


def differs_most(engine: ZeroEngine, model: Model, plan: GrowthPlan, source: Source) -> str:
    """Which tensor in the engine differs most from the grown state; a sentence on rank 0, "" elsewhere. Collective."""
    worst = ("", 0.0)
    for name in parameter_shapes(model):
        state = engine.state.read(name)
        if state is not None:
            error = float((state.weight - grown_tensor(plan, name, "weight", source)).abs().max())
            worst = max(worst, (name, error), key=lambda pair: pair[1])
    if distributed.rank() > 0:
        return ""
    return f"'{worst[0]}' differs most, by {worst[1]:.3g}" if worst[1] else "every tensor is as the plan says"
