"""Learning-rate multipliers after a growth: on the tensors that read copied units, the share of each copy.

Adam divides scale out of its update, so a weight that was split by `share` still takes a step of full size, and its
copies together move the function 1/share times as far as before. With the multiplier, "k steps, then grow" is "grow,
then k steps" (muP's 1/fan-in rule, found again). Decay is not multiplied.

The multipliers of a model are one vector for each parallel axis; a tensor's are their product over the axes it reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from growth_ds.axes import parse
from growth_ds.growth.axis_map import KIND, AxisMap

Rates = dict[str, Tensor]
"""Axis -> [units] float64 multipliers; an axis that is not there has 1."""


def next_rates(policy: str, maps: Mapping[str, object], previous: Mapping[str, Tensor]) -> Rates:
    """The multipliers after a growth. `policy`: keep, share or mean (see `Grow.lr`). Fresh units learn at full rate."""
    rates = {axis: values.double() for axis, values in previous.items()}
    for axis, each in maps.items():
        if KIND[axis] != "parallel" or not isinstance(each, AxisMap):
            rates.pop(axis, None)
            continue
        values = rates.get(axis, torch.ones(each.old, dtype=torch.float64))[each.source.clamp(min=0)]
        if policy != "keep" and not each.raw:
            values = values * each.share.double()
        values = torch.where(each.is_fresh, 1.0, values)
        if policy == "mean":
            values = torch.full_like(values, float(values.mean()))
        rates[axis] = values
    return {axis: values for axis, values in rates.items() if bool((values != 1.0).any())}


def worst_of_mean(values: Tensor) -> float:
    """Largest relative error if one number, the mean, stood for all multipliers of an axis."""
    return float(((values.mean() - values) / values).abs().max())


def scale_of(row: str, rates: Mapping[str, Tensor]) -> float | None:
    """The one multiplier of a tensor, or None if it differs within it."""
    scale = 1.0
    for axis, split in zip(parse(row).names, parse(row).split, strict=True):
        if split and axis in rates:
            first = float(rates[axis][0])
            if bool((rates[axis] != first).any()):
                return None
            scale *= first
    return scale


def scale_range(row: str, sizes: Mapping[str, int], rates: Mapping[str, Tensor], begin: int, end: int) -> Tensor:
    """float32 [end - begin]: the multipliers of a flat slice of the tensor."""
    axes = parse(row)
    index = torch.arange(begin, end)
    scale = torch.ones(end - begin, dtype=torch.float64)
    for axis, split in reversed(list(zip(axes.names, axes.split, strict=True))):
        unit, index = index % sizes[axis], index // sizes[axis]
        if split and axis in rates:
            scale = scale * rates[axis][unit]
    return scale.float()
