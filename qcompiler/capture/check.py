"""Holds a captured graph to the model: same outputs, same updates, at several sizes; and finds the least legal sizes.

torch.export assumes that no dynamic size is 0 or 1. The graph is tried there as well: where it agrees with the model,
the range of the symbol is widened; where it does not, the range says so and a call of that size is refused.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from qcompiler.capture.comparison import compare
from qcompiler.capture.examples import Call, sizes_of, with_sizes
from qcompiler.capture.runs import GraphRefused, ModelRefused, Runs
from qcompiler.capture.signature import Signature
from qcompiler.errors import CaptureError
from qcompiler.ir.graph import Graph, Range

ASSUMED_LOW = 2
"""The least size that torch.export reckons with."""


STEPS = (-1, 2, -3, 4, 8, 16)
"""How far sizes are moved for the second comparison; some models take only multiples."""

MOST_ALONE = 8
"""With more symbols than this (a cache has one a layer), they are tried at 1 in groups of equal size only."""


def check_graph(graph: Graph, signature: Signature, model: torch.nn.Module, call: Call, traced: Call) -> Signature:
    """Compares graph and model at the given sizes, at other ones, and at 1 and 0.

    Args:
        graph: What was captured.
        signature: How it is called.
        model: What it was captured from; buffers that it writes are restored after each run.
        call: The user's example.
        traced: The example that was traced with, where sizes of 1 may be larger.

    Returns:
        The signature with the ranges of the symbols, widened or narrowed by what was found, and without the conditions
        that do not matter.

    Raises:
        CaptureError: They differ; the message has the output, the shapes and the difference.
        ModelRefused: The model does not run on the example.
    """
    judge = _Judge(graph, signature, model)
    ranges = dict(signature.symbols)
    sizes = sizes_of(signature, traced)
    judge.compare(traced)
    for symbol in _unmovable(sizes, ranges, judge, traced):
        ranges[symbol] = Range(sizes[symbol], sizes[symbol])
    for low in (1, 0):
        for symbol in _agreeing(judge, traced, sizes, low, ranges):
            ranges[symbol] = Range(low, ranges[symbol].high)
    given = sizes_of(signature, call)
    if given != sizes:
        judge.compare(call)
        ranges.update({s: Range(n, ranges[s].high) for s, n in given.items() if s in ranges and n < ranges[s].low})
    conditions = tuple(c for c in signature.conditions if all(c.holds(agreed) for agreed in judge.agreed))
    return replace(signature, symbols=ranges, conditions=conditions)


def _unmovable(sizes: Mapping[str, int], ranges: Mapping[str, Range], judge: "_Judge", call: Call) -> list[str]:
    """Compares at a second value of each symbol; the symbols of which the model takes no other value.

    Nothing is known about the graph at other values of those.
    """
    if _try_moves(list(sizes), sizes, ranges, judge, call):
        return []
    # Some pair of sizes does not fit together, such as a cache and its mask: move one at a time.
    return [symbol for symbol in sizes if not _try_moves([symbol], sizes, ranges, judge, call)]


def _try_moves(
    moving: list[str], sizes: Mapping[str, int], ranges: Mapping[str, Range], judge: "_Judge", call: Call
) -> bool:
    """Whether graph and model agree with `moving` at other sizes: smaller ones first, as tables of positions end."""
    for step in STEPS:
        moved = {**sizes, **{symbol: sizes[symbol] + step for symbol in moving}}
        for symbol in moving:  # where the step leads out of the legal sizes, go the other way
            if not _legal(moved[symbol], ranges.get(symbol)):
                moved[symbol] = sizes[symbol] - step
        if not all(_legal(moved[symbol], ranges.get(symbol)) for symbol in moving):
            continue
        if all(condition.holds(moved) for condition in judge.signature.conditions) and judge.try_compare(call, moved):
            return True
    return not moving


def _legal(size: int, bounds: Range | None) -> bool:
    return size >= ASSUMED_LOW and (bounds is None or size in bounds)


def _agreeing(
    judge: "_Judge", call: Call, sizes: Mapping[str, int], low: int, ranges: Mapping[str, Range]
) -> list[str]:
    """The symbols that may be `low`: the graph agreed with the model there, alone or with others, and never differed.

    A batch may have several symbols (ids and mask), and nothing may run when only one of them is 1. They are tried one
    at a time, together with those of the same size in the example, and all at once.
    """
    free = [symbol for symbol in sizes if ranges[symbol].low == low + 1 and ranges[symbol].low != ranges[symbol].high]
    groups = [[symbol] for symbol in free] if len(free) <= MOST_ALONE else []
    groups += [[other for other in free if sizes[other] == sizes[symbol]] for symbol in free]
    groups += [free]
    agreed: set[str] = set()
    wrong: set[str] = set()
    for group in {tuple(group): None for group in groups if group}:
        if wrong & set(group):
            continue  # already explained
        try:
            if judge.try_compare(call, {**sizes, **dict.fromkeys(group, low)}):
                agreed.update(group)
        except GraphRefused:
            continue
        except CaptureError:
            wrong.update(group)
    return [symbol for symbol in free if symbol in agreed - wrong]


class _Judge:
    """Runs graph and model on the same inputs and compares all that comes out."""

    def __init__(self, graph: Graph, signature: Signature, model: torch.nn.Module) -> None:
        self.signature, self.runs = signature, Runs(graph, signature, model)
        self.agreed: list[dict[str, int]] = []

    def try_compare(self, call: Call, sizes: Mapping[str, int]) -> bool:
        """Compares at other sizes; False when the example or the model does not allow them."""
        varied = with_sizes(self.signature, call, sizes)
        if varied is None:
            return False
        try:
            self.compare(varied)
        except ModelRefused:
            return False
        return True

    def compare(self, call: Call) -> None:
        """Raises CaptureError when graph and model differ on a call, ModelRefused when the model does not run."""
        compare(self.runs, call)
        self.agreed.append(sizes_of(self.signature, call))
