"""The comparison as one self-contained HTML page: table, curves of the first seed, the schedules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growth_ds.config import SCRATCH
from growth_ds.files import write_durably
from growth_ds.planning import learn_flops, stage_flops
from growth_ds.report import units
from growth_ds.report.curves import SERIES
from growth_ds.report.html import curves_of
from growth_ds.report.page import Html, document, element, join, section, table
from growth_ds.report.series import Curve
from growth_ds.suite.measure import finished, summaries
from growth_ds.suite.tables import HEADINGS, NOTE, past_baselines, rows_of

if TYPE_CHECKING:
    from growth_ds.suite.compare import Comparison

PAGE = "compare.html"
DRAWN = len(SERIES)
"""Curves in one picture: so many colours are told apart."""


def write_page(comparison: Comparison, records: Sequence[dict[str, Any]], nats: dict[str, float]) -> Path:
    """Write the page. From-scratch has to be among the records."""
    seed = next(row["seed"] for row in records if row["method"] == SCRATCH and row["final_loss"] is not None)
    cells = rows_of(records)
    cells += [[f"{name} baseline", "", "", "", units.nats(loss), "", ""] for name, loss in nats.items()]
    body = join(
        [
            element("p", "growth_ds comparison", kind="kicker"),
            element("h1", comparison.suite.name),
            element("p", past_baselines(records, nats), kind="lead"),
            section("Results", table(HEADINGS, cells, references=len(nats)), element("p", NOTE, kind="note")),
            _curves(comparison, records, seed, nats["unigram"]),
            _schedules(comparison),
        ]
    )
    out = comparison.out / PAGE
    write_durably(out, document(f"{comparison.suite.name}: growth_ds comparison", body))
    return out


def _curves(comparison: Comparison, records: Sequence[dict[str, Any]], seed: int, unigram: float) -> Html:
    """From scratch and the methods that came closest, with one seed."""
    best = sorted(summaries(records), key=lambda each: (each.method != SCRATCH, each.difference or (99.0,)))
    curves: list[Curve] = []
    for each in best:
        run = finished(comparison.folder(each.method, seed))
        if run is not None and len(curves) < DRAWN:
            curves.append(Curve(each.method, run.curve.train, run.curve.valid, run.curve.growths))
    note = f"Seed {seed}; from scratch and the {len(curves) - 1} methods with the lowest final losses."
    return curves_of(curves, unigram, note)


def _schedules(comparison: Comparison) -> Html:
    headings = ("method", "stage", "layers", "hidden", "heads", "ffn", "length", "batch", "steps", "FLOPs", "growth")
    rows: list[list[object]] = []
    for entry in comparison.entries:
        for number, stage in enumerate(entry.run.stages):
            model, flops = stage.model, stage.total_steps * stage_flops(entry.run, stage)
            flops += learn_flops(entry.run, number)
            sizes = [model.layers, model.hidden, model.heads, model.ffn, stage.length, stage.batch.global_]
            grown = stage.grow.recipe if number else ""
            name = entry.method if number == 0 else ""
            rows.append([name, number, *sizes, f"{stage.total_steps:,}", units.flops(flops), grown])
    return section("Schedules", table(headings, rows, text=(0, len(headings) - 1)))
