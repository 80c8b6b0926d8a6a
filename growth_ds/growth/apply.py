"""Apply a plan to tensors: the law for weights and both Adam moments, whole tensors or any flat slice of them.

The law (Net2Net, arXiv 1511.05641, made BERT-complete): on the side that *makes* the units a weight is copied and its
gradient is shared; on the side that *reads* them the weight is shared and the gradient copied. Adam's first moment
scales as the gradient, the second as its square. `growth_ds/growth/README.md` derives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from growth_ds.axes import expand, parse
from growth_ds.growth.axis_map import KIND, AxisMap
from growth_ds.growth.plan import GrowthPlan

POWER = {"weight": (0, 1), "exp_avg": (1, 0), "exp_avg_sq": (2, 0)}
"""Kind of state -> exponent of `share` on a copied axis and on a split axis, for parallel axes."""


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


def _scale(axis: str, axis_map: AxisMap, split: bool, kind: str, dtype: torch.dtype) -> Tensor | None:
    """[new] factors of an axis, or None where they are all 1."""
    power = POWER[kind][split]
    if KIND[axis] != "parallel" or power == 0:
        return None
    return (axis_map.share**power).to(dtype)


def grow(x: Tensor, row: str, old: Mapping[str, int], maps: Mapping[str, AxisMap], kind: str = "weight") -> Tensor:
    """The grown tensor. `row` is its layout row, `old` the axis sizes before; x has that shape and any float dtype."""
    axes = parse(row)
    x = x.reshape(axes.unfolded(old))
    for dim, (axis, split) in enumerate(zip(axes.names, axes.split, strict=True)):
        if axis in maps:
            x = x.index_select(dim, maps[axis].source)
            scale = _scale(axis, maps[axis], split, kind, x.dtype)
            if scale is not None:
                x = x * scale.reshape([-1 if d == dim else 1 for d in range(x.ndim)])
    new = {axis: maps[axis].new if axis in maps else size for axis, size in old.items()}
    return x.reshape(axes.shape(new))


def grow_range(
    x: Tensor, row: str, old: Mapping[str, int], maps: Mapping[str, AxisMap], begin: int, end: int, kind: str = "weight"
) -> Tensor:
    """Elements [begin, end) of the flattened grown tensor, the same bits as `grow`, without building the rest of it."""
    axes = parse(row)
    units = [torch.empty(0, dtype=torch.int64)] * len(axes.names)
    index = torch.arange(begin, end)
    for dim in range(len(axes.names) - 1, -1, -1):
        axis = axes.names[dim]
        size = maps[axis].new if axis in maps else old[axis]
        units[dim], index = index % size, index // size
    flat = torch.zeros(end - begin, dtype=torch.int64)
    for dim, axis in enumerate(axes.names):
        source = maps[axis].source[units[dim]] if axis in maps else units[dim]
        flat = flat * old[axis] + source
    y = x.reshape(-1)[flat]
    for dim, (axis, split) in enumerate(zip(axes.names, axes.split, strict=True)):
        scale = _scale(axis, maps[axis], split, kind, x.dtype) if axis in maps else None
        if scale is not None:
            y = y * scale[units[dim]]
    return y


def shrink(x: Tensor, row: str, old: Mapping[str, int], maps: Mapping[str, AxisMap], kind: str = "weight") -> Tensor:
    """The inverse of `grow`: the first copy of each unit, its share taken back. `old` are the sizes before it."""
    axes = parse(row)
    x = x.reshape([maps[axis].new if axis in maps else old[axis] for axis in axes.names])
    for dim, (axis, split) in enumerate(zip(axes.names, axes.split, strict=True)):
        if axis in maps:
            first = maps[axis].first_copies()
            x = x.index_select(dim, first)
            scale = _scale(axis, maps[axis], split, kind, x.dtype)
            if scale is not None:
                x = x / scale[first].reshape([-1 if d == dim else 1 for d in range(x.ndim)])
    return x.reshape(axes.shape(old))


def source_of(plan: GrowthPlan, name: str) -> tuple[str, str]:
    """(name of the old parameter, layout row) from which the grown parameter `name` is made."""
    pattern, layer = expand(plan.layout, plan.new)[name]
    source = pattern if layer is None else pattern.replace("{layer}", str(plan.source_layer(layer)))
    return source, plan.layout[pattern]


def grow_state(plan: GrowthPlan, name: str, read: Callable[[str], S]) -> S:
    """Weight, moments and step of one grown parameter; `read` gives the state of an old one by name."""
    source, row = source_of(plan, name)
    state = read(source)
    weight = grow(state.weight, row, plan.old, plan.maps, "weight")
    if plan.moments == "reset" or state.exp_avg is None or state.exp_avg_sq is None:
        return cast(S, replace(cast(Any, state), weight=weight, exp_avg=None, exp_avg_sq=None, step=0))
    exp_avg = grow(state.exp_avg, row, plan.old, plan.maps, "exp_avg")
    exp_avg_sq = grow(state.exp_avg_sq, row, plan.old, plan.maps, "exp_avg_sq")
    return cast(S, replace(cast(Any, state), weight=weight, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq))
