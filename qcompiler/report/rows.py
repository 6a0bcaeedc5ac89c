"""The rows of a report; rows of equal layers in a stack, whose names differ only in numbers, become one row.

model.layers.0.mlp.up_proj, ..., model.layers.31.mlp.up_proj    ->    model.layers.0-31.mlp.up_proj x32
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod

from qcompiler.ir import Role
from qcompiler.ir.traits import traits_of

NUMBERED = re.compile(r"(?<![^.])\d+(?=\.)")
"""A number in a module name that is followed by another part: `0` in `layers.0.mlp`, not in `layers.0`."""

VALUE = re.compile(r"%[\w.#]+")
OF_VALUE = re.compile(r" \(%[^)]*\)")
"""The value in question, at the end of a reason."""


@dataclass(frozen=True)
class Row:
    """One operation that uses weights.

    Attributes:
        name: The value that it computes.
        op: Its name in the captured graph.
        module: Its module path in the model.
        weights: The parameters that it uses.
        shape: The type of the largest weight.
        bytes: Size of the weights, as captured.
        quantized: Whether it is quantized.
        reason: Why it is not quantized; empty if it is.
        remark: Further remarks of passes, such as how its input was smoothed, or why not.
        format: The scheme that quantizes it this way, such as "fp8_tile"; empty if it is not quantized.
    """

    name: str
    op: str
    module: str
    weights: tuple[str, ...]
    shape: str
    bytes: int
    quantized: bool
    reason: str
    remark: str = ""
    format: str = ""

    @property
    def is_matmul(self) -> bool:
        """Whether it multiplies matrices."""
        return traits_of(self.op).role is Role.MATMUL


def collapsed(rows: Sequence[Row]) -> Iterator[Row]:
    """Yields the rows in order, each group of equal rows as one row in place of its first."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_kind(row), []).append(row)
    merged: dict[str, Row] = {}
    for members in groups.values():
        merged |= {block[0].name: _together(block) for block in _blocks(members)}
    yield from (merged[row.name] for row in rows if row.name in merged)


def _kind(row: Row) -> tuple[object, ...]:
    """Returns the fields that equal rows share."""
    if not NUMBERED.search(row.module):
        return (row.name,)
    names = (NUMBERED.sub("#", name) for name in (row.module, *row.weights))
    texts = (VALUE.sub("%", text) for text in (row.reason, row.remark))
    return (*names, row.op, row.shape, row.quantized, row.format, *texts)


def _blocks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yields the rows of one kind in blocks whose layer numbers form a full grid."""
    numbers = list(map(_numbers, rows))
    distinct = [{*column} for column in zip(*numbers, strict=True)]
    if len({*numbers}) == len(rows) == prod(map(len, distinct)):
        yield list(rows)
    elif len({*numbers}) == len(rows):
        for _, part in groupby(rows, lambda row: _numbers(row)[0]):
            block = list(part)
            yield from _blocks(block) if len(block) < len(rows) else ([row] for row in block)
    else:
        yield from ([row] for row in rows)


def _together(rows: Sequence[Row]) -> Row:
    """Merges a block into one row: name of the first, modules as ranges, sum of bytes."""
    first = rows[0]
    if len(rows) == 1:
        return first
    columns = iter(_ranges(sorted({*column})) for column in zip(*map(_numbers, rows), strict=True))
    module = NUMBERED.sub(lambda _: next(columns), first.module)
    return replace(
        first,
        name=f"{first.name} ...",
        module=f"{module} x{len(rows)}",
        bytes=sum({row.weights: row.bytes for row in rows}.values()),
        reason=_common([row.reason for row in rows]),
        remark=_common([row.remark for row in rows]),
    )


def _common(texts: Sequence[str]) -> str:
    """Returns one text for all rows, without value names if they differ."""
    if len({*texts}) == 1:
        return texts[0]
    return VALUE.sub("%...", OF_VALUE.sub("", texts[0]))


def _numbers(row: Row) -> tuple[int, ...]:
    return tuple(map(int, NUMBERED.findall(row.module)))


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
