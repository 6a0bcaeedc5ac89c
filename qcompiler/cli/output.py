"""Output of commands: plain text, tables and JSON."""

import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

WIDTH = 160
"""Width in columns of a table that goes to a file or a pipe."""

GAP = 3
"""Spaces between two columns of a table."""


def console_on(stream: Any) -> Console:
    """A console that prints literal text at the width of the terminal, if any; respects NO_COLOR and COLUMNS."""
    given = Console(file=stream, markup=False, emoji=False, highlight=False, soft_wrap=False)
    return given if given.is_terminal else Console(file=stream, width=WIDTH, markup=False, emoji=False, highlight=False)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]], droppable: Sequence[str] = ()) -> None:
    """Prints a table to standard output without trailing spaces.

    Args:
        headings: One per column; a heading that ends in a space right-aligns its column.
        rows: Rows of cells.
        droppable: Headings of columns to drop on a narrow terminal, in this order. No cell is folded until all of them
            are dropped.
    """
    console = console_on(sys.stdout)
    cells = [[heading.strip() for heading in headings], *([str(cell) for cell in row] for row in rows)]
    wide = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    shown = list(range(len(headings)))
    for heading in droppable:
        if sum(wide[column] + GAP for column in shown) - GAP <= console.width:
            break
        shown = [column for column in shown if cells[0][column] != heading]
    table = Table(box=SIMPLE, pad_edge=False, show_edge=False)
    for column in shown:
        justify: Literal["left", "right"] = "right" if headings[column].endswith(" ") else "left"
        table.add_column(cells[0][column], justify=justify, overflow="fold")
    for row in cells[1:]:
        table.add_row(*(row[column] for column in shown))
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    print("\n".join(line for line in lines if line))


def print_json(document: Any) -> None:
    """Prints a JSON document to standard output."""
    print(json.dumps(document, indent=2))
