"""A flat range of a grown weight, or of weight and both moments in one launch: a gather and a factor for each axis.

The law itself is `growth_ds.growth`, which is given this op and has the same bits without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from growth_ds.ops import library

MOST_AXES = 8

Units = Sequence[Tensor | None]
"""For each axis (new,) int64: which old unit each new one comes from; None: nothing moves."""
Factors = Sequence[Tensor | None]
"""For each axis (new,) float64: what the values of each new unit are multiplied with; None: nothing."""


class Axis(Protocol):
    """One axis of one tensor, as `growth_ds.growth.dims` has it."""

    old: int
    new: int
    source: Tensor | None
    scale: Tensor | None


def gather(x: Tensor, axes: Sequence[Axis], begin: int, end: int) -> Tensor | None:
    """The range of one grown tensor, flat; None where there is no compiled op for it and the caller is faster."""
    if not _is_known([x], len(axes)):
        return None
    sizes, units = [(axis.old, axis.new) for axis in axes], [axis.source for axis in axes]
    return growth_gather([x], sizes, units, [[axis.scale for axis in axes]], begin, end)[0]


def _is_known(tensors: Sequence[Tensor], axes: int) -> bool:
    fits = 1 <= axes <= MOST_AXES and len(tensors) <= 3 and all(each.dtype == torch.float32 for each in tensors)
    return fits and library.kernel("growth_gather", *tensors) is not None


def growth_gather(
    tensors: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    units: Units,
    factors: Sequence[Factors],
    begin: int,
    end: int,
) -> Tensor:
    """[tensors, end - begin]: elements [begin, end) of the flattened grown tensors, fp32 as they are.

    tensors: one to three of the same old shape, flat or not. sizes: (old, new) of each axis. factors: of each tensor.
    A value is multiplied once, by the product of its factors rounded to fp32. ValueError for a range beyond it.
    """
    total = 1
    for _, new in sizes:
        total *= new
    if not 0 <= begin <= end <= total:
        raise ValueError(f"elements [{begin}, {end}) are not inside a tensor of {total}")
    first = tensors[0]
    if not _is_known(tensors, len(sizes)):
        return reference(tensors, sizes, units, factors, begin, end)
    table = torch.cat([_filled(unit, new) for unit, (_, new) in zip(units, sizes, strict=True)]).to(first.device)
    scale = None
    if any(factor is not None for each in factors for factor in each):
        ones = [torch.ones(new, dtype=torch.float64) for _, new in sizes]
        rows = [
            torch.cat([one if factor is None else factor for factor, one in zip(each, ones, strict=True)])
            for each in factors
        ]
        scale = torch.stack(rows).to(first.device)
    out = first.new_empty((len(tensors), end - begin))
    given = [*tensors, *[first] * (3 - len(tensors))]
    old, new_sizes = [size for size, _ in sizes], [size for _, size in sizes]
    torch.ops.growth_ds.growth_gather(*given, table, scale, old, new_sizes, begin, out)
    return out


def _filled(unit: Tensor | None, new: int) -> Tensor:
    return torch.arange(new) if unit is None else unit


def reference(
    tensors: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    units: Units,
    factors: Sequence[Factors],
    begin: int,
    end: int,
) -> Tensor:
    """The same from the index of each element, in torch's own operations."""
    first = tensors[0]
    index, source = torch.arange(begin, end), torch.zeros(end - begin, dtype=torch.int64)
    scales: list[Tensor | None] = [None] * len(tensors)
    own: list[Tensor] = []
    for _, new in reversed(sizes):
        own.insert(0, index % new)
        index = index // new
    for axis, ((old, _), unit) in enumerate(zip(sizes, units, strict=True)):
        source = source * old + (own[axis] if unit is None else unit.cpu()[own[axis]])
        for row, each in enumerate(factors):
            factor, so_far = each[axis], scales[row]
            if factor is not None:
                here = factor.cpu()[own[axis]]
                scales[row] = here if so_far is None else so_far * here
    source = source.to(first.device)
    values = [tensor.reshape(-1)[source] for tensor in tensors]
    pairs = zip(values, scales, strict=True)
    return torch.stack([value if scale is None else value * scale.to(value) for value, scale in pairs])


@library.fake("growth_gather")
def _(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    sources: Tensor,
    factors: Tensor | None,
    old_sizes: list[int],
    new_sizes: list[int],
    begin: int,
    out: Tensor,
) -> None: ...
