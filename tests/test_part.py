"""`--until`: what it takes, and when its part is over. What it trains: tests/distributed/cases_runs.py."""

from __future__ import annotations

import pytest

from growth_ds.errors import UserError
from growth_ds.part import Part, part_of


@pytest.mark.parametrize(
    ("text", "stage", "at_end", "before", "inside"),
    [
        ("0:end", 0, True, [False, True, True], [False, True, True]),
        ("1:start", 1, False, [False, False, True], [False, True, True]),
        ("2:end", 2, True, [False, False, False], [False, False, False]),
    ],
)
def test_a_part_is_over(text, stage, at_end, before, inside):
    part = part_of(text, 3)
    assert part == Part(stage, at_end)
    assert [part.is_over(index, entered=False) for index in range(3)] == before
    assert [part.is_over(index, entered=True) for index in range(3)] == inside


def test_nothing_said_is_the_whole_run():
    assert part_of(None, 3) is None


@pytest.mark.parametrize("text", ["", "1", "end", "1:middle", "-1:end", "3:end", "0:start", "1:end "])
def test_what_cannot_be_is_refused(text):
    with pytest.raises(UserError, match=r"--until: .*; give "):
        part_of(text, 3)
