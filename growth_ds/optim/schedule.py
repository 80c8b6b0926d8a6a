"""The learning rate as a pure function of the step counter: a restart or a growth cannot shift it."""

from __future__ import annotations

import math

from growth_ds.config import Optim, Run


def shape(optim: Optim, step: int, total: int) -> float:
    """Learning rate over its peak in step `step` (from 0) of a schedule of `total` steps."""
    warmup = int(optim.warmup) if optim.warmup >= 1 else round(optim.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if optim.decay == "constant":
        return 1.0
    left = 1.0 - progress if optim.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.final + (1.0 - optim.final) * left


def learning_rate(run: Run, step: int) -> float:
    """The rate of optimizer step `step` (from 0), through all stages or within its own, as its stage says.

    A growth may move a schedule through all stages back (`grow.rewind`), for the rest of the run, and warm up to
    either kind's rate once more (`grow.rewarm`). The first stage is not grown into: neither acts there.
    """
    index, done = run.stage_at(step)
    stage = run.stages[index]
    rewarm = stage.grow.rewarm if index else 0
    warmth = (done + 1) / (rewarm + 1) if done < rewarm else 1.0
    if stage.optim.schedule == "stage":
        return stage.optim.lr * shape(stage.optim, done, stage.total_steps) * warmth
    back = sum(entered.grow.rewind for entered in run.stages[1 : index + 1] if entered.optim.schedule == "run")
    return stage.optim.lr * shape(stage.optim, max(0, step - back), run.total_steps) * warmth
