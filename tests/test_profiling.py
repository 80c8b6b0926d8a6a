"""Traces of steps."""

from __future__ import annotations

import json

import pytest
import torch

from growth_ds.config import Log
from growth_ds.profiling import StepProfiler
from tests.test_board import run_with


def steps(profiler: StepProfiler, numbers: range) -> None:
    for number in numbers:
        with profiler.step(number), torch.profiler.record_function(f"number-{number}"):
            torch.ones(2) + 1
    profiler.close()


def names(profiler: StepProfiler) -> set[str]:
    events = json.loads(profiler.path.read_text())["traceEvents"]
    return {event["name"] for event in events if event.get("name", "").startswith("number-")}


def test_the_named_steps_are_traced(tmp_path):
    profiler = StepProfiler(Log(profile="2:4"), tmp_path, rank=1)
    steps(profiler, range(6))
    assert profiler.path == tmp_path / "profile" / "steps-2-4-rank-1.json"
    assert names(profiler) == {"number-2", "number-3"}


def test_a_run_that_begins_or_ends_within_them_traces_what_it_has(tmp_path):
    profiler = StepProfiler(Log(profile="2:6"), tmp_path, rank=0)
    steps(profiler, range(4, 5))
    assert names(profiler) == {"number-4"}


def test_nothing_is_written_without_it_or_outside(tmp_path):
    steps(StepProfiler(Log(), tmp_path, rank=0), range(3))
    steps(StepProfiler(Log(profile="5:6"), tmp_path, rank=0), range(3))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path, capsys):
    (tmp_path / "profile").write_text("a file")
    steps(StepProfiler(Log(profile="0:1"), tmp_path, rank=0), range(2))
    assert "trace not written" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["3", "4:4", "5:2", "a:b", "-1:2"])
def test_no_steps_are_refused(value):
    with pytest.raises(ValueError, match="profile"):
        run_with(profile=value)
