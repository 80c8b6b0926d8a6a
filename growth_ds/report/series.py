"""The curves of a run as numbers: what was logged, smoothed within each stage, thinned to what a picture can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

from growth_ds.report.rows import GrowthRow, Record, growth_rows, metrics

if TYPE_CHECKING:  # its import brings torch, which nothing here computes with
    from growth_ds.run_folder import RunFolder

WINDOWS_PER_RUN = 50
"""A smoothed value is the mean of about 1/50 of the run: past the noise of batches, but no dip is hidden."""
NARROWEST = 9
"""Steps that are smoothed over at least: in a short run 1/50 would smooth nothing."""
POINTS = 400
"""Points that are drawn of one line: about one for each pixel of a panel."""


@dataclass(frozen=True)
class Growth:
    """A growth event, and where it lies on each axis of a plot."""

    row: GrowthRow
    at: dict[str, float]
    """`step`, `flops`, `tokens` or `seconds` -> value when it happened."""

    def label(self, most: int = 2) -> str:
        """`layer 2→4, ffn 256→512 +1`: the first changes, and how many more."""
        parts = [f"{change.what} {change.old}→{change.new}" for change in self.row.changes]
        more = f" +{len(parts) - most}" if len(parts) > most else ""
        return ", ".join(parts[:most]) + more


@dataclass(frozen=True)
class Curve:
    """What one run logged."""

    name: str
    train: list[Record]
    valid: list[Record]
    growths: list[Growth]
    _smoothed: dict[str, list[float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def logged(self, key: str) -> list[float]:
        """One quantity of the training steps; NaN where a step has none."""
        return [_number(record.get(key)) for record in self.train]

    def smoothed(self, key: str) -> list[float]:
        """The same, smoothed; a stage never leaks into the next, so a jump at a growth stays a jump."""
        if key not in self._smoothed:  # every panel asks for it, and a long run has 10⁶ steps
            self._smoothed[key] = self._smooth(key)
        return self._smoothed[key]

    def _smooth(self, key: str) -> list[float]:
        width = max(NARROWEST, len(self.train) // WINDOWS_PER_RUN)
        result: list[float] = []
        for _, records in groupby(self.train, key=lambda record: record["stage"]):
            result.extend(smooth([_number(record.get(key)) for record in records], width))
        return result


def read_curve(name: str, folder: RunFolder) -> Curve:
    """The curves of a run. Raises UserError if it has no training step."""
    (train, valid), growths = metrics(folder), []
    by_step = {record["step"]: record for record in train}
    for row in growth_rows(folder):
        record = by_step.get(row.step)
        if record is not None:
            growths.append(Growth(row, {key: float(record[key]) for key in ("step", "flops", "tokens", "seconds")}))
    return Curve(name, train, valid, growths)


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The value at each point of the straight line through its `width` neighbours; what is not finite counts as absent.

    Inside, that is the moving mean; at the ends, where neighbours are on one side only, the line keeps the slope.
    """
    present = [(x, y) if math.isfinite(y) else None for x, y in enumerate(values)]
    sums = [
        [0.0, *accumulate(term(*point) if point else 0.0 for point in present)]
        for term in (lambda x, y: 1.0, lambda x, y: x, lambda x, y: y, lambda x, y: x * x, lambda x, y: x * y)
    ]
    half, result = width // 2, []
    for index in range(len(values)):
        low, high = max(0, index - half), min(len(values), index + half + 1)
        n, x, y, xx, xy = (total[high] - total[low] for total in sums)
        spread = n * xx - x * x
        slope = (n * xy - x * y) / spread if spread > 0 else 0.0
        result.append((y + slope * (n * index - x)) / n if n else math.nan)
    return result


def thinned(*lines: Sequence[float], points: int = POINTS) -> list[list[float]]:
    """At most about `points` of each line, evenly, first and last kept."""
    length = len(lines[0])
    stride = max(1, math.ceil(length / points))
    indices = sorted({*range(0, length, stride), length - 1}) if length else []
    return [[line[index] for index in indices] for line in lines]


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
