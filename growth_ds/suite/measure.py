"""What a run took to reach the from-scratch loss, read from the two run folders. A pure function of their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from growth_ds.report.compare import flops_to_reach, points_of
from growth_ds.report.rows import Record, events
from growth_ds.report.series import Curve, read_curve
from growth_ds.run_folder import RunFolder


@dataclass(frozen=True)
class Finished:
    """A run that is done: its curve, and its costs at any FLOP count."""

    curve: Curve
    growth_seconds: tuple[tuple[int, float], ...]
    """(step, seconds that the growth there took): no training step, but part of the price."""
    text: str
    """Digest of the text."""
    start: str | None = None
    """Digest of the checkpoint whose weights it began with."""

    @property
    def final_loss(self) -> float:
        """Nats on the validation split at the end."""
        return float(self.curve.valid[-1]["valid_loss"])

    @property
    def flops(self) -> float:
        """Useful training FLOPs of the whole run."""
        return float(self.curve.train[-1]["flops"])

    def at(self, flops: float) -> dict[str, float]:
        """{"seconds", "tokens"} when so many FLOPs were spent, between two steps by a straight line."""
        before: Record = {"flops": 0.0, "seconds": 0.0, "tokens": 0, "step": 0}
        after = self.curve.train[-1]
        for record in self.curve.train:
            if record["flops"] >= flops:
                after = record
                break
            before = record
        span = after["flops"] - before["flops"]
        part = (flops - before["flops"]) / span if span else 0.0
        spent = {key: before[key] + part * (after[key] - before[key]) for key in ("seconds", "tokens")}
        spent["seconds"] += sum(seconds for step, seconds in self.growth_seconds if step <= before["step"])
        return spent


def finished(folder: RunFolder) -> Finished | None:
    """The run in a folder; None where it is not at its end, last checkpoint included, or nothing of it is there."""
    ends = events(folder, "finish") if folder.config.is_file() else []
    if not ends or not folder.checkpoint_path(ends[-1]["step"], ends[-1]["stage"]).is_dir():
        return None
    growths = tuple((record["step"], float(record["seconds"])) for record in events(folder, "growth"))
    start = next(iter(events(folder, "start")), {"store": ""})
    return Finished(read_curve(folder.path.name, folder), growths, str(start["store"]), start.get("start"))


def record_of(method: str, seed: int, budget: float, run: Finished, scratch: Finished) -> dict[str, Any]:
    """One row of the comparison. Ratios are None for a run that never came down to the from-scratch loss."""
    reached = flops_to_reach(points_of(run.curve), scratch.final_loss)
    ratios: dict[str, float | None] = dict.fromkeys(("flops_ratio", "seconds_ratio", "tokens_ratio"))
    if reached is not None:
        there, end = run.at(reached), scratch.at(scratch.flops)
        ratios = {
            "flops_ratio": round(reached / scratch.flops, 4),
            "seconds_ratio": round(there["seconds"] / end["seconds"], 4),
            "tokens_ratio": round(there["tokens"] / end["tokens"], 4),
        }
    spent = run.at(run.flops)
    return {
        "method": method,
        "seed": seed,
        "budget": budget,
        **ratios,
        "final_loss": run.final_loss,
        "final_loss_scratch": scratch.final_loss,
        "tokens": int(spent["tokens"]),
        "flops": run.flops,
        "seconds": round(spent["seconds"], 3),
        "growths": [growth.label(most=9) for growth in run.curve.growths],
    }


def failed_record(method: str, seed: int, budget: float, why: str) -> dict[str, Any]:
    """The row of a run that ended by an error."""
    empty = dict.fromkeys(("flops_ratio", "seconds_ratio", "tokens_ratio", "final_loss", "final_loss_scratch"))
    return {"method": method, "seed": seed, "budget": budget, **empty, "failed": why}


@dataclass(frozen=True)
class Summary:
    """One method over its seeds."""

    method: str
    seeds: int
    reached: int
    """Seeds with which it came down to the from-scratch loss."""
    flops: tuple[float, float, float] | None
    """Median, least and most of the FLOP ratio; None where fewer than half of the seeds reached the loss."""
    seconds: tuple[float, float, float] | None
    difference: tuple[float, float, float] | None
    """Nats of the final loss above (positive) or below the from-scratch one."""


def summaries(records: Sequence[dict[str, Any]]) -> list[Summary]:
    """One for each method, in the order of the records."""
    names = list(dict.fromkeys(record["method"] for record in records))
    return [_summary(name, [record for record in records if record["method"] == name]) for name in names]


def _summary(name: str, rows: list[dict[str, Any]]) -> Summary:
    apart = [row["final_loss"] - row["final_loss_scratch"] for row in rows if row["final_loss"] is not None]
    return Summary(
        name,
        len(rows),
        sum(row["flops_ratio"] is not None for row in rows),
        _spread([row["flops_ratio"] for row in rows]),
        _spread([row["seconds_ratio"] for row in rows]),
        (median(apart), min(apart), max(apart)) if apart else None,
    )


def _spread(values: Sequence[float | None]) -> tuple[float, float, float] | None:
    """A seed that never reached the loss counts as infinitely dear."""
    dear = [float("inf") if value is None else value for value in values]
    middle = median(dear)
    return None if middle == float("inf") else (middle, min(dear), max(dear))
