"""The grown state of one parameter, one kind at a time, whole or a flat slice, under the policy for moments and step.

A rank of a distributed job needs no more than its own slice: `grown_range` is `grown_tensor` cut, bit for bit.
`grow_state` makes all kinds of one parameter at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from growth_ds.axes import parse, role
from growth_ds.config import Grow
from growth_ds.growth import draw
from growth_ds.growth.apply import Context, Gather, Maps, check_range, grow, grow_range, is_still
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.dense import DenseMap
from growth_ds.growth.elements import DRAW
from growth_ds.growth.origin import Source, old_values, origin_of, refuse_unless_finite, values_above
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.split import split_tensor

__all__ = [
    "Read", "Source", "State", "context_of", "grow_state", "grown_range", "grown_step", "grown_tensor", "has_moments",
    "located", "source_of",
]  # fmt: skip


class State(Protocol):
    """Everything that is known of one parameter (`growth_ds.engine.state.TensorState` is one): a dataclass."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def exp_avg(self) -> Tensor | None: ...

    @property
    def exp_avg_sq(self) -> Tensor | None: ...

    @property
    def step(self) -> int: ...


S = TypeVar("S", bound=State)
Read = Callable[[str], S]


def located(plan: GrowthPlan, name: str) -> tuple[str, int | None]:
    """(name in the layout, stored layer or None) of a grown parameter. Raises KeyError for an unknown one."""
    return plan.parameters[name]


def source_of(plan: GrowthPlan, name: str) -> tuple[str, str]:
    """(name of the old parameter, layout row) from which the grown parameter `name` is made."""
    pattern, layer = located(plan, name)
    source = pattern if layer is None else pattern.replace("{layer}", str(plan.source_layer(layer)))
    return source, plan.layout[pattern]


def context_of(plan: GrowthPlan, name: str, pattern: str) -> Context:
    """What is drawn for a parameter, and for its fresh units' moments."""
    policy = plan.grow.fresh_moments or plan.grow.moments
    std, one = {"bias": (0.0, 0.0), "norm": (0.0, 1.0), "matrix": (_std(plan, pattern), 0.0)}[role(pattern)]
    return Context(pattern, name, plan.grow.seed, std, one, policy, plan.grow.damping)


def _std(plan: GrowthPlan, pattern: str) -> float:
    """Of the initialisation of a matrix, which may be a factor."""
    return plan.models[-1].std_of(pattern) if plan.models else plan.std


def has_moments(plan: GrowthPlan, name: str, source: Source) -> bool:
    """Whether the grown parameter has moments; if not, both start from zero. Raises KeyError for an unknown one."""
    located(plan, name)
    return plan.moments != "reset" and source.moments


def grown_step(plan: GrowthPlan, name: str, source: Source) -> int:
    """Adam's count of the grown parameter. Raises KeyError for an unknown one."""
    step = source.steps[origin_of(plan, name)]
    if _stays(plan):
        return step
    return _step(plan.grow, step) if has_moments(plan, name, source) else 0


def grown_tensor(plan: GrowthPlan, name: str, kind: str, source: Source, gather: Gather | None = None) -> Tensor:
    """One kind of a grown parameter, in its shape; the source's own tensor where nothing changes.

    Raises KeyError for an unknown parameter; ValueError, naming it, where the source is not finite, and for a moment
    that starts from zero (`has_moments`).
    """
    pattern, layer = _checked(plan, name, kind, source)
    row, context = plan.layout[pattern], context_of(plan, name, pattern)
    if pattern in plan.added:
        shape = torch.Size(parse(row).shape(plan.new))
        return _initial(plan, name, kind, context, source, 0, shape.numel()).reshape(shape)
    if _is_split(plan, row):
        return split_tensor(old_values(plan, name, kind, source), row, plan.units[layer or 0])
    old, maps = _tables(plan, pattern, layer, kind)
    x = old_values(plan, name, kind, source)
    return grow(x, row, old, maps, kind, context, values_above(plan, name, kind, source), gather)


def grown_range(
    plan: GrowthPlan, name: str, kind: str, source: Source, begin: int, end: int, gather: Gather | None = None
) -> Tensor:
    """[end - begin]: elements [begin, end) of `grown_tensor`, flattened, the same bits.

    Where nothing moves inside the tensor no more than this range of the source is read (and found finite), and the
    result may be the source's own memory; else the whole of this kind is read. Raises as `grown_tensor`, and ValueError
    for a range that is not inside the tensor.
    """
    pattern, layer = _checked(plan, name, kind, source)
    row, context = plan.layout[pattern], context_of(plan, name, pattern)
    check_range(begin, end, torch.Size(parse(row).shape(plan.new)).numel())
    if pattern in plan.added:
        return _initial(plan, name, kind, context, source, begin, end)
    if _is_split(plan, row):
        return grown_tensor(plan, name, kind, source).reshape(-1)[begin:end].clone()
    old, maps = _tables(plan, pattern, layer, kind)
    if is_still(row, old, maps, kind, context):
        return old_values(plan, name, kind, source, (begin, end))
    x = old_values(plan, name, kind, source)
    above = values_above(plan, name, kind, source)
    return grow_range(x, row, old, maps, begin, end, kind, context, above, gather)


def grow_state(plan: GrowthPlan, name: str, read: Read[S], gather: Gather | None = None) -> S:
    """Weight, moments and step of one grown parameter; `read` gives the state of an old one by name.

    Raises ValueError, naming the parameter, where the source is not finite.
    """
    source = _States(read, origin_of(plan, name))
    own = source.own
    if _stays(plan):
        _check_finite(name, own, ("weight", "exp_avg", "exp_avg_sq"))
        return own
    weight = grown_tensor(plan, name, "weight", source, gather)
    mean: Tensor | None = None
    square: Tensor | None = None
    if has_moments(plan, name, source):
        mean, square = (grown_tensor(plan, name, kind, source, gather) for kind in ("exp_avg", "exp_avg_sq"))
    elif _is_copied(plan, name):
        _check_finite(name, own, ("exp_avg", "exp_avg_sq"))
    step = grown_step(plan, name, source)
    return cast(S, replace(cast(Any, own), weight=weight, exp_avg=mean, exp_avg_sq=square, step=step))


class _States(Generic[S]):
    """Whole states as a `Source`, each read once, for the growth of one parameter."""

    def __init__(self, read: Read[S], own: str) -> None:
        self._read = read
        self._name = own
        self._held: dict[str, S] = {}

    @property
    def own(self) -> S:
        """The state that the parameter's step count comes from."""
        return self._state(self._name)

    @property
    def moments(self) -> bool:
        return self.own.exp_avg is not None and self.own.exp_avg_sq is not None

    @property
    def steps(self) -> Mapping[str, int]:
        return {self._name: self.own.step}

    def tensor(self, kind: str, name: str) -> Tensor:
        return cast(Tensor, getattr(self._state(name), kind))

    def range(self, kind: str, name: str, begin: int, end: int) -> Tensor:
        return self.tensor(kind, name).reshape(-1)[begin:end]

    def _state(self, name: str) -> S:
        if name not in self._held:
            self._held[name] = self._read(name)
        return self._held[name]


def _check_finite(name: str, state: State, kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        x = getattr(state, kind)
        if x is not None:
            refuse_unless_finite(name, kind, x)


def _checked(plan: GrowthPlan, name: str, kind: str, source: Source) -> tuple[str, int | None]:
    if kind != "weight" and not has_moments(plan, name, source):
        raise ValueError(f"'{name}': {kind} starts from zero after this growth; ask has_moments first")
    if plan.learned is not None:
        raise ValueError(f"'{name}': {plan.grow.recipe} is learned on data, and only then makes it")
    return located(plan, name)


def _tables(plan: GrowthPlan, pattern: str, layer: int | None, kind: str) -> tuple[Mapping[str, int], Maps]:
    """(old sizes, maps) for one kind of a parameter: thin layers have other FFN units, copied moments no factors."""
    old, maps = plan.old, plan.maps
    if layer is not None and layer in plan.thin and "ffn" in parse(plan.layout[pattern]).names:
        thin = plan.thin[layer]
        old, maps = {**old, "ffn": thin.old}, {**maps, "ffn": thin}
    if kind != "weight" and plan.grow.moments == "copy":
        maps = {axis: replace(each, raw=True) if isinstance(each, AxisMap) else each for axis, each in maps.items()}
    return old, maps


def _is_split(plan: GrowthPlan, row: str) -> bool:
    """Whether the tensor is made of the units that an expert gets."""
    return plan.splits and "ffn" in parse(row).names


def _stays(plan: GrowthPlan) -> bool:
    """Whether the plan leaves states as they are."""
    return plan.is_identity and plan.grow.moments != "reset" and plan.grow.step == "keep" and not plan.grow.rewind


def _is_copied(plan: GrowthPlan, name: str) -> bool:
    """Whether one old tensor is the parameter's source, not a draw or a mix."""
    pattern, layer = located(plan, name)
    mixed = layer is not None and isinstance(plan.maps.get("stored_layer"), DenseMap)
    return pattern not in plan.added and not mixed


def _step(grow: Grow, step: int) -> int:
    """Adam's count after the growth."""
    return 0 if grow.step == "reset" else max(0, step - grow.rewind)


def _initial(
    plan: GrowthPlan, name: str, kind: str, context: Context, source: Source, begin: int, end: int
) -> Tensor:  # fmt: skip
    """Elements of a parameter that the old model does not have: drawn; its mean square starts at its origin's mean."""
    like = origin_of(plan, name)
    result = torch.zeros(end - begin, dtype=source.range("weight", like, 0, 1).dtype)
    if kind == "weight":
        stream = draw.key(context.seed, f"{context.name}/init")
        for counter, part in zip(torch.arange(begin, end).split(DRAW), result.split(DRAW), strict=True):
            part.copy_(draw.normal(stream, counter) * context.std + context.one)
    elif kind == "exp_avg_sq" and context.fresh_moments != "reset":
        result += source.tensor(kind, like).mean(dtype=torch.float64).to(result.dtype)
    return result
