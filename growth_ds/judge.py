"""Rank 0 measures and judges whether a stage ends now (`growth_ds.policy`), and all ranks go by its word."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from growth_ds.config import Run, Until
from growth_ds.correlation import engine_correlations, median_correlation
from growth_ds.engine import distributed
from growth_ds.engine.zero import ZeroEngine
from growth_ds.evaluate.mlm import Validation
from growth_ds.policy import Record, fires, is_due, measured, split_place, threshold_of


def _inside(order: Sequence[int]) -> Iterator[int]:
    """The depths that run the same stored layer as the one before."""
    return (depth for depth in range(1, len(order)) if order[depth - 1] == order[depth])


class Judge:
    """What was recorded so far, and what follows from it. Only rank 0 has records."""

    def __init__(self, run: Run, validation: Validation) -> None:
        self.validation = validation
        self.listens = any(stage.until is not None for stage in run.stages)
        """Whether anything is kept: a run without a policy has no use for it."""
        self.steps: list[Record] = []
        """Training steps."""
        self.measurements: list[Record] = []

    def read(self, records: Sequence[Record]) -> None:
        """Begin with the lines of a run's metrics."""
        self.steps, self.measurements = [], []
        for record in records:
            self.note(record)

    def note(self, record: Record) -> None:
        """One more line of the metrics."""
        if not self.listens:
            return
        if "loss" in record:
            self.steps.append(record)
        elif "policy" in record:
            self.measurements.append(record)

    def verdict(
        self, engine: ZeroEngine, run: Run, index: int, step: int, write: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any] | None:
        """The numbers that end stage `index` after step `step`, on every rank; None where it goes on. Collective.

        `write` gets the line of the metrics with what was measured, on rank 0.
        """
        until, (_, done) = run.stages[index].until, run.stage_at(step)
        if until is None or not is_due(until, done):
            return None
        if until.policy == "split":
            return self._split(engine, run, index, step, done, write)
        value = self._measured(engine, run, index, until)
        word: dict[str, Any] | None = None
        if value is not None and distributed.rank() == 0:
            place = {"step": step, "stage": index}
            recorded = any(place.items() <= each.items() for each in self.measurements)
            if not recorded:  # a run that goes on from here judges once more, and records nothing twice
                write({**place, "policy": until.policy, "value": value})
            values = [float(each["value"]) for each in self.measurements if each["stage"] == index]
            if fires(until, run, values):
                word = {"policy": until.policy, "values": values[-until.patience :], "steps": done}
                word["threshold"] = threshold_of(until, run)
        found: dict[str, Any] | None = distributed.broadcast_object(word)
        return found

    def at_end(
        self, engine: ZeroEngine, run: Run, index: int, step: int, write: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any] | None:
        """As `verdict`, when all steps of stage `index` are done: what must be decided for the next one. Collective."""
        stage = run.stages[index]
        if stage.until is None or stage.until.policy != "split":
            return None
        return self._split(engine, run, index, step, stage.total_steps, write, now=True)

    def _split(
        self, engine: ZeroEngine, run: Run, index: int, step: int, done: int, write: Callable[[dict[str, Any]], None],
        now: bool = False,
    ) -> dict[str, Any] | None:  # fmt: skip
        """Where a run of stage `index` is split after its `done` steps; `now`: at the lowest, if at no other place."""
        stage = run.stages[index]
        until, order = stage.until, stage.model.layer_order
        assert until is not None
        found = engine_correlations(engine, stage.model, next(self.validation.batches(stage.length)))
        lowest = split_place(order, [found], math.inf)
        word: dict[str, Any] | None = None
        if distributed.rank() == 0:
            place = {"step": step, "stage": index}
            value = math.nan if lowest is None else found[lowest - 1]
            if not any(place.items() <= each.items() for each in self.measurements):
                write({**place, "policy": until.policy, "value": value, "correlations": found})
            all_of_it = [each["correlations"] for each in self.measurements if each["stage"] == index]
            rows = all_of_it[-until.patience :]
            depth = None
            if len(rows) == until.patience:
                depth = split_place(order, rows, threshold_of(until, run))
            if depth is not None or now:
                word = {"policy": until.policy, "steps": done, "threshold": threshold_of(until, run)}
                word |= {"split": depth or lowest or next(_inside(order)), "below": depth is not None}
                word["correlations"] = rows
        decided: dict[str, Any] | None = distributed.broadcast_object(word)
        return decided

    def _measured(self, engine: ZeroEngine, run: Run, index: int, until: Until) -> float | None:
        if until.policy == "correlation":
            stage = run.stages[index]
            return median_correlation(engine, stage.model, next(self.validation.batches(stage.length)))
        return measured(until, run, index, self.steps) if distributed.rank() == 0 else None
