"""The old tensor that a grown one is made from: which one it is, and what the plan makes of its layer beforehand.

All of this goes element by element, so it is the same for a slice of the tensor as for the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from growth_ds.axes import parse
from growth_ds.config import EXPERT
from growth_ds.growth.axis_map import AxisMap
from growth_ds.growth.dense import DenseMap
from growth_ds.growth.light import joined
from growth_ds.growth.plan import GrowthPlan
from growth_ds.growth.product import product

Span = tuple[int, int]
"""(begin, end) of elements of a flattened tensor."""


class Source(Protocol):
    """The old state, one kind (`weight`, `exp_avg`, `exp_avg_sq`) of one parameter at a time; it is not written to."""

    @property
    def moments(self) -> bool:
        """Whether it has Adam's moments at all."""
        ...

    @property
    def steps(self) -> Mapping[str, int]:
        """Adam's count by parameter name."""
        ...

    def tensor(self, kind: str, name: str) -> Tensor:
        """The whole tensor, in its shape. KeyError for an unknown name."""
        ...

    def range(self, kind: str, name: str, begin: int, end: int) -> Tensor:
        """[end - begin]: elements [begin, end) of it, flattened; the range may be empty."""
        ...


def origin_of(plan: GrowthPlan, name: str) -> str:
    """Name of the old parameter whose step count, and in most cases whose values, the grown parameter takes.

    A parameter that the old model does not have looks to the MLM transform. Raises KeyError for an unknown name.
    """
    pattern, layer = plan.parameters[name]
    if pattern in plan.added:
        return f"head.dense.{'bias' if pattern.endswith('bias') else 'weight'}"
    if layer is None:
        return pattern
    rule = _rule(plan, pattern, layer)
    pattern = plan.products.get(pattern, (pattern,))[0]
    if isinstance(plan.maps.get("stored_layer"), DenseMap):
        old = 0
    else:
        old = int(rule.split()[1]) if rule and rule.startswith("layer ") else plan.source_layer(layer)
    return pattern.replace("{layer}", str(old))


def old_values(plan: GrowthPlan, name: str, kind: str, source: Source, span: Span | None = None) -> Tensor:
    """The old tensor of one kind, or elements `span` of it flattened, after what the plan says of its layer.

    For a parameter that is not added. Raises ValueError, naming parameter and kind, for a value that is not finite.
    """
    pattern, layer = plan.parameters[name]
    each = plan.maps.get("stored_layer")
    if layer is not None and isinstance(each, DenseMap):
        return _mixed(plan, name, each, kind, source, span)
    x = _read(plan, name, origin_of(plan, name), kind, source, span)
    refuse_unless_finite(name, kind, x)
    if layer is None:
        return x
    if kind != "weight":
        x = _routed_moment(plan, pattern, _layer_moment(plan, layer, kind, x))
    rule = _rule(plan, pattern, layer)
    if rule in ("0", "1") and kind != "exp_avg_sq":
        x = torch.full_like(x, float(rule) if kind == "weight" else 0.0)
    return x


def values_above(plan: GrowthPlan, name: str, kind: str, source: Source) -> Tensor | None:
    """The same whole tensor of the next old layer, where units come from there; the last layer has none but itself.

    Raises ValueError where units come from there and the parameter is in no layer.
    """
    pattern, layer = plan.parameters[name]
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
    x = _read(plan, name, pattern.replace("{layer}", str(higher)), kind, source, None)
    return x if kind == "weight" else _routed_moment(plan, pattern, x)


def refuse_unless_finite(name: str, kind: str, x: Tensor) -> None:
    """Raises ValueError, naming parameter and kind, if a value is not finite."""
    # A sum is not finite if a part is not; it may overflow without that, which the second look finds.
    if not bool(x.sum().isfinite()) and not bool(x.isfinite().all()):
        raise ValueError(f"'{name}': {kind} has values that are not finite; grow from an earlier checkpoint")


def _read(plan: GrowthPlan, name: str, old: str, kind: str, source: Source, span: Span | None) -> Tensor:
    """The old tensor `old`, or what the two factors make that stand in its place."""
    pattern, _ = plan.parameters[name]
    if pattern in plan.products:
        layer = old.split(".")[1]
        factors = [factor.replace("{layer}", layer) for factor in plan.products[pattern]]
        return product(plan, name, (factors[0], factors[1]), kind, source.tensor, span)
    if ".qkv." in old and int(old.split(".")[1]) in plan.light:
        size = torch.Size(parse(plan.layout[pattern]).shape(plan.old)).numel()
        return joined(old, size, kind, source, span)
    return source.tensor(kind, old) if span is None else source.range(kind, old, *span)


def _rule(plan: GrowthPlan, pattern: str, layer: int) -> str | None:
    return plan.overrides.get(pattern, {}).get(layer)


def _layer_moment(plan: GrowthPlan, layer: int, kind: str, x: Tensor) -> Tensor:
    """A moment of a layer that stands where none stood, or that ran at more depths than now."""
    if not isinstance(plan.maps.get("stored_layer"), AxisMap):
        return x
    policy = plan.grow.layer_moments or plan.grow.moments
    ran = plan.depth_order(new=False).count(plan.source_layer(layer)) / plan.depth_order(new=True).count(layer)
    if ran > 1 and policy != "copy":
        # A shared layer's gradient was the sum over its depths. Each keeps its part of the mean; the mean square of
        # parts that agree little is a part too, and one that is too large makes steps too short, never too long.
        # Where it was their mean, the first moment is that part already, and the square of the mean too small by ran.
        averaged = bool(plan.models) and plan.models[0].shared_gradient == "mean"
        x = (x * ran if kind == "exp_avg_sq" else x) if averaged else x / ran
    if layer in plan.new_layers:
        if policy == "damped" and kind == "exp_avg":
            x = x * plan.grow.damping
        elif policy == "reset":
            x = torch.zeros_like(x)
    return x


def _routed_moment(plan: GrowthPlan, pattern: str, x: Tensor) -> Tensor:
    """A moment of a feed-forward layer that becomes several experts.

    The gradients of the copies add up to the layer's, each has the part of its own tokens, 1 / experts of them. So it
    has that part of the mean, and of the mean square as of a shared layer's: where the parts agree little the square is
    right, where they agree it is too large, and steps are too short, never too long.
    """
    each = plan.maps.get(EXPERT)
    if each is None or plan.grow.moments == "copy" or EXPERT not in parse(plan.layout[pattern]).names:
        return x
    return x / each.new


def _mixed(plan: GrowthPlan, name: str, each: DenseMap, kind: str, source: Source, span: Span | None) -> Tensor:
    """A weighted sum of all old layers (LiGO's depth)."""
    pattern, layer = plan.parameters[name]
    assert layer is not None, "what is in no layer has no layers to mix"
    total: Tensor | None = None
    for old, part in enumerate(each.made[layer]):
        x = _read(plan, name, pattern.replace("{layer}", str(old)), kind, source, span) * float(part)
        total = x if total is None else total + x
    assert total is not None, "a map has at least one old layer"
    return total
