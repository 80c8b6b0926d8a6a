"""Values of units without a source: tables (parameter name pattern -> value), read for each tensor and side.

A value is a sum of terms: `mean` (the mean of all old units), `init` (the parameter's own initialisation: a normal
draw for matrices, 1 for norm weights, 0 for biases), `init*0.1`, and plain numbers: `mean+init*0.1`, `mean-10`, `0`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

Table = tuple[tuple[str, str], ...]
_TERM = re.compile(r"([+-]?)\s*(?:(mean|init)(?:\*(\d+(?:\.\d*)?))?|(\d+(?:\.\d*)?))\s*")


@dataclass(frozen=True)
class Fill:
    """mean * (mean of the old units) + init * (own initialisation) + constant."""

    mean: float = 0.0
    init: float = 0.0
    constant: float = 0.0

    @property
    def order(self) -> int:
        """Where two axes are fresh the higher order counts: constants over draws over means."""
        return 0 if self.mean else 1 if self.init else 2


@cache
def parse_fill(text: str) -> Fill:
    """Read a value. Raises ValueError if it is not of the form above."""
    totals = {"mean": 0.0, "init": 0.0, "constant": 0.0}
    position = 0
    for match in _TERM.finditer(text):
        if match.start() != position or (position and not match[1]):
            break
        sign = -1.0 if match[1] == "-" else 1.0
        totals[match[2] or "constant"] += sign * float(match[4] or match[3] or 1.0)
        position = match.end()
    if not text or position != len(text):
        raise ValueError(f"value {text!r} of a fresh unit is not a sum of mean, init and numbers")
    return Fill(**totals)


@dataclass(frozen=True)
class Fresh:
    """The first row whose pattern fits a parameter's name counts; layers are `layers.{layer}.up.weight` and so on."""

    made: Table = (("*", "init"),)
    """Where the tensor makes the fresh unit."""
    read: Table = (("*", "0"),)
    """Where it reads the fresh unit: 0 keeps the function, whatever the unit computes."""

    def __post_init__(self) -> None:
        for _, value in (*self.made, *self.read):
            parse_fill(value)

    def fill(self, pattern: str, split: bool) -> Fill:
        """The value for one parameter (its name in the layout) on one side. Raises ValueError without a row."""
        for glob, value in self.read if split else self.made:
            if fnmatchcase(pattern, glob):
                return parse_fill(value)
        raise ValueError(f"no row says what fresh units of '{pattern}' are filled with")

    def to_json(self) -> list[list[list[str]]]:
        """The two tables as lists."""
        return [[list(row) for row in table] for table in (self.made, self.read)]
