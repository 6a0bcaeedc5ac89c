"""Finds the dynamic sizes of a captured graph by running graph and model at other sizes.

Sizes may depend on each other in ways that torch.export does not see. A mask is as long as the cache plus the new
tokens, there are as many keys as values, and a batch has a symbol in each argument. So sizes change in groups: all at
once, all symbols of equal size, or one alone, each also with the sums that hold in the example:

    past 5, new 3, mask 8   ->   past 4, new 2, mask 6
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from qcompiler.capture.examples import Call
from qcompiler.capture.runs import GraphRefused
from qcompiler.capture.signature import Signature
from qcompiler.errors import CaptureError
from qcompiler.ir.ranges import Range

ASSUMED_LOW = 2
"""The minimum that torch.export assumes for a dynamic dimension."""

STEPS = (-1, 2, -3, 4, 8, 16)
"""Size changes for the second comparison; some models accept only multiples."""

MOST_ALONE = 8
"""With more symbols than this (a cache has one per layer), they change only in groups of equal size."""


class Judge(Protocol):
    """Compares graph and model."""

    signature: Signature

    def try_compare(self, call: Call, sizes: Mapping[str, int]) -> bool:
        """Compares at other sizes; False if the example or the model does not allow them.

        Raises:
            GraphRefused: The model runs and the graph does not.
            CaptureError: They differ.
        """


@dataclass(frozen=True)
class Group:
    """Sizes that change together.

    Attributes:
        symbols: The symbols that are set.
        sums: The symbols that follow, each as the sum of two others.
    """

    symbols: tuple[str, ...]
    sums: tuple[tuple[str, tuple[str, str]], ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """Every symbol that changes."""
        return (*self.symbols, *(name for name, _ in self.sums))

    def at(self, sizes: Mapping[str, int], values: Mapping[str, int]) -> dict[str, int]:
        """Returns all sizes, with `values` for the symbols of the group."""
        moved = {**sizes, **values}
        for name, (first, second) in self.sums:
            moved[name] = moved[first] + moved[second]
        return moved


def unmovable(sizes: Mapping[str, int], ranges: Mapping[str, Range], judge: Judge, call: Call) -> list[str]:
    """Compares at a second value of each symbol; returns the symbols that the model supports at no other value.

    The graph is untested at other values of these symbols.

    Raises:
        CaptureError: Graph and model differ.
    """
    found: set[str] = set()
    for symbols in reversed(_together(list(sizes), sizes)):
        for group in [] if found.issuperset(symbols) else _with_sums(symbols, sizes):
            if _moves(group, sizes, ranges, judge, call):
                found.update(group.all)
                break
    return [symbol for symbol in sizes if symbol not in found]


def agreeing(judge: Judge, call: Call, sizes: Mapping[str, int], low: int, ranges: Mapping[str, Range]) -> list[str]:
    """Returns the symbols that may be `low`: the graph agreed with the model there and never differed.

    A batch may have several symbols (ids and mask), and the model may not run if only one of them is 1. They are tried
    one at a time, all of equal size in the example together, and all at once.
    """
    free = [symbol for symbol in sizes if ranges[symbol].low == low + 1 and ranges[symbol].low != ranges[symbol].high]
    agreed: set[str] = set()
    wrong: set[str] = set()
    for symbols in _together(free, sizes):
        for group in [] if wrong & set(symbols) else _with_sums(symbols, sizes):
            try:
                if judge.try_compare(call, group.at(sizes, dict.fromkeys(symbols, low))):
                    agreed.update(symbols)
                    break
            except GraphRefused:
                break
            except CaptureError:
                wrong.update(symbols)
                break
    return [symbol for symbol in free if symbol in agreed - wrong]


def _together(free: list[str], sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Returns the groups to try: each symbol alone, all symbols of equal size in the example, and all symbols."""
    alone = [(symbol,) for symbol in free] if len(free) <= MOST_ALONE else []
    equal = [tuple(other for other in free if sizes[other] == sizes[symbol]) for symbol in free]
    return list(dict.fromkeys([*alone, *equal, tuple(free)])) if free else []


def _with_sums(symbols: tuple[str, ...], sizes: Mapping[str, int]) -> Iterator[Group]:
    """Yields the symbols alone; then with each size that, in the example, is the sum of one of them and another."""
    yield Group(symbols)
    of_size: dict[int, list[str]] = {}
    for name, size in sizes.items():
        of_size.setdefault(size, []).append(name)
    sums: dict[str, tuple[str, str]] = {}
    parts: set[str] = set()
    for total in sizes:
        pairs = ((first, second) for first in symbols for second in of_size.get(sizes[total] - sizes[first], ()))
        free = (pair for pair in pairs if total not in pair and not sums.keys() & pair)
        if total not in parts and (pair := next(free, None)) is not None:
            sums[total] = pair
            parts.update(pair)
    if sums:
        yield Group(tuple(symbol for symbol in symbols if symbol not in sums), tuple(sums.items()))


def _moves(group: Group, sizes: Mapping[str, int], ranges: Mapping[str, Range], judge: Judge, call: Call) -> bool:
    """Whether graph and model agree with the group at other sizes: smaller first, as position tables are finite."""
    for step in STEPS:
        values: dict[str, int] = {}
        for symbol in group.symbols:  # if the step leaves the legal sizes, step in the other direction
            further = sizes[symbol] + step
            values[symbol] = further if _legal(further, ranges.get(symbol)) else sizes[symbol] - step
        moved = group.at(sizes, values)
        if not all(_legal(moved[symbol], ranges.get(symbol)) for symbol in group.all):
            continue
        if not all(condition.holds(moved) for condition in judge.signature.conditions):
            continue
        with suppress(GraphRefused):  # such sizes are not part of the capture
            if judge.try_compare(call, moved):
                return True
    return False


def _legal(size: int, bounds: Range | None) -> bool:
    return size >= ASSUMED_LOW and (bounds is None or size in bounds)
