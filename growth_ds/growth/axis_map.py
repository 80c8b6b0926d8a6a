"""One map per named axis: which old unit each new unit copies, and which share of its weight a reader gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KIND = {
    "hidden": "parallel",
    "head": "parallel",
    "ffn": "parallel",
    "stored_layer": "series",
    "position": "lookup",
}
"""How copies of a unit meet: *parallel* ones are summed by a reader, so their shares sum to 1; *series* ones run one
after another, and *lookup* ones are selected, so there a copy is a copy and nothing is divided. Axes that are not
listed cannot grow."""


@dataclass(frozen=True, eq=False)
class AxisMap:
    """New unit j of an axis copies old unit source[j]; whoever reads j gets share[j] of the old weight."""

    source: Tensor
    """[new] int64, each in [0, old)."""
    share: Tensor
    """[new] float64; over the copies of one old unit it sums to 1."""
    old: int
    """Units before the growth."""

    def __post_init__(self) -> None:
        if self.source.shape != self.share.shape or self.source.ndim != 1:
            raise ValueError(
                f"source {tuple(self.source.shape)} and share {tuple(self.share.shape)} must be one row each"
            )
        if self.source.numel() and not 0 <= int(self.source.min()) <= int(self.source.max()) < self.old:
            raise ValueError(f"source has units outside [0, {self.old})")
        totals = torch.zeros(self.old, dtype=torch.float64).index_add_(0, self.source, self.share)
        if not torch.allclose(totals, torch.ones_like(totals), atol=1e-12):
            unit = int((totals - 1).abs().argmax())
            raise ValueError(
                f"shares of old unit {unit} sum to {float(totals[unit])}, not to 1: it would be lost or doubled"
            )

    @staticmethod
    def even(source: Tensor, old: int) -> AxisMap:
        """Every copy of a unit gets the same share. Raises ValueError if an old unit has no copy."""
        return AxisMap(source, 1.0 / torch.bincount(source, minlength=old)[source].double(), old)

    @property
    def new(self) -> int:
        """Units after the growth."""
        return self.source.numel()

    @property
    def is_even(self) -> bool:
        """Whether every old unit has equally many copies with equal shares (what plain LayerNorm needs)."""
        return bool((self.share == self.share[0]).all()) and self.new % self.old == 0

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves."""
        return self.new == self.old and bool((self.source == torch.arange(self.old)).all())

    def then(self, later: AxisMap) -> AxisMap:
        """The one map that equals this growth followed by `later`. Raises ValueError if the sizes do not meet."""
        if later.old != self.new:
            raise ValueError(f"cannot compose: this map ends with {self.new} units, the next starts with {later.old}")
        return AxisMap(self.source[later.source], self.share[later.source] * later.share, self.old)

    def first_copies(self) -> Tensor:
        """[old] int64: for each old unit the first new unit that copies it (for the inverse)."""
        first = torch.full((self.old,), self.new, dtype=torch.int64)
        return first.scatter_reduce(0, self.source, torch.arange(self.new), "amin")
