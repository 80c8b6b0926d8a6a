"""The learning rate over a whole run as `growth-ds plan` shows it."""

from __future__ import annotations

import json

import pytest

from growth_ds.config_file import load_run, shipped
from growth_ds.optim.curve import BLOCKS, HEIGHT, MARGIN, WIDTH, curve, drawing
from growth_ds.optim.schedule import learning_rate
from tests.cli import growth_ds
from tests.optim.test_schedule import run


def test_a_short_run_has_every_step():
    some = run({"steps": 40}, {"steps": 20, "grow": {"to_peak": True, "rewarm": 3}}, lr=1e-3, warmup=10)
    record = curve(some)
    assert record["points"] == [[step, learning_rate(some, step)] for step in range(60)]
    assert record["stages"] == [
        {
            "first_step": 0,
            "steps": 40,
            "before": None,
            "first": learning_rate(some, 0),
            "highest": 1e-3,
            "last": learning_rate(some, 39),
        },
        {
            "first_step": 40,
            "steps": 20,
            "before": learning_rate(some, 39),
            "first": pytest.approx(2.5e-4),
            "highest": learning_rate(some, 43),
            "last": learning_rate(some, 59),
        },
    ]


@pytest.mark.parametrize("name", ["bert-base-stack", "bert-base-msg", "bert-large-compound", "demo"])
def test_a_long_run_has_its_ends_and_its_peaks(name):
    """The highest rate of each stage, over all its steps, to 1 %, from at most a hundred points."""
    planned = load_run(shipped(f"run/{name}.yaml"))
    record = curve(planned)
    assert all(rate == learning_rate(planned, step) for step, rate in record["points"])
    assert len(record["points"]) < 70 * len(planned.stages)
    for stage in record["stages"]:
        steps = range(stage["first_step"], stage["first_step"] + stage["steps"])
        assert stage["first"] == learning_rate(planned, steps[0])
        assert stage["last"] == learning_rate(planned, steps[-1])
        every = steps[:: max(1, len(steps) // 5000)]
        assert stage["highest"] >= 0.99 * max(learning_rate(planned, step) for step in every)


def test_the_drawing_is_the_curve():
    """A column is as high as its rate, in eighths of a line; the stages stand where they begin."""
    some = run(
        {"steps": 36}, {"steps": 36, "optim": {"lr": 5e-4}}, lr=1e-3, warmup=0.0, schedule="stage", decay="constant"
    )
    lines = drawing(curve(some))
    rows = [line.partition("|")[2].ljust(WIDTH) for line in lines[1 : 1 + HEIGHT]]
    assert rows[:3] == ["█" * 36 + " " * 36] * 3
    assert rows[3:] == ["█" * WIDTH] * 3
    marks = lines[2 + HEIGHT][len("          ") + 1 :]
    assert (marks.index("0"), marks.index("1")) == (0, 36)
    assert lines[-1] == "stage 1, from step 36: 0.0005, 0.001 before, highest 0.0005, last 0.0005"
    assert "".join(drawing(curve(some), "#")).isascii()


def test_a_falling_curve_falls_column_by_column():
    some = run({"steps": 720}, lr=1e-3, warmup=0.0)
    rows = [line.partition("|")[2].ljust(WIDTH) for line in drawing(curve(some))[1 : 1 + HEIGHT]]
    eighths = [sum(BLOCKS.find(row[column]) + 1 for row in rows) for column in range(WIDTH)]
    for column, height in enumerate(eighths):
        wanted = learning_rate(some, round(column * 719 / 71)) / 1e-3 * 8 * HEIGHT
        assert abs(height - wanted) <= 0.75, column


def test_plan_draws_and_lists_it(monkeypatch, capsys):
    path = shipped("run/bert-base-msg.yaml")
    result = growth_ds(monkeypatch, capsys, "plan", path)
    assert "learning rate\n" in result.out
    assert "stage 1, from step" in result.out
    record = json.loads(growth_ds(monkeypatch, capsys, "plan", path, "--json").out)
    assert record["lr"] == curve(load_run(path))


def test_a_narrow_terminal_gets_a_narrow_drawing():
    some = load_run(shipped("run/bert-large-stack.yaml"))
    lines = drawing(curve(some), room=60)
    wide = drawing(curve(some))
    assert max(len(line) for line in lines[: HEIGHT + 3]) == 60
    assert max(len(line) for line in wide[: HEIGHT + 3]) == WIDTH + MARGIN
    assert lines[HEIGHT + 3 :] == wide[HEIGHT + 3 :]
