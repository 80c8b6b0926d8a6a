"""The slowest rank."""

from __future__ import annotations

import time

import pytest

from growth_ds.engine.pace import Pace
from growth_ds.stragglers import compared, report, sentence


def test_the_slowest_is_named_with_its_host_and_why():
    rows = [[0.1, 1.0, "n1"], [0.1, 1.1, "n1"], [0.1, 1.0, "n2"], [2.0, 1.0, "n2"]]
    found = compared(rows, steps=10)
    assert (found["slowest_rank"], found["slowest_host"]) == (3, "n2")
    assert found["slowest_s"] == pytest.approx(0.3)
    assert found["median_s"] == pytest.approx(0.115)
    assert found["slowest_ratio"] == pytest.approx(3.0 / 1.15, rel=1e-3)
    assert sentence(found) == "rank 3 on n2 waits for its data: 2.61 times the median of the ranks (300.0 ms a step)"
    rows[3] = [0.1, 2.0, "n2"]
    assert "computes slowly" in str(sentence(compared(rows, 10)))


def test_even_ranks_are_not_spoken_of():
    assert sentence(compared([[0.0, 1.0, "n1"], [0.0, 1.15, "n1"]], 1)) is None
    assert compared([[0.0, 0.0, "n1"]] * 2, 1)["slowest_ratio"] == 1.0


def test_pace_counts_data_and_forwards_apart(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    pace = Pace()
    for _ in pace.waiting(iter("ab")):  # a second for each look, and one for the end
        with pace.forward():
            pass
    assert pace.take() == (3.0, 2.0)
    assert pace.take() == (0.0, 0.0)


def test_one_rank_reports_nothing_and_forgets():
    pace = Pace()
    with pace.forward():
        pass
    assert report(pace, steps=2) is None
    assert pace.steps == 1
    assert report(pace, steps=2) is None
    assert (pace.steps, pace.take()) == (0, (0.0, 0.0))
