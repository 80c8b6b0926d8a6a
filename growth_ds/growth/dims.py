"""What an axis map means for one dimension of one tensor: the law's factors, and the values of fresh units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from growth_ds.axes import Axes
from growth_ds.growth.axis_map import KIND, AxisMap
from growth_ds.growth.fresh import Fill

POWER = {"weight": (0, 1), "exp_avg": (1, 0), "exp_avg_sq": (2, 0)}
"""Kind of state -> exponent of `share` on a copied axis and on a split axis, for parallel axes."""

Match = Callable[[Tensor, list[Tensor]], Tensor]


@dataclass
class Dim:
    """One named axis of one tensor."""

    old: int
    new: int
    source: Tensor | None = None
    """[new] int64 index into the old units (`old` itself: their mean); None: nothing moves."""
    scale: Tensor | None = None
    """[new] float64 factors; None: all 1."""
    fresh: Tensor | None = None
    """[new] bool; None: no unit is fresh."""
    fill: Fill | None = None
    donor: Tensor | None = None
    match: Match | None = None
    """(unit of this dimension, units of all) -> float64 factor in place of the share."""
    noise: float = 0.0
    following: Tensor | None = None
    """[new] int64: the next copy of the same unit."""

    @property
    def is_trivial(self) -> bool:
        return self.source is None and self.scale is None and not self.is_special

    @property
    def is_special(self) -> bool:
        """Whether elements differ by more than a gather and a factor for each dimension."""
        return self.fresh is not None or self.donor is not None or self.match is not None or self.noise > 0

    def runs(self) -> list[tuple[int, int, int, float]]:
        """(first new unit, first old unit, count, factor) of pieces that are contiguous with one factor."""
        if self.source is None:
            return [(0, 0, self.new, 1.0)]
        scale = torch.ones(self.new, dtype=torch.float64) if self.scale is None else self.scale
        starts = torch.ones(self.new, dtype=torch.bool)
        starts[1:] = (self.source[1:] != self.source[:-1] + 1) | (scale[1:] != scale[:-1])
        begins = torch.nonzero(starts).flatten()
        counts = torch.diff(begins, append=torch.tensor([self.new]))
        rows = (begins.tolist(), self.source[begins].tolist(), counts.tolist(), scale[begins].tolist())
        return list(zip(*rows, strict=True))

    def fresh_runs(self) -> list[tuple[int, int]]:
        """(begin, end) of new units that are all fresh or all copied."""
        if self.fresh is None:
            return [(0, self.new)]
        changes = (torch.nonzero(self.fresh[1:] != self.fresh[:-1]).flatten() + 1).tolist()
        return list(zip([0, *changes], [*changes, self.new], strict=True))


def dims_of(
    axes: Axes,
    old: Mapping[str, int],
    maps: Mapping[str, AxisMap],
    kind: str,
    pattern: str,
    policy: str,
    damping: float,
) -> list[Dim]:
    """One Dim for each named axis of a tensor. `policy`, `damping`: for moments of fresh units."""
    dims = []
    for axis, split in zip(axes.names, axes.split, strict=True):
        dim = Dim(old[axis], old[axis])
        if axis in maps:
            dim = _mapped(axis, maps[axis], split, kind, pattern, policy, damping)
        dims.append(dim)
    for axis, split, dim in zip(axes.names, axes.split, dims, strict=True):
        if axis in maps and split and KIND[axis] == "parallel":
            _divide(dim, maps[axis], kind, _partner(axes, maps))
    return dims


def _mapped(axis: str, axis_map: AxisMap, split: bool, kind: str, pattern: str, policy: str, damping: float) -> Dim:
    fresh = axis_map.is_fresh
    dim = Dim(axis_map.old, axis_map.new, axis_map.source)
    if axis_map.donor is not None and bool(axis_map.donor.any()):
        dim.donor = axis_map.donor
    power = POWER[kind][split]
    if KIND[axis] == "parallel" and power and not axis_map.raw:
        dim.scale = axis_map.share.double() ** power
    if kind == "weight" and not split:
        factor = next((factor for glob, factor in axis_map.factors if fnmatchcase(pattern, glob)), 1.0)
        if factor != 1.0:
            dim.scale = torch.full((axis_map.new,), factor, dtype=torch.float64)
    if bool(fresh.any()):
        dim.fresh = fresh
        dim.fill = axis_map.fresh.fill(pattern, split) if kind == "weight" else _moment_fill(kind, policy, damping)
        mean = axis_map.old if dim.fill.mean else 0
        dim.source = torch.where(fresh, mean, axis_map.source)
        if dim.scale is not None:
            dim.scale = torch.where(fresh, 1.0, dim.scale)
    if dim.scale is not None and bool((dim.scale == 1.0).all()):
        dim.scale = None
    if axis_map.is_identity and dim.fresh is None:
        dim.source = None
    return dim


def _moment_fill(kind: str, policy: str, damping: float) -> Fill:
    """Moments of a unit without history. The axis' mean square keeps its first updates at the usual size: with zeros
    under a large step count, bias correction is 1 and they reach 6.5 times the learning rate."""
    if policy == "reset":
        return Fill()
    if kind == "exp_avg_sq":
        return Fill(mean=1.0)
    return Fill(mean={"carry": 0.0, "copy": 1.0, "damped": damping}[policy])


def _partner(axes: Axes, maps: Mapping[str, AxisMap]) -> tuple[int, AxisMap] | None:
    """The made, parallel, grown axis of a tensor, by whose copies a diagonal is told."""
    for at, (axis, split) in enumerate(zip(axes.names, axes.split, strict=True)):
        if not split and axis in maps and KIND[axis] == "parallel":
            return at, maps[axis]
    return None


def _divide(dim: Dim, axis_map: AxisMap, kind: str, partner: tuple[int, AxisMap] | None) -> None:
    """How the tensor, which reads this axis, divides its weights among copies."""
    if axis_map.split == "last" and kind == "weight":
        last = axis_map.copy_number() == axis_map.copies() - 1
        dim.scale = last.double()
    elif partner is not None and ((axis_map.split == "diagonal" and kind == "weight") or axis_map.split == "block"):
        at, other = partner
        number, copies, theirs = axis_map.copy_number(), axis_map.copies(), other.copy_number()

        def match(unit: Tensor, units: list[Tensor]) -> Tensor:
            return (number[unit] == theirs[units[at]] % copies[unit]).double()

        dim.match, dim.scale = match, None
    if kind == "weight" and axis_map.noise:
        dim.noise, dim.following = axis_map.noise, axis_map.next_copy()
