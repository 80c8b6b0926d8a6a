"""When to grow: what is measured for each policy of `until:`, and when it ends the stage.

Rank 0 measures and judges, all ranks agree, every number is recorded in `metrics.jsonl`; the decision stands in the
ledger and in the facts of every later checkpoint. What is measured depends on recorded numbers and weights alone (but
for `time`), so a run that goes on from an older checkpoint decides at the same step again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from growth_ds.config import Run, Stage, Until
from growth_ds.config.splits import with_splits
from growth_ds.model import cost
from growth_ds.planning import stage_flops

Record = Mapping[str, Any]
"""A line of `metrics.jsonl`."""


def is_due(until: Until | None, done: int) -> bool:
    """Whether something is measured when `done` steps of the stage are done."""
    return until is not None and done > until.after and done % until.every == 0


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of loss against the natural logarithm of FLOPs: nats per e-fold of compute."""
    x = [math.log(flops) for flops, _ in points]
    y = [loss for _, loss in points]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    spread = math.fsum((each - mean_x) ** 2 for each in x)
    return math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def fall(losses: Sequence[float]) -> float:
    """Nats by which the mean of the second half lies below that of the first."""
    half = len(losses) // 2
    return math.fsum(losses[:half]) / half - math.fsum(losses[-half:]) / half


def g_stack_tokens(parameters: int, flops: float) -> float:
    """Tokens after which G_stack stacks: log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74 (arXiv 2405.15319, eq. 5).

    `parameters` N of the last model, `flops` C of the whole run. It was fitted on decoders of 410M to 3B.
    """
    return float(10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74))


def measured(until: Until, run: Run, index: int, records: Sequence[Record]) -> float | None:
    """The number of a policy that needs nothing but the recorded training steps; None when there are too few of them,
    or one has no finite loss.

    `records`: all training steps of the run so far, the last one at its present step.
    """
    if until.policy == "time":
        return float(records[-1]["seconds"])
    if until.policy == "g-stack":
        return float(records[-1]["tokens"])
    wanted = until.window if until.policy == "slope" else 2 * until.window
    own = [record for record in records if record["stage"] == index][-wanted:]
    if len(own) < wanted or not all(math.isfinite(record["loss"]) for record in own):
        return None
    if until.policy == "slope":
        return slope([(float(record["flops"]), float(record["loss"])) for record in own])
    return fall([float(record["loss"]) for record in own])


def threshold_of(until: Until, run: Run) -> float:
    """What the measured number is compared with."""
    if until.policy == "time":
        return until.seconds or 0.0
    if until.policy == "g-stack":
        flops = sum(stage.total_steps * stage_flops(run, stage) for stage in run.stages)
        return g_stack_tokens(cost.parameters(run.stages[-1].model), flops)
    assert until.threshold is not None
    return until.threshold


def fires(until: Until, run: Run, values: Sequence[float]) -> bool:
    """Whether the last `patience` measurements of the stage agree that it is to end."""
    last = values[-until.patience :]
    if len(last) < until.patience:
        return False
    bound = threshold_of(until, run)
    below = until.policy in ("plateau", "correlation")
    return all(value < bound if below else value >= bound for value in last)


def split_place(order: Sequence[int], measured: Sequence[Sequence[float]], threshold: float) -> int | None:
    """The depth, from 0, at which a new run is to begin; None where no run is to be split.

    `order`: the stored layer of each depth; `measured`: correlations of the gradients of depths i and i + 1, one list
    for each measurement. Of the places where two depths share a layer and all measurements lie below the threshold, the
    one with the lowest last (SWE-M: Yang et al., arXiv 2110.03848, section 3.3).
    """
    last = measured[-1]
    below = [
        place
        for place in range(1, len(order))
        if order[place - 1] == order[place] and all(each[place - 1] < threshold for each in measured)
    ]
    return min(below, key=lambda place: last[place - 1], default=None)


def with_ends(run: Run, ends: Mapping[int, int], splits: Mapping[int, int] | None = None) -> Run:
    """The run whose stages ended after so many steps (stage index -> steps), its last stage longer where `rest: last`,
    and which go on with runs of shared layers split at these depths (stage index -> depth).

    The same run as before by its digest: what was decided is no part of its configuration.
    """
    stages: list[Stage] = list(run.stages)
    left = 0
    for index, steps in sorted(ends.items()):
        stage = run.stages[index]
        if stage.until is not None and stage.until.rest == "last" and index + 1 < len(stages):
            left += (stage.total_steps - steps) * stage_flops(run, stage)
        stages[index] = stage.lasting(steps)
    last = len(stages) - 1
    more = left // stage_flops(run, stages[last])
    if more and last not in ends:
        stages[last] = stages[last].lasting(stages[last].total_steps + more)
    return with_splits(run.model_copy(update={"stages": tuple(stages)}), splits or {})
