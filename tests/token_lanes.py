"""Checks labels along the sequence against numbers: an element must not change with tokens that its label excludes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from passes.analyses.sequence import Sequence
from passes.analyses.sequence_labels import Axis, Kind, Label
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Op, Value, evaluate


def values_of(graph: Graph, inputs: list[Tensor]) -> dict[Value, Any]:
    """Every value of the graph."""
    kept: dict[Value, Any] = dict(zip(graph.inputs, inputs, strict=True))

    def observe(op: Op, results: tuple[Any, ...]) -> None:
        kept.update(zip(op.results, results, strict=True))

    torch.use_deterministic_algorithms(True)  # fills memory that operations leave undefined
    try:
        interpret(graph, inputs, observe=observe)
    finally:
        torch.use_deterministic_algorithms(False)
    return kept


def numbers_along(axis: Axis, sizes: Mapping[str, int]) -> dict[Kind, Tensor]:
    """The row and the position of each element along an axis, as far as its digits say them."""
    found: dict[Kind, Tensor] = {}
    left = torch.arange(int(torch.tensor([evaluate(digit.size, sizes) for digit in axis]).prod()))
    for digit in reversed(axis):
        size = evaluate(digit.size, sizes)
        found[digit.kind], left = left % size, left // size
    return found


def in_order(tensor: Tensor, label: Label, found: Sequence, values: Mapping[Value, Any]) -> tuple[Tensor, list[Axis]]:
    """The tensor and its axes with sorted entries moved back to their own order."""
    axes = list(label.axes)
    for at, axis in enumerate(axes):
        if len(axis) == 1 and (order := axis[0].order) is not None:
            tensor = tensor.index_select(at, values[order].argsort())
            axes[at] = found.labels[order.op["self"]].axes[0]
    return tensor, axes


def lanes(axes: list[Axis], sizes: Mapping[str, int], kind: Kind) -> Tensor | None:
    """The row or the position of each element, in a shape that broadcasts to the value's; None if no axis says it."""
    for at, axis in enumerate(axes):
        numbers = numbers_along(axis, sizes)
        if kind in numbers:
            return numbers[kind].reshape([-1, *[1] * (len(axes) - at - 1)])
    return None


def wrong_values(
    graph: Graph, found: Sequence, ids: Tensor, row: int, place: int, *, causal: bool, tolerance: float = 0.0
) -> list[str]:
    """The values that change at tokens that they must not depend on when one token changes.

    Args:
        graph: The graph.
        found: Its analysis.
        ids: Token ids [batch, positions].
        row: The row of the token that changes.
        place: The position of the token that changes.
        causal: Whether later positions of the row may change, too.
        tolerance: The largest difference that is not a change.
    """
    other = ids.clone()
    other[row, place] = (ids[row, place] + 1) % 64
    before, after = values_of(graph, [ids]), values_of(graph, [other])
    sizes = {str(found.batch): ids.shape[0], str(found.length): ids.shape[1]}
    wrong = []
    for value, label in found.labels.items():
        one, axes = in_order(before[value], label, found, before)
        two, _ = in_order(after[value], label, found, after)
        wide = torch.complex128 if one.is_complex() else torch.float64
        same = torch.isclose(one.to(wide), two.to(wide), rtol=0, atol=tolerance, equal_nan=True)
        rows, places = lanes(axes, sizes, "batch"), lanes(axes, sizes, "positions")
        if label.content and rows is not None and places is not None:
            same = same | ((rows == row) & ((places >= place) if causal else (places == place)))
        if not bool(same.all()):
            wrong.append(f"{value} {label}")
    return wrong
