"""One map per named axis: which old unit each new unit copies, and which share of its weight a reader gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from growth_ds.growth.fresh import Fresh

KIND = {
    "hidden": "parallel",
    "head": "parallel",
    "ffn": "parallel",
    "stored_layer": "series",
    "position": "lookup",
    "segment": "lookup",
    "vocab": "lookup",
    "expert": "lookup",
}
"""How copies of a unit meet: *parallel* ones are summed by a reader, so their shares sum to 1; *series* ones run one
after another, and *lookup* ones are selected, so there a copy is a copy and nothing is divided. Axes that are not
listed cannot grow."""

FRESH = -1
"""In `AxisMap.source`: a unit without a source."""

Split = Literal["share", "diagonal", "block", "last"]


@dataclass(frozen=True, eq=False)
class AxisMap:
    """New unit j of an axis copies old unit source[j]; whoever reads j gets share[j] of the old weight."""

    source: Tensor
    """[new] int64, each in [0, old), or -1 for a fresh unit."""
    share: Tensor
    """[new] float64; over the copies of one old unit it sums to 1; 0 for a fresh unit."""
    old: int
    """Units before the growth."""
    fresh: Fresh = field(default_factory=Fresh)
    """What fresh units are filled with."""
    donor: Tensor | None = None
    """[new] bool: units that come from the layer above their own (bert2BERT's AKI); None: no unit does."""
    split: Split = "share"
    """How readers divide a weight among copies. `share`: each gets its share. `diagonal`: the copy of the same number
    as the reader's own copy gets all of it (staged training), `block` does that to the moments too. `last`: the last
    copy gets all. The moments follow the shares; a reader that is no copy itself gets shares."""
    noise: float = 0.0
    """Noise on the weights of readers that sums to zero over the copies of a unit: its RMS over the tensor's RMS."""
    factors: tuple[tuple[str, float], ...] = ()
    """(parameter name pattern, factor) rows: factor of the copied units of tensors that make this axis."""
    raw: bool = False
    """Readers of copies keep their weights undivided: no function is kept (ModernBERT's tiling)."""

    def __post_init__(self) -> None:
        if self.source.shape != self.share.shape or self.source.ndim != 1:
            raise ValueError(
                f"source {tuple(self.source.shape)} and share {tuple(self.share.shape)} must be one row each"
            )
        if self.source.numel() and not int(self.source.min()) >= FRESH <= int(self.source.max()) < self.old:
            raise ValueError(f"source has units outside [0, {self.old}); a fresh unit is {FRESH}")
        if self.donor is not None and (self.donor.shape != self.source.shape or self.donor.dtype != torch.bool):
            raise ValueError("donor must have one bool for each unit")
        if float(self.share[self.is_fresh].abs().sum()) > 0:
            raise ValueError("a fresh unit must have share 0: it takes nothing from an old one")
        if bool((self.share < 0).any()):
            raise ValueError("a share must not be below 0: the unit's weight would change its sign")
        if not self.raw:
            self._check_shares()

    def _check_shares(self) -> None:
        copied = ~self.is_fresh
        totals = torch.zeros(self.old, dtype=torch.float64)
        totals.index_add_(0, self.source[copied], self.share[copied].double())
        if not torch.allclose(totals, torch.ones_like(totals), rtol=0.0, atol=1e-12):
            unit = int((totals - 1).abs().argmax())
            raise ValueError(
                f"shares of old unit {unit} sum to {float(totals[unit])}, not to 1: it would be lost or doubled"
            )

    @staticmethod
    def even(source: Tensor, old: int, **options: Any) -> AxisMap:
        """Every copy of a unit gets the same share. Raises ValueError if an old unit has no copy."""
        copied = source >= 0
        counts = torch.bincount(source[copied], minlength=old)
        share = torch.where(copied, 1.0 / counts[source.clamp(min=0)].double(), 0.0)
        return AxisMap(source, share, old, **options)

    @property
    def new(self) -> int:
        """Units after the growth."""
        return self.source.numel()

    @property
    def is_fresh(self) -> Tensor:
        """[new] bool: units without a source."""
        return self.source == FRESH

    @property
    def is_even(self) -> bool:
        """Whether every old unit has equally many copies with equal shares (what plain LayerNorm needs)."""
        return bool((self.share == self.share[0]).all()) and self.new % self.old == 0 and not bool(self.is_fresh.any())

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves."""
        return self.new == self.old and bool((self.source == torch.arange(self.old)).all())

    @property
    def is_told(self) -> bool:
        """Whether sources, shares and fresh units tell all: no noise, donors, factors or split of its own."""
        return self.split == "share" and self.donor is None and not self.noise and not self.factors

    @property
    def is_plain(self) -> bool:
        """Whether the map is nothing but copies and shares."""
        return self.is_told and not self.raw and not bool(self.is_fresh.any())

    def copy_number(self) -> Tensor:
        """[new] int64: how many earlier units copy the same old unit; 0 for the first copy and for fresh units."""
        return self._numbers()[0]

    def copies(self) -> Tensor:
        """[new] int64: how many copies the unit's source has in all; 1 for fresh units."""
        return self._numbers()[1]

    def next_copy(self) -> Tensor:
        """[new] int64: the next unit that copies the same old unit, from the last to the first; itself if alone."""
        order = torch.argsort(self.source, stable=True)
        numbers, copies = self._numbers()
        position = torch.empty_like(order).scatter_(0, order, torch.arange(self.new))
        wraps = numbers == copies - 1
        following = order[torch.where(wraps, position - copies + 1, position + 1).clamp(0, self.new - 1)]
        return torch.where(self.is_fresh, torch.arange(self.new), following)

    def _numbers(self) -> tuple[Tensor, Tensor]:
        order = torch.argsort(self.source, stable=True)
        counts = torch.bincount(self.source + 1, minlength=self.old + 1)
        starts = counts.cumsum(0) - counts
        numbers = torch.empty_like(order).scatter_(0, order, torch.arange(self.new) - starts[self.source[order] + 1])
        fresh = self.is_fresh
        return numbers.masked_fill(fresh, 0), counts[self.source + 1].masked_fill(fresh, 1)

    def then(self, later: AxisMap) -> AxisMap:
        """The one map that equals this growth followed by `later`.

        A copy of a fresh unit is fresh. Raises ValueError if the sizes do not meet, or if one of the maps is more than
        copies, shares and fresh units: what noise or another layer has changed is not said by a composed map.
        """
        if later.old != self.new:
            raise ValueError(f"cannot compose: this map ends with {self.new} units, the next starts with {later.old}")
        for each in (self, later):
            if not each.is_told or each.raw:
                raise ValueError("cannot compose: one of the maps has noise, donors, factors or a split of its own")
        both = bool(self.is_fresh.any()) and bool(later.is_fresh.any())
        if both and self.fresh != later.fresh:
            raise ValueError("cannot compose: the two maps fill fresh units with different values")
        at = later.source.clamp(min=0)
        source = torch.where(later.is_fresh, FRESH, self.source[at])
        share = torch.where(source == FRESH, 0.0, self.share[at] * later.share)
        return AxisMap(source, share, self.old, later.fresh if bool(later.is_fresh.any()) else self.fresh)

    def first_copies(self) -> Tensor:
        """[old] int64: for each old unit the first new unit that copies it (for the inverse)."""
        copied = ~self.is_fresh
        first = torch.full((self.old,), self.new, dtype=torch.int64)
        return first.scatter_reduce(0, self.source[copied], torch.arange(self.new)[copied], "amin")

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The same map as two dense [new, old] float64 matrices: on the side that makes units, and that reads them."""
        made = torch.zeros(self.new, self.old, dtype=torch.float64)
        copied = torch.nonzero(~self.is_fresh).flatten()
        made[copied, self.source[copied]] = 1.0
        return made, made * self.share.double()[:, None]

    def to_json(self) -> list[Any]:
        """Everything that determines the grown tensors."""
        donor = None if self.donor is None else self.donor.int().tolist()
        extra = [self.fresh.to_json(), donor, self.split, self.noise, [list(row) for row in self.factors], self.raw]
        return [self.source.tolist(), self.share.tolist(), *extra]
