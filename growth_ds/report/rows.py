"""Typed rows out of a run folder: what the run is, its stages, its growth events. Pure reading; no formatting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from growth_ds.config import Model, Run
from growth_ds.errors import UserError
from growth_ds.model import cost

if TYPE_CHECKING:  # its import brings torch, which nothing here computes with
    from growth_ds.run_folder import RunFolder

Record = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """Where a run stands, or ended."""

    steps: int
    planned_steps: int
    tokens: int
    """Rows x length, over all stages."""
    flops: float
    """Useful training FLOPs."""
    seconds: float
    """Seconds spent in training steps."""
    parameters: int
    """Of the last model."""
    valid_loss: float | None
    """Nats, of the last validation; None before the first."""
    valid_accuracy: float | None
    """Fraction of masked tokens that are guessed right."""
    unigram_entropy: float | None
    """Nats of the validation text: the loss of guessing by token frequency alone."""
    store: str | None
    """Digest of the token store, which tells whether two runs were validated on the same text."""

    @property
    def finished(self) -> bool:
        """Whether the whole schedule is done."""
        return self.steps >= self.planned_steps


@dataclass(frozen=True)
class StageRow:
    """One stage that was entered."""

    index: int
    model: Model
    length: int
    """Tokens of one row."""
    batch: int
    """Rows of one optimizer step, over all ranks."""
    parameters: int
    steps: int
    tokens: int
    flops: float
    seconds: float
    share: float
    """Fraction of the run's FLOPs so far."""
    valid_loss: float | None
    """Nats, of the last validation in the stage."""


@dataclass(frozen=True)
class Change:
    """One size that a growth changed."""

    what: str
    old: int
    new: int
    recipe: str | None = None

    def text(self, arrow: str = "->") -> str:
        """`layer 2 -> 4 (tile)`."""
        return f"{self.what} {self.old} {arrow} {self.new}" + (f" ({self.recipe})" if self.recipe else "")


@dataclass(frozen=True)
class GrowthRow:
    """One growth: what changed, and the loss and accuracy on the same probe batch around it."""

    step: int
    stage: int
    """The stage that begins."""
    changes: tuple[Change, ...]
    exact: bool
    """Whether the plan said that the model computes the same function."""
    reasons: tuple[str, ...]
    """Why not, one for each axis."""
    moments: str
    loss_before: float
    """Nats."""
    loss_after: float
    accuracy_before: float
    accuracy_after: float
    seconds: float
    """Seconds that the growth took."""
    lag_loss: float | None = None
    """Nats on the probe batch `lag_steps` steps later."""
    lag_steps: int | None = None

    @property
    def delta(self) -> float:
        """Nats that the growth cost (positive) or gained."""
        return self.loss_after - self.loss_before


def metrics(folder: RunFolder) -> tuple[list[Record], list[Record]]:
    """The records of training steps and of validations, the final one of the ledger with them.

    Raises UserError if there is no training step.
    """
    records = folder.records(folder.metrics)
    train = [record for record in records if "loss" in record]
    if not train:
        raise UserError(f"{folder.metrics}: no training steps recorded; train the run before it is reported")
    checked = [record for record in records if "valid_loss" in record]
    last = checked[-1]["step"] if checked else -1
    ends = [record for record in events(folder, "finish") if "valid_loss" in record and record["step"] > last]
    return train, checked + ends[-1:]


def events(folder: RunFolder, kind: str) -> list[Record]:
    """The ledger records of one event."""
    return [record for record in folder.records(folder.ledger) if record.get("event") == kind]


def summary(folder: RunFolder) -> Summary:
    """What the run has reached. Raises UserError if the folder holds no run, or no training step."""
    run, (train, checked) = folder.run(), metrics(folder)
    last = train[-1]
    begin: Record = next(reversed(events(folder, "start")), {})
    valid: Record = checked[-1] if checked else {}
    return Summary(
        steps=last["step"],
        planned_steps=next((line["total_steps"] for line in reversed(events(folder, "policy"))), run.total_steps),
        tokens=last["tokens"],
        flops=last["flops"],
        seconds=last["seconds"],
        parameters=_entered(folder, run, last["stage"])["parameters"],
        valid_loss=valid.get("valid_loss"),
        valid_accuracy=valid.get("valid_accuracy"),
        unigram_entropy=begin.get("unigram_entropy"),
        store=begin.get("store"),
    )


def stage_rows(folder: RunFolder) -> list[StageRow]:
    """The stages that have training steps, in order."""
    run, (records, checked) = folder.run(), metrics(folder)
    ends = {record["stage"]: record for record in records}
    losses = {record["stage"]: record["valid_loss"] for record in checked}
    total = records[-1]["flops"]
    rows: list[StageRow] = []
    before: Mapping[str, float] = {"step": 0, "tokens": 0, "flops": 0, "seconds": 0.0}
    for index, end in sorted(ends.items()):
        entered = _entered(folder, run, index)
        spent = {key: end[key] - before[key] for key in before}
        rows.append(
            StageRow(
                index=index,
                model=Model.model_validate(entered["model"]),
                length=entered["length"],
                batch=entered["batch"],
                parameters=entered["parameters"],
                steps=int(spent["step"]),
                tokens=int(spent["tokens"]),
                flops=spent["flops"],
                seconds=spent["seconds"],
                share=spent["flops"] / total if total else 0.0,
                valid_loss=losses.get(index),
            )
        )
        before = {key: end[key] for key in before}
    return rows


def _entered(folder: RunFolder, run: Run, index: int) -> Record:
    """The ledger record of a stage, or the same facts out of the configuration where the ledger has none."""
    for record in reversed(events(folder, "stage")):
        if record["stage"] == index:
            return record
    stage = run.stages[index]
    return {
        "model": stage.model.model_dump(mode="json"),
        "parameters": cost.parameters(stage.model),
        "length": stage.length,
        "batch": stage.batch.global_,
    }


def growth_row(record: Record, lag: Record | None = None) -> GrowthRow:
    """A ledger record of a growth, and that of the probe some steps later, as a row."""
    changes = [Change(axis["axis"], axis["old"], axis["new"], axis["recipe"]) for axis in record["axes"]]
    old, new = record["length"]
    if old != new:
        changes.append(Change("length", old, new))
    return GrowthRow(
        step=record["step"],
        stage=record["stage"],
        changes=tuple(changes),
        exact=record["exact"],
        reasons=tuple(f"{axis['axis']}: {axis['reason']}" for axis in record["axes"] if axis.get("reason")),
        moments=record["moments"],
        loss_before=record["loss_before"],
        loss_after=record["loss_after"],
        accuracy_before=record["accuracy_before"],
        accuracy_after=record["accuracy_after"],
        seconds=record["seconds"],
        lag_loss=lag["loss"] if lag else None,
        lag_steps=lag["after_steps"] if lag else None,
    )


def growth_rows(folder: RunFolder) -> list[GrowthRow]:
    """The growth events, in order; empty for a run that trains one model."""
    lags = {record["stage"]: record for record in events(folder, "lag")}
    return [growth_row(record, lags.get(record["stage"])) for record in events(folder, "growth")]
