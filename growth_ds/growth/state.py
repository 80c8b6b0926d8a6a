"""The grown state of one parameter: where it is read from, and what the policy makes of its moments and step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from growth_ds.axes import parse, role
from growth_ds.config import Grow
from growth_ds.growth import draw
from growth_ds.growth.apply import Context, grow
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.dense import DenseMap
from growth_ds.growth.plan import GrowthPlan


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
    std, one = {"bias": (0.0, 0.0), "norm": (0.0, 1.0), "matrix": (plan.std, 0.0)}[role(pattern)]
    return Context(pattern, name, plan.grow.seed, std, one, policy, plan.grow.damping)


def grow_state(plan: GrowthPlan, name: str, read: Read[S]) -> S:
    """Weight, moments and step of one grown parameter; `read` gives the state of an old one by name.

    Raises ValueError, naming the parameter, where the source is not finite.
    """
    pattern, layer = located(plan, name)
    context = context_of(plan, name, pattern)
    if pattern in plan.added:
        return _initial(plan, pattern, context, read)
    state = _source(plan, pattern, layer, read, name)
    if plan.is_identity and _keeps_all(plan.grow):
        return state
    above = _above(plan, pattern, layer, read)
    row, old, maps = plan.layout[pattern], plan.old, plan.maps
    if layer is not None and layer in plan.thin and "ffn" in parse(row).names:
        thin = plan.thin[layer]
        old, maps = {**old, "ffn": thin.old}, {**maps, "ffn": thin}

    def grown(kind: str) -> Tensor:
        higher = None if above is None else getattr(above, kind)
        each = _without_factors(maps) if kind != "weight" and plan.grow.moments == "copy" else maps
        return grow(getattr(state, kind), row, old, each, kind, context, higher)

    weight = grown("weight")
    if plan.moments == "reset" or state.exp_avg is None or state.exp_avg_sq is None:
        return _changed(state, weight=weight, exp_avg=None, exp_avg_sq=None, step=0)
    step = _step(plan.grow, state.step)
    return _changed(state, weight=weight, exp_avg=grown("exp_avg"), exp_avg_sq=grown("exp_avg_sq"), step=step)


def _without_factors(maps: Mapping[str, AxisMap | DenseMap]) -> dict[str, AxisMap | DenseMap]:
    """The same maps as copies alone."""
    return {axis: replace(each, raw=True) if isinstance(each, AxisMap) else each for axis, each in maps.items()}


def _changed(state: S, **values: Any) -> S:
    return cast(S, replace(cast(Any, state), **values))


def _keeps_all(grow: Grow) -> bool:
    return grow.moments != "reset" and grow.step == "keep" and not grow.rewind


def _step(grow: Grow, step: int) -> int:
    """Adam's count after the growth."""
    return 0 if grow.step == "reset" else max(0, step - grow.rewind)


def _initial(plan: GrowthPlan, pattern: str, context: Context, read: Read[S]) -> S:
    """A parameter that the old model does not have, drawn; its mean square starts at the MLM transform's mean."""
    like = read(f"head.dense.{'bias' if pattern.endswith('bias') else 'weight'}")
    shape = parse(plan.layout[pattern]).shape(plan.new)
    counter = torch.arange(torch.Size(shape).numel())
    drawn = draw.normal(draw.key(context.seed, f"{context.name}/init"), counter) * context.std + context.one
    weight = drawn.to(like.weight.dtype).reshape(shape)
    if plan.moments == "reset" or like.exp_avg is None or like.exp_avg_sq is None:
        return _changed(like, weight=weight, exp_avg=None, exp_avg_sq=None, step=0)
    square = torch.zeros_like(weight)
    if context.fresh_moments != "reset":
        square += like.exp_avg_sq.mean()
    step = _step(plan.grow, like.step)
    return _changed(like, weight=weight, exp_avg=torch.zeros_like(weight), exp_avg_sq=square, step=step)


def _source(plan: GrowthPlan, pattern: str, layer: int | None, read: Read[S], name: str) -> S:
    """The old state that the parameter is grown from, after what the plan says of its layer."""
    if layer is None:
        return _finite(pattern, read(pattern))
    each = plan.maps.get("stored_layer")
    if isinstance(each, DenseMap):
        return _mixed(each, pattern, layer, read)
    rule = plan.overrides.get(pattern, {}).get(layer)
    source = int(rule.split()[1]) if rule and rule.startswith("layer ") else plan.source_layer(layer)
    state = _finite(name, read(pattern.replace("{layer}", str(source))))
    state = _layer_moments(plan, layer, state)
    if rule in ("0", "1"):
        zeros = None if state.exp_avg is None else torch.zeros_like(state.exp_avg)
        state = _changed(state, weight=torch.full_like(state.weight, float(rule)), exp_avg=zeros)
    return state


def _finite(name: str, state: S) -> S:
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        x = getattr(state, kind)
        # A sum is not finite if a part is not; it may overflow without that, which the second look finds.
        if x is not None and not bool(x.sum().isfinite()) and not bool(x.isfinite().all()):
            raise ValueError(f"'{name}': {kind} has values that are not finite; grow from an earlier checkpoint")
    return state


def _layer_moments(plan: GrowthPlan, layer: int, state: S) -> S:
    """Moments of a layer that stands where none stood, or that ran at more depths than now."""
    each = plan.maps.get("stored_layer")
    if not isinstance(each, AxisMap) or state.exp_avg is None or state.exp_avg_sq is None:
        return state
    policy = plan.grow.layer_moments or plan.grow.moments
    mean, square = state.exp_avg, state.exp_avg_sq
    ran = (plan.old["layer"] // plan.old["stored_layer"]) / (plan.new["layer"] // plan.new["stored_layer"])
    if ran > 1 and policy != "copy":
        # A shared layer's gradient was the sum over its depths. Each keeps its part of the mean; the mean square of
        # parts that agree little is a part too, and one that is too large makes steps too short, never too long.
        mean, square = mean / ran, square / ran
    if layer in plan.new_layers:
        if policy == "damped":
            mean = mean * plan.grow.damping
        elif policy == "reset":
            mean, square = torch.zeros_like(mean), torch.zeros_like(square)
    return state if mean is state.exp_avg else _changed(state, exp_avg=mean, exp_avg_sq=square)


def _above(plan: GrowthPlan, pattern: str, layer: int | None, read: Read[S]) -> S | None:
    """The same parameter of the next old layer, where units come from there; the last layer has none but itself."""
    donors = [
        axis
        for axis in parse(plan.layout[pattern]).names
        if isinstance(each := plan.maps.get(axis), AxisMap) and each.donor is not None
    ]
    if not donors:
        return None
    if layer is None:
        raise ValueError(f"'{pattern}' is in no layer, and axis {donors[0]} takes units of the next one")
    higher = min(plan.source_layer(layer) + 1, plan.old["stored_layer"] - 1)
    return read(pattern.replace("{layer}", str(higher)))


def _mixed(each: DenseMap, pattern: str, layer: int, read: Read[S]) -> S:
    """A weighted sum of all old layers (LiGO's depth); its moments have no law."""
    states = [read(pattern.replace("{layer}", str(old))) for old in range(each.old)]
    weight = sum(state.weight * float(part) for state, part in zip(states, each.made[layer], strict=True))
    return _changed(states[0], weight=weight, exp_avg=None, exp_avg_sq=None)
