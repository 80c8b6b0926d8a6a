"""`growth-ds train --until`: a part of a run, so that its stages and growths can be jobs of different sizes.

    0:end      until stage 0 is trained and saved
    1:start    until stage 1 is entered: the growth into it is made, verified and saved

The same command without it, or with a later part, goes on from there, on any number of ranks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from growth_ds.errors import UserError

_FORM = re.compile(r"([0-9]+):(start|end)")


@dataclass(frozen=True)
class Part:
    """Where to leave off; stages are counted from 0."""

    stage: int
    at_end: bool

    def is_over(self, index: int, entered: bool) -> bool:
        """Whether nothing of it is left at stage `index`, before or after that was entered."""
        return index > self.stage or (entered and index == self.stage and not self.at_end)

    def __str__(self) -> str:
        return f"stage {self.stage} is {'trained' if self.at_end else 'entered'}"


def part_of(text: str | None, stages: int) -> Part | None:
    """What `--until` says of a run of so many stages; None where it says nothing. Raises UserError."""
    if text is None:
        return None
    found = _FORM.fullmatch(text)
    if not found:
        raise UserError(f"--until: '{text}' is neither STAGE:end nor STAGE:start; give for example 0:end or 1:start")
    part = Part(int(found[1]), found[2] == "end")
    if part.stage >= stages or (part.stage == 0 and not part.at_end):
        last = stages - 1
        raise UserError(f"--until: {text}: the run has stages 0 to {last}; give 0:end to {last}:end, or 1:start and on")
    return part
