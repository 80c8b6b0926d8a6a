"""Two runs at equal compute, from their validation curves. Signs are kept: nothing here assumes that growing wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from growth_ds.report.rows import Record
from growth_ds.report.series import Curve

Point = tuple[float, float]
"""(FLOPs, validation loss in nats)."""


@dataclass(frozen=True)
class Comparison:
    """A run against another."""

    flops: float
    """Where they are compared: the end of the cheaper one."""
    loss: float | None
    """Nats of this run there, between two validations by a straight line; None before its first validation."""
    other_loss: float | None
    share_to_match: float | None
    """FLOPs at which this run came down to the other's final loss, as a fraction of the other's; None if never."""

    @property
    def difference(self) -> float | None:
        """Nats that the other is above (positive) or below this run at equal compute."""
        return None if self.loss is None or self.other_loss is None else self.other_loss - self.loss


def compare(this: Curve, other: Curve) -> Comparison | None:
    """This run against the other; None if either has no validation, or their last ones read rows of other lengths."""
    if not this.valid or not other.valid or _length(this.valid[-1]) != _length(other.valid[-1]):
        return None
    mine, theirs = points_of(this), points_of(other)
    flops = min(mine[-1][0], theirs[-1][0])
    matched = flops_to_reach(mine, theirs[-1][1])
    return Comparison(
        flops=flops,
        loss=loss_at(mine, flops),
        other_loss=loss_at(theirs, flops),
        share_to_match=matched / theirs[-1][0] if matched is not None and theirs[-1][0] else None,
    )


def points_of(curve: Curve) -> list[Point]:
    """One point for each FLOP count: around a growth two models may be validated at the same step.

    A small model may be validated on shorter rows than the last one; that is another task, so those are left out.
    """
    records = [record for record in curve.valid if _length(record) == _length(curve.valid[-1])]
    return sorted({float(record["flops"]): float(record["valid_loss"]) for record in records}.items())


def _length(record: Record) -> int | None:
    """Tokens of a validation row, where the record says it."""
    return record.get("valid_length")


def loss_at(points: Sequence[Point], flops: float) -> float | None:
    """Nats at a FLOP count, on the straight line between two validations; None outside of them."""
    for (x0, y0), (x1, y1) in pairwise([points[0], *points]):
        if x0 <= flops <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (flops - x0) / (x1 - x0)
    return None


def flops_to_reach(points: Sequence[Point], loss: float) -> float | None:
    """FLOPs at which the validation loss first came down to `loss` nats; None if it never did."""
    for (x0, y0), (x1, y1) in pairwise([points[0], *points]):
        if y1 <= loss:
            return x1 if y0 <= loss or y0 == y1 else x0 + (x1 - x0) * (y0 - loss) / (y0 - y1)
    return None
