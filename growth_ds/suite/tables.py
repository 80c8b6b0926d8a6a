"""A comparison as a table: on the terminal, and as rows for the page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import isinf
from statistics import median
from typing import Any

from growth_ds.report import units
from growth_ds.suite.measure import Summary, summaries

HEADINGS = ("method", "budget", "FLOPs to the loss", "time to the loss", "final loss", "to from-scratch", "reached")
NOTE = (
    "Losses in nats on the validation split; medians over the seeds, least and most in brackets. FLOPs and time to the "
    "loss: what a run had spent when its validation loss came down to the final one of the from-scratch run with the "
    "same seed, of what that run spent in all; time includes the growths. Each run decays its rate by its own budget."
)
NEVER = "not reached"


def rows_of(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row of cells for each method."""
    return [_row(each, [row for row in records if row["method"] == each.method]) for each in summaries(records)]


def _row(found: Summary, records: list[dict[str, Any]]) -> list[str]:
    losses = [row["final_loss"] for row in records if row["final_loss"] is not None]
    loss = units.nats(median(losses)) if losses else units.MISSING
    return [
        found.method,
        f"{records[0]['budget']:g}",
        _ratio(found.flops),
        _ratio(found.seconds),
        loss,
        _spread(found.difference, units.difference),
        f"{found.reached} of {found.seeds}",
    ]


def _ratio(values: tuple[float, float, float] | None) -> str:
    return NEVER if values is None else _spread(values, lambda each: "never" if isinf(each) else f"{each:.3f}")


def _spread(values: tuple[float, float, float] | None, said: Any) -> str:
    if values is None:
        return units.MISSING
    middle, least, most = values
    return said(middle) if least == most else f"{said(middle)} [{said(least)}, {said(most)}]"


def past_baselines(records: Sequence[dict[str, Any]], nats: dict[str, float]) -> str:
    """One sentence: where the from-scratch runs ended beside the models that only count."""
    losses = [row["final_loss_scratch"] for row in records if row["final_loss_scratch"] is not None]
    if not losses:
        return ""
    worst = max(losses)
    beside = f"unigram {units.nats(nats['unigram'])}, bigram {units.nats(nats['bigram'])}"
    ended = f"The from-scratch runs ended at up to {units.nats(worst)} nats"
    if worst < min(nats.values()):
        return f"{ended}, past both models that only count ({beside})."
    return f"{ended}, NOT past the models that only count ({beside}): this comparison tells little."


def print_table(records: Sequence[dict[str, Any]], nats: dict[str, float]) -> None:
    """The table on the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*HEADINGS, title="against training from scratch", title_justify="left")
    for row in rows_of(records):
        table.add_row(*(escape(cell) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(past_baselines(records, nats), highlight=False)
