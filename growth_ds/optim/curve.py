"""The learning rate over a whole run, before it starts: points, what each stage begins and ends with, and a drawing.

Rates are those of the schedule (`growth_ds.optim.schedule`); multipliers of single tensors after a growth
(`grow.lr`) come on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from growth_ds.config import Run
from growth_ds.optim.schedule import learning_rate, moved_back, warmup_steps

POINTS = 64
"""Steps of a stage at which the rate is taken; of a shorter stage every one."""
BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH, HEIGHT = 72, 6
"""Columns, at the most, and lines of the drawing."""
MARGIN = 11
"""Columns to its left."""


def curve(run: Run) -> dict[str, Any]:
    """JSON values:

    points    [[step, rate], ...], steps from 0, the first and the last of every stage among them
    stages    for each: first_step, steps; the rate in its first step (`first`) and in its last (`last`); in the
              step before it (`before`, null for stage 0); the highest of its points (`highest`)
    """
    points: list[tuple[int, float]] = []
    stages: list[dict[str, Any]] = []
    begin = 0
    for stage in run.stages:
        count = stage.total_steps
        wanted = {begin + place * (count - 1) // max(1, min(POINTS, count) - 1) for place in range(min(POINTS, count))}
        wanted |= {begin + step for step in _turns(run, begin) if 0 <= step < count}
        own = [(step, learning_rate(run, step)) for step in sorted(wanted)]
        record = {"first_step": begin, "steps": count, "before": points[-1][1] if points else None}
        stages.append({**record, "first": own[0][1], "highest": max(rate for _, rate in own), "last": own[-1][1]})
        points += own
        begin += count
    return {"points": [list(point) for point in points], "stages": stages}


def _turns(run: Run, begin: int) -> Iterable[int]:
    """Steps, counted from `begin` of a stage, at which a warm-up of it ends."""
    index, _ = run.stage_at(begin)
    stage = run.stages[index]
    own = stage.optim.schedule == "stage"
    end = warmup_steps(stage.optim, stage.total_steps if own else run.total_steps)
    end += 0 if own else moved_back(run, index) - begin
    return (end - 1, end, stage.grow.rewarm if index else 0)


def drawing(record: Mapping[str, Any], blocks: str = BLOCKS, room: int = WIDTH + MARGIN) -> list[str]:
    """Lines of text: the curve from step 0 to the last, the stages where they begin, and their rates.

    `blocks`: characters from the lowest to the full height of a line; one will do. `room`: columns of the terminal.
    """
    stages = record["stages"]
    total = stages[-1]["first_step"] + stages[-1]["steps"]
    width = max(1, min(WIDTH, room - MARGIN, total))
    top = max(rate for _, rate in record["points"])
    heights = [_at(record["points"], column * (total - 1) / max(1, width - 1)) / top for column in range(width)]
    lines = ["learning rate"]
    for line in reversed(range(HEIGHT)):
        label = f"{top * (line + 1) / HEIGHT:.2e}"
        lines.append(f"{label:>9} |" + "".join(_cell(height * HEIGHT - line, blocks) for height in heights).rstrip())
    marks = [" "] * width
    for number, stage in reversed(list(enumerate(stages))):
        place = stage["first_step"] * width // total
        marks[place : place + len(str(number))] = str(number)
    lines += [f"{'0':>9} +" + "-" * width, f"{'stage':>9}  " + "".join(marks)[:width].rstrip()]
    for number, stage in enumerate(stages):
        before = "" if stage["before"] is None else f", {stage['before']:.3g} before"
        lines.append(
            f"stage {number}, from step {stage['first_step']:,}: {stage['first']:.3g}{before}, highest "
            f"{stage['highest']:.3g}, last {stage['last']:.3g}"
        )
    return lines


def _at(points: Iterable[tuple[int, float]], step: float) -> float:
    """The rate at a step, on the line between the two points around it."""
    before: tuple[int, float] | None = None
    for here, rate in points:
        if here >= step:
            if before is None or here == step:
                return rate
            return before[1] + (rate - before[1]) * (step - before[0]) / (here - before[0])
        before = (here, rate)
    assert before is not None
    return before[1]


def _cell(height: float, blocks: str) -> str:
    """One line's part of a column that is so many lines high above the line's foot."""
    eighths = min(len(blocks), round(height * len(blocks)))
    return blocks[eighths - 1] if eighths > 0 else " "
