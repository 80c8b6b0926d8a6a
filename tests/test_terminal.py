"""Tables that are too wide are turned, and no cell is lost."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from growth_ds.terminal import fits, show

CELLS = [[f"{row}-{column}" * 3 for column in range(6)] for row in range(5)]


def shown(width: int) -> list[str]:
    table = Table(*(f"heading {column}" for column in range(6)), title="All of it")
    for row in CELLS:
        table.add_row(*row)
    on = Console(width=width, file=io.StringIO())
    assert fits(on, table) == (width >= 80)
    show(on, table)
    return on.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [100, 80, 60, 40])
def test_no_cell_is_cut(width):
    lines = shown(width)
    text = "\n".join(lines)
    assert all(cell in text for row in CELLS for cell in row)
    assert max(map(len, lines)) <= width
    assert text.count("All of it") == 1
    assert "…" not in text


def test_a_part_has_as_many_rows_as_fit():
    assert sum("heading 0" in line for line in shown(60)) == 2
    assert sum("heading 0" in line for line in shown(30)) == 5
