"""Tables for the terminal. They print what was measured, whichever way it falls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from growth_ds.report import units
from growth_ds.report.rows import (
    Change,
    GrowthRow,
    StageRow,
    Summary,
    growth_row,
    growth_rows,
    stage_rows,
    summary,
)

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Change",
    "GrowthRow",
    "StageRow",
    "Summary",
    "comparison_table",
    "growth_line",
    "growth_row",
    "growth_rows",
    "growth_table",
    "stage_rows",
    "stage_table",
    "summary",
]


def growth_line(record: dict[str, Any]) -> str:
    """A growth record of the ledger in two plain lines: what grew; the probe around it and what the plan promised."""
    row = growth_row(record)
    grown = ", ".join(change.text() for change in row.changes) or "no size"
    promise = "exact by plan" if row.exact else f"not exact by plan ({'; '.join(row.reasons) or 'no reason given'})"
    return (
        f"growth at step {row.step}, stage {row.stage - 1} -> {row.stage}: {grown}; moments {row.moments}\n"
        f"  probe loss {row.loss_before:.4f} -> {row.loss_after:.4f} ({units.difference(row.delta, 4)}), "
        f"accuracy {units.percent(row.accuracy_before)} -> {units.percent(row.accuracy_after)}; {promise}"
    )


def comparison_table(rows: Sequence[tuple[str, Summary]]) -> Table:
    """One line for each run, then the unigram entropy; differences are to the first run, lower is better."""
    headings = ("run", "valid loss", "to the first", "accuracy", "parameters", "steps", "tokens", "FLOPs", "time")
    table = _table("Final validation (losses in nats)", headings)
    first = rows[0][1].valid_loss if rows else None
    for name, run in rows:
        steps = units.count(run.steps) if run.finished else f"{run.steps:,} of {run.planned_steps:,}"
        table.add_row(
            _plain(name),
            units.nats(run.valid_loss),
            NOTHING if run is rows[0][1] else units.difference(_minus(run.valid_loss, first)),
            units.percent(run.valid_accuracy),
            units.count(run.parameters),
            steps,
            units.count(run.tokens),
            units.plain_flops(run.flops),
            units.duration(run.seconds),
        )
    table.add_section()
    for entropy in distinct_entropies([run for _, run in rows]):
        table.add_row("unigram entropy", units.nats(entropy), units.difference(_minus(entropy, first)))
    return table


NOTHING = ""
"""A run is not compared with itself."""


def distinct_entropies(runs: Sequence[Summary]) -> list[float]:
    """The unigram entropies (nats) of the runs' validation texts: one value if all were validated on the same text."""
    return sorted({round(run.unigram_entropy, 6) for run in runs if run.unigram_entropy is not None})


def growth_table(rows: Sequence[GrowthRow]) -> Table:
    """One line for each growth event."""
    headings = ("step", "what grew", "loss before", "after", "change", "later", "accuracy", "exact by plan")
    table = _table("Growth events (probe batch, losses in nats)", headings, left=(1, 7))
    for row in rows:
        table.add_row(
            f"{row.step:,}",
            "\n".join(change.text() for change in row.changes),
            f"{row.loss_before:.4f}",
            f"{row.loss_after:.4f}",
            units.difference(row.delta, 4),
            NOTHING if row.lag_loss is None else f"{row.lag_loss:.4f} (+{row.lag_steps})",
            f"{units.percent(row.accuracy_before)} -> {units.percent(row.accuracy_after)}",
            "yes" if row.exact else "no: " + ", ".join(reason.partition(":")[0] for reason in row.reasons),
        )
    return table


def stage_table(rows: Sequence[StageRow]) -> Table:
    """One line for each stage."""
    headings = (
        "stage", "layers", "hidden", "heads", "ffn", "length", "batch", "parameters", "steps", "tokens", "FLOPs",
        "share", "valid loss",
    )  # fmt: skip
    table = _table("Stages", headings)
    for row in rows:
        model = row.model
        table.add_row(
            str(row.index),
            *(f"{size:,}" for size in (model.layers, model.hidden, model.heads, model.ffn, row.length, row.batch)),
            units.count(row.parameters),
            f"{row.steps:,}",
            units.count(row.tokens),
            units.plain_flops(row.flops),
            units.percent(row.share, 0),
            units.nats(row.valid_loss),
        )
    return table


def _table(title: str, headings: Sequence[str], left: Sequence[int] = ()) -> Table:
    """An empty table; columns are numbers, set right, but for the first and those in `left`."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="left" if position == 0 or position in left else "right")
    return table


def _plain(text: str) -> str:
    """A name from a file is never markup."""
    from rich.markup import escape

    return escape(text)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
