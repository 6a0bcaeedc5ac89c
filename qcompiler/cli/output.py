"""How commands print: text as it is, tables for people, JSON for machines."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 160
"""Columns of a table that goes to a file or a pipe, where nobody looks at a terminal's edge."""


def console_on(stream: Any) -> Console:
    """A console that prints text literally; as wide as the terminal, if it is one. It heeds NO_COLOR and COLUMNS."""
    given = Console(file=stream, markup=False, emoji=False, highlight=False, soft_wrap=False)
    return given if given.is_terminal else Console(file=stream, width=WIDTH, markup=False, emoji=False, highlight=False)


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table; the columns of numbers, whose heading ends in a space, are flush right."""
    made = Table(box=SIMPLE, pad_edge=False, show_edge=False)
    for heading in headings:
        made.add_column(heading.strip(), justify="right" if heading.endswith(" ") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else str(cell) for cell in row))
    return made


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table to standard output, without trailing space."""
    console = console_on(sys.stdout)
    with console.capture() as capture:
        console.print(table(headings, rows))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    print("\n".join(line for line in lines if line))


def print_json(document: Any) -> None:
    """Prints a document to standard output."""
    print(json.dumps(document, indent=2, ensure_ascii=False))
