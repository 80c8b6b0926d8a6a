from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table

from growth_ds.report import units
from growth_ds.report.tables import comparison_table, growth_line, growth_rows, growth_table, stage_rows, stage_table
from growth_ds.report.tables import summary as summary_of
from growth_ds.run_folder import RunFolder


def cells(table: Table) -> list[list[str]]:
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def text(table: Table) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


RECORD = {
    "step": 300, "stage": 1, "exact": False, "moments": "carry", "length": [64, 128], "seconds": 1.0,
    "loss_before": 5.25, "loss_after": 5.5, "accuracy_before": 0.125, "accuracy_after": 0.1,
    "axes": [
        {"axis": "layer", "old": 2, "new": 4, "recipe": "tile", "exact": False, "reason": "other depth"},
        {"axis": "ffn", "old": 256, "new": 512, "recipe": "tile", "exact": True, "reason": None},
    ],
}  # fmt: skip


def test_growth_line() -> None:
    assert growth_line(RECORD) == (
        "growth at step 300, stage 0 -> 1: layer 2 -> 4 (tile), ffn 256 -> 512 (tile), length 64 -> 128; "
        "moments carry\n"
        "  probe loss 5.2500 -> 5.5000 (+0.2500), accuracy 12.5% -> 10.0%; not exact by plan (layer: other depth)"
    )


def test_growth_line_of_an_exact_growth() -> None:
    line = growth_line({**RECORD, "exact": True, "axes": [], "loss_after": 5.24999})
    assert "stage 0 -> 1: length 64 -> 128; moments carry" in line
    assert "5.2500 -> 5.2500 (0.0000)" in line
    assert line.endswith("; exact by plan")


def test_comparison_falls_either_way(grown: RunFolder) -> None:
    first = replace(summary_of(grown), valid_loss=5.0, unigram_entropy=6.5)
    rows = [("ours", first), ("worse", replace(first, valid_loss=5.25)), ("better", replace(first, valid_loss=4.5))]
    found = cells(comparison_table(rows))
    assert [row[:3] for row in found] == [
        ["ours", "5.000", ""],
        ["worse", "5.250", "+0.250"],
        ["better", "4.500", "-0.500"],
        ["unigram entropy", "6.500", "+1.500"],
    ]
    assert found[0][4:] == ["1.08 M", "60", "81,920", "2.29e11", "1.7 s"]


def test_comparison_of_what_is_not_there_yet(grown: RunFolder) -> None:
    young = replace(summary_of(grown), valid_loss=None, valid_accuracy=None, unigram_entropy=None, steps=7)
    found = cells(comparison_table([("[bold]young[/bold]", young), ("done", summary_of(grown))]))
    assert found[0][1:4] == [units.MISSING, "", units.MISSING]
    assert found[0][5] == "7 of 60"
    assert found[1][2] == units.MISSING
    assert "[bold]young[/bold]" in text(comparison_table([("[bold]young[/bold]", young)]))


def test_growth_and_stage_tables(grown: RunFolder) -> None:
    first, second = cells(growth_table(growth_rows(grown)))
    assert first[0] == "20"
    assert first[1] == "layer 2 -> 4 (tile)\nffn 128 -> 256 (tile)"
    assert first[4] == "+0.1250"
    assert first[7] == "no: layer"
    assert (second[4], second[7]) == ("0.0000", "yes")
    assert [row[:7] for row in cells(stage_table(stage_rows(grown)))] == [
        ["0", "2", "64", "2", "128", "64", "16"],
        ["1", "4", "64", "2", "256", "64", "16"],
        ["2", "4", "128", "4", "512", "128", "16"],
    ]


UNITS = [
    (units.count, 0, "0"),
    (units.count, 99_999, "99,999"),
    (units.count, 209_680, "210 k"),
    (units.count, 12_345_678, "12.3 M"),
    (units.count, 1.2e9, "1.20 B"),
    (units.count, None, units.MISSING),
    (units.flops, 4.2e15, "4.20\u00a0\u00d7\u00a010¹⁵"),
    (units.plain_flops, 4.2e15, "4.20e15"),
    (units.flops, math.nan, units.MISSING),
    (units.duration, 0.26, "0.3 s"),
    (units.duration, 59.4, "59 s"),
    (units.duration, 59.6, "1 min"),
    (units.duration, 200, "3 min 20 s"),
    (units.duration, 7499, "2 h 05 min"),
    (units.duration, 3599.8, "1 h 00 min"),
    (units.difference, -0.0004, "0.000"),
    (units.difference, -0.0006, "-0.001"),
    (units.difference, math.nan, "+nan"),
    (units.percent, 0.1234, "12.3%"),
    (units.nats, math.nan, "nan"),
]


@pytest.mark.parametrize(("form", "number", "expected"), UNITS)
def test_units(form, number, expected) -> None:
    assert form(number) == expected
