"""Dense maps: every new unit is a mix of all old ones (LiGO, arXiv 2303.00980). Application only, by plain torch ops.

`W_new = made W_old read^T` for each axis, so depth and width of LiGO are `einsum("Ll,Ff,Hh,lfh->LFH")`. There is no
law for moments under a mix, so they start at zero. As everything is torch, autograd goes through `grow`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from growth_ds.axes import parse


@dataclass(frozen=True, eq=False)
class DenseMap:
    """New unit j makes sum_i made[j, i] * old unit i; its readers get sum_i read[j, i] * the old weight of unit i."""

    made: Tensor
    """[new, old] float."""
    read: Tensor
    """[new, old] float; LiGO uses `made` here too, Net2Net the same divided by the copies."""

    def __post_init__(self) -> None:
        if self.made.ndim != 2 or self.made.shape != self.read.shape:
            raise ValueError(f"made {tuple(self.made.shape)} and read {tuple(self.read.shape)} must be [new, old] both")

    @property
    def new(self) -> int:
        """Units after the growth."""
        return self.made.shape[0]

    @property
    def old(self) -> int:
        """Units before the growth."""
        return self.made.shape[1]

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves."""
        return all(torch.equal(m, torch.eye(self.old, dtype=m.dtype)) for m in (self.made, self.read))

    def then(self, later: DenseMap) -> DenseMap:
        """The one map that equals this growth followed by `later`. Raises ValueError if the sizes do not meet."""
        if later.old != self.new:
            raise ValueError(f"cannot compose: this map ends with {self.new} units, the next starts with {later.old}")
        return DenseMap(later.made @ self.made, later.read @ self.read)

    def to_json(self) -> list[Any]:
        """Both matrices."""
        return [self.made.tolist(), self.read.tolist()]


def grow_dense(x: Tensor, row: str, old: Mapping[str, int], maps: Mapping[str, Any], kind: str) -> Tensor:
    """The grown tensor where at least one axis has a dense map; plain axis maps beside it are used as matrices.

    Raises ValueError for moments: a mix has no law for them.
    """
    if kind != "weight":
        raise ValueError("a dense map has no law for moments; reset them")
    axes = parse(row)
    x = x.reshape(axes.unfolded(old))
    for dim, (axis, split) in enumerate(zip(axes.names, axes.split, strict=True)):
        if axis in maps:
            each = maps[axis]
            made, read = (each.made, each.read) if isinstance(each, DenseMap) else each.matrices()
            x = torch.tensordot((read if split else made).to(x.dtype), x, dims=([1], [dim])).movedim(0, dim)
    new = {axis: maps[axis].new if axis in maps else size for axis, size in old.items()}
    return x.reshape(axes.shape(new))
