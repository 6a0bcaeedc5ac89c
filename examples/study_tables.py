"""Fills the tables of docs/granularity.md from the CSV files of the study.

    <!-- table lm.csv scheme increase@100:.3f -->        above a table: file, column that names a row, cells

If several rows of the file have the same name, the part of a cell after `@` selects one: its scheme, its outlier
factor, the size of a GEMM, the format of its cache, or its rank. The header of a table is written by hand.
"""

import csv
import re
from pathlib import Path

TABLE = re.compile(r"(?P<mark><!-- table (?P<spec>[^>]*) -->\n\n)(?P<head>\|.*\n\|[ :|-]*\|\n)(?P<body>(?:\|.*\n)*)")


def filled(page: str, folder: Path) -> str:
    """The page, with every marked table filled from the CSV files."""

    def fill(table: re.Match[str]) -> str:
        return table["mark"] + table["head"] + body(table["spec"].split(), folder)

    return TABLE.sub(fill, page)


def body(spec: list[str], folder: Path) -> str:
    """The rows of one table, in the order of the file."""
    name, key, *cells = spec
    found: dict[str, list[dict[str, str]]] = {}
    for row in csv.DictReader((folder / name).read_text(encoding="utf-8").splitlines()):
        found.setdefault(row[key], []).append(row)
    lines = ([f"`{label}`", *(shown(cell, rows) for cell in cells)] for label, rows in found.items())
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(cell: str, rows: list[dict[str, str]]) -> str:
    """One number or text from the rows with one name."""
    where, _, form = cell.partition(":")
    column, _, which = where.partition("@")
    kinds = ("scheme", "factor", "size", "cache", "rank")
    value = next(row[column] for row in rows if not which or which in [row.get(kind) for kind in kinds])
    return format(float(value), form) if form else f"`{value}`"
