"""Runs of shared layers that are split while a run goes on (`until: split`, then `shared_runs: auto`).

Where a run is split is decided by gradients, so no configuration can say it. Until then a stage is planned with the
longest run cut in its middle: parameters, FLOPs and time do not depend on the place. What was decided is no part of
the configuration either: the digest of the run stays (`Run.identity`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from growth_ds.config.stage import Stage

if TYPE_CHECKING:
    from growth_ds.config.run import Run

AUTO = "auto"


def halved(runs: Sequence[int]) -> tuple[int, ...]:
    """The runs with the first of the longest cut in its middle. Raises ValueError where all are of one depth."""
    longest = max(runs, default=1)
    begin = sum(runs[: list(runs).index(longest)]) if runs else 0
    return split_at(runs, begin + longest // 2)


def split_at(runs: Sequence[int], depth: int) -> tuple[int, ...]:
    """The runs of which one is split so that a new one begins at `depth`. Raises ValueError where one begins there."""
    begin, found = 0, list[int]()
    for run in runs:
        inside = begin < depth < begin + run
        found += [depth - begin, begin + run - depth] if inside else [run]
        begin += run
    if len(found) == len(runs):
        raise ValueError(f"no run of {list(runs)} can be split before depth {depth}")
    return tuple(found)


def planned(number: int, given: Mapping[str, Any], before: Mapping[str, Any], until: Any) -> dict[str, Any]:
    """The keys of stage `number`'s `model:` block with `shared_runs: auto` as it is planned.

    `before`: all keys of the model before it, `until`: what ends the stage before it. Raises ValueError.
    """
    if given.get("shared_runs") != AUTO:
        return dict(given)
    runs, policy = before.get("shared_runs"), until.get("policy") if isinstance(until, Mapping) else until
    if number == 0 or policy != "split" or not isinstance(runs, (list, tuple)):
        raise ValueError(
            f"stages.{number}.model.shared_runs: auto splits a run of the stage before; give until: split there"
        )
    return {**given, "shared_runs": list(halved(runs))}


def check_splits(stages: Sequence[Stage]) -> None:
    """Raises ValueError for runs that contradict what is decided while the run goes on."""
    for number in range(1, len(stages)):
        model, before = stages[number].model, stages[number - 1].model
        where = f"stages.{number}.model.shared_runs"
        if _splits(stages[number - 1]):
            if model.layer_order != _order(halved(before.shared_runs or ())):
                raise ValueError(f"{where}: the stage before ends with a split; give auto")
        elif any(map(_splits, stages[:number])) and model.shares_layers and model.layer_order != before.layer_order:
            raise ValueError(f"{where}: where runs were split is decided in the run; keep them, or give stored_layers")


def with_splits(run: Run, splits: Mapping[int, int]) -> Run:
    """The run whose stages end with these splits (stage index -> depth, from 0, at which a new run begins), and which
    is planned as before where none was decided. The same run by its digest."""
    stages = list(run.stages)
    for index in range(1, len(stages)):
        stage, before = run.stages[index], stages[index - 1].model.shared_runs
        if _splits(run.stages[index - 1]) and before is not None:
            place = splits.get(index - 1)
            stages[index] = stage.sharing(halved(before) if place is None else split_at(before, place))
        elif stage.model.shared_runs == run.stages[index - 1].model.shared_runs and before is not None:
            stages[index] = stage.sharing(before)
    return run.model_copy(update={"stages": tuple(stages)})


def _splits(stage: Stage) -> bool:
    return stage.until is not None and stage.until.policy == "split"


def _order(runs: Sequence[int]) -> list[int]:
    return [stored for stored, run in enumerate(runs) for _ in range(run)]
