"""The learning rate as a pure function of the step counter: a restart or a growth cannot shift it."""

from __future__ import annotations

import math
from itertools import pairwise

from growth_ds.config import Optim, Run


def shape(optim: Optim, step: int, total: int) -> float:
    """Learning rate over its peak in step `step` (from 0) of a schedule of `total` steps."""
    warmup = warmup_steps(optim, total)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if optim.decay == "constant":
        return 1.0
    left = 1.0 - progress if optim.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.final + (1.0 - optim.final) * left


def warmup_steps(optim: Optim, total: int) -> int:
    """Steps of the warm-up of a schedule of `total` steps."""
    return int(optim.warmup) if optim.warmup >= 1 else round(optim.warmup * total)


def moved_back(run: Run, index: int) -> int:
    """Steps by which growths have moved a schedule through all stages back when stage `index` runs.

    `grow.rewind` adds to them; `grow.to_peak` makes them so many that the growth stands where the warm-up ends, if it
    is not before that.
    """
    back = first = 0
    for before, entered in pairwise(run.stages[: index + 1]):
        first += before.total_steps
        if entered.optim.schedule == "run":
            back += entered.grow.rewind
            if entered.grow.to_peak:
                back = max(back, first - warmup_steps(entered.optim, run.total_steps))
    return back


def learning_rate(run: Run, step: int) -> float:
    """The rate of optimizer step `step` (from 0), through all stages or within its own, as its stage says.

    A growth may move a schedule through all stages back (`grow.rewind`, `grow.to_peak`), for the rest of the run, and
    warm up to either kind's rate once more (`grow.rewarm`). The first stage is not grown into: none acts there.
    """
    index, done = run.stage_at(step)
    stage = run.stages[index]
    rewarm = stage.grow.rewarm if index else 0
    warmth = (done + 1) / (rewarm + 1) if done < rewarm else 1.0
    if stage.optim.schedule == "stage":
        return stage.optim.lr * shape(stage.optim, done, stage.total_steps) * warmth
    moved = max(0, step - moved_back(run, index))
    return stage.optim.lr * shape(stage.optim, moved, run.total_steps) * warmth
