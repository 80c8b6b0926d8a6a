"""Tables on a terminal of any width: what is too wide for it is turned on its side instead of cut."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console(width: int = 120) -> Console:
    """The terminal, or so many columns where the output goes elsewhere."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width)


def show(on: Console, table: Table) -> None:
    """Print a table; one that is too wide with a line for each of its columns, in as many parts as it takes."""
    if fits(on, table):
        on.print(table)
        return
    rows = table.row_count
    while rows:
        taken = rows
        while taken > 1 and not fits(on, _turned(table, table.row_count - rows, taken)):
            taken -= 1
        on.print(_turned(table, table.row_count - rows, taken))
        rows -= taken


def fits(on: Console, table: Table) -> bool:
    """Whether no cell of it has to be broken."""
    from rich.measure import Measurement

    return Measurement.get(on, on.options.update(max_width=10_000), table).maximum <= on.width


def _turned(table: Table, first: int, count: int) -> Table:
    """Some rows of a table as columns."""
    from rich.table import Table

    title = table.title if first == 0 else None
    found = Table(title=title, title_justify="left", title_style=table.title_style, show_header=True)
    names, *others = table.columns
    heads = list(names.cells)[first : first + count]
    found.add_column(names.header)
    for head in heads:
        found.add_column(head, justify="right")
    for column in others:
        found.add_row(column.header, *list(column.cells)[first : first + count])
    return found
