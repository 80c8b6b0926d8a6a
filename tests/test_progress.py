"""What is printed while a run goes on: plain lines, and a terminal's view."""

from __future__ import annotations

import io
import sys

import pytest

from growth_ds.progress import Progress, clock, sparkline
from tests.report.runs import make_run

SIZES = ((2, 64, 128, 64), (4, 64, 256, 64))


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


def follow(progress: Progress, steps: int = 40) -> None:
    progress.weigh([1.0, 3.0])
    for step in range(1, steps + 1):
        if step == 21:
            progress.say("step 20: grew [layers]")
        progress.step(step, 5.0 - step / 20, tokens=1000, seconds=1.0 if step <= 20 else 3.0)
    progress.close()


def test_plain_lines_have_stage_loss_speed_and_time_left(capsys):
    follow(Progress(make_run("run", 20, SIZES), live=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 10/40  stage 1/2  loss ")
    assert lines[0].endswith("1,000 tokens/s  ETA 1:10")  # 10 steps of a second, 20 of three
    assert lines[2] == "step 20: grew [layers]"
    assert lines[-1].startswith("step 40/40  stage 2/2")
    assert lines[-1].endswith("ETA 0:00")


def test_other_ranks_say_nothing(capsys):
    follow(Progress(make_run("run", 20, SIZES), live=False))
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_stage_run_and_curve(monkeypatch: pytest.MonkeyPatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    follow(Progress(make_run("run", 20, SIZES), live=True), steps=30)
    shown = screen.getvalue()
    assert "step 20: grew [layers]" in shown, "square brackets are no markup"
    last = shown[shown.rindex("stage 2/2") :]
    assert "10/20" in last
    assert "30/40" in last
    assert last.count("ETA 0:30") == 2, "the last stage ends with the run"
    assert "█" in last


def test_sparkline():
    assert sparkline([0.0, 0.5, 1.0], 0.0, 1.0) == "▁▅█"
    assert sparkline([2.0, 2.0], 2.0, 2.0) == "▁▁"


def test_clock():
    assert [clock(seconds) for seconds in (5, 125, 3723)] == ["0:05", "2:05", "1:02:03"]


def test_a_narrow_terminal_keeps_the_newest_losses(monkeypatch: pytest.MonkeyPatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    follow(Progress(make_run("run", 20, SIZES), live=True))
    last = next(line for line in reversed(screen.getvalue().splitlines()) if "tokens/s" in line)
    assert "…" not in last
    assert last.rstrip().endswith("▁"), "the loss falls, so the newest is the lowest"
