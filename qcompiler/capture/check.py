"""Compares a captured graph with the model: same outputs and updates at several sizes; finds the smallest valid sizes.

torch.export assumes that no dynamic size is 0 or 1. The check tries these sizes: if graph and model agree, it widens
the symbol's range; otherwise the range excludes them, and calls of that size are rejected.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from qcompiler.capture.comparison import compare
from qcompiler.capture.examples import Call, sizes_of, with_sizes
from qcompiler.capture.open_sizes import agreeing, unmovable
from qcompiler.capture.runs import ModelRefused, Runs
from qcompiler.capture.signature import Signature
from qcompiler.ir.graph import Graph
from qcompiler.ir.ranges import Range


def check_graph(graph: Graph, signature: Signature, model: torch.nn.Module, call: Call, traced: Call) -> Signature:
    """Compares graph and model at the given sizes, at other sizes, and at 1 and 0.

    Args:
        graph: The captured graph.
        signature: Its calling convention.
        model: The captured model; buffers that it writes are restored after each run.
        call: The user's example.
        traced: The example used for tracing, in which sizes of 1 may be larger.

    Returns:
        The signature with the ranges of the symbols widened or narrowed to match the results, and without irrelevant
        conditions.

    Raises:
        CaptureError: They differ; the message gives the output, the shapes and the difference.
        ModelRefused: The model does not run on the example.
    """
    judge = _Judge(graph, signature, model)
    ranges = dict(signature.symbols)
    sizes = sizes_of(signature, traced)
    judge.compare(traced)
    for symbol in unmovable(sizes, ranges, judge, traced):
        ranges[symbol] = Range(sizes[symbol], sizes[symbol])
    for low in (1, 0):
        for symbol in agreeing(judge, traced, sizes, low, ranges):
            ranges[symbol] = Range(low, ranges[symbol].high)
    given = sizes_of(signature, call)
    if given != sizes:
        judge.compare(call)
        ranges.update({s: Range(n, ranges[s].high) for s, n in given.items() if s in ranges and n < ranges[s].low})
    conditions = tuple(c for c in signature.conditions if all(c.holds(agreed) for agreed in judge.agreed))
    return replace(signature, symbols=ranges, conditions=conditions)


class _Judge:
    """Runs graph and model on the same inputs and compares all results."""

    def __init__(self, graph: Graph, signature: Signature, model: torch.nn.Module) -> None:
        self.signature, self.runs = signature, Runs(graph, signature, model)
        self.agreed: list[dict[str, int]] = []

    def try_compare(self, call: Call, sizes: Mapping[str, int]) -> bool:
        """Compares at other sizes; False if the example or the model does not allow them."""
        varied = with_sizes(self.signature, call, sizes)
        if varied is None:
            return False
        try:
            self.compare(varied)
        except ModelRefused:
            return False
        return True

    def compare(self, call: Call) -> None:
        """Raises CaptureError if graph and model differ on a call, ModelRefused if the model does not run."""
        compare(self.runs, call)
        self.agreed.append(sizes_of(self.signature, call))
