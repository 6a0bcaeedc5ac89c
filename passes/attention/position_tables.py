"""Reads stored tables by position numbers, in place of slices that are as long as the sequence.

    %p = aten.slice.Tensor(%table, 0, 0, %n) : f32[s1, 32]
  ->
    %place = aten.arange(%n) : i64[s1]
    %p = aten.embedding(%table, %place) : f32[s1, 32]

    %i = aten.slice.Tensor(%stored, 1, 0, %n) : i64[1, s1]             stored: [[0, 1, 2, …]]
  ->
    %place = aten.arange(%n) : i64[s1]
    %i = aten.unsqueeze(%place, 0) : i64[1, s1]

    %t = aten.slice.Tensor(%stored, 1, 0, %n) : i64[1, s1]             stored: [[0, 0, 0, …]]
  ->
    %t = aten.full([1, %n], 0) {dtype = i64} : i64[1, s1]

    %t = aten.gather(%stored, 1, %i) : i64[1, s1]
  ->
    %t = aten.full_like(%i, 0) : i64[1, s1]

A slice depends on the length of a call, position numbers do not: `kv-cache` can continue them from any position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from passes.analyses.elements import Elements
from passes.analyses.index_expressions import Unknown
from passes.analyses.inequalities import TooComplex
from qcompiler.ir import (
    Argument,
    DType,
    Expr,
    Graph,
    Match,
    Missed,
    Op,
    Rewriter,
    Rule,
    ScalarType,
    Size,
    TensorType,
    Value,
)
from qcompiler.ir.graph import PARAM
from qcompiler.ir.sizes import symbol
from qcompiler.pass_manager.pipeline import Effect, Pass

PLACE = symbol("table.place")
"""The index along the last axis of a table."""


@dataclass(frozen=True)
class NumberSlice(Rule):
    """table[:n]  ->  embedding(table, arange(n)), if n is symbolic; simpler for stored numbers and constants"""

    root: ClassVar[tuple[str, ...]] = ("aten.slice.Tensor",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        stored, axis, end = op["self"], op.argument("dim"), op.argument("end")
        if stored.op.name != PARAM or not isinstance(axis, int):
            return Missed("it slices a value that is not stored")
        shape = op.result.tensor.shape
        if not isinstance(shape[axis], Expr) or op.argument("start") not in (0, None) or op.argument("step") != 1:
            return Missed("it is not the beginning of a table, as long as the sequence")
        if not isinstance(end, Value) or not isinstance(end.type, ScalarType) or end.type.value != shape[axis]:
            return Missed("its length is not a value of the graph")
        if len(shape) == 2 and axis in (0, -2) and stored.tensor.dtype.is_float:
            return {"length": end, "element": None}
        element = _element(graph, stored)
        if element is None or axis not in (-1, len(shape) - 1) or set(shape[:-1]) != {1}:
            return Missed("it is neither a table of embeddings nor a row of numbers that follow a rule", stored)
        return {"length": end, "element": element}

    def rewrite(self, op: Op, rewriter: Rewriter, length: Value, element: Size | None, **_: Any) -> None:
        shape, dtype = op.result.tensor.shape, op.result.tensor.dtype
        if isinstance(element, int):
            sizes: tuple[Argument, ...] = (*(1 for _ in shape[:-1]), length)
            new = rewriter.insert("aten.full", sizes, element, attrs={"dtype": dtype}, types=[op.result.type])
            return rewriter.replace(op, new.result)
        along = TensorType(DType.i64, (shape[0 if element is None else -1],))
        place = rewriter.insert("aten.arange", length, types=[along], names=["place"]).result
        if element is None:
            new = rewriter.insert("aten.embedding", op["self"], place, types=[op.result.type])
            return rewriter.replace(op, new.result)
        for rank in range(2, len(shape) + 1):
            types = [TensorType(DType.i64, shape[-rank:])]
            place = rewriter.insert("aten.unsqueeze", place, 0, types=types, names=["place"]).result
        return rewriter.replace(op, place)


@dataclass(frozen=True)
class GatherOfOne(Rule):
    """gather(x, index)  ->  full_like(index, c), if all integers of x are c"""

    root: ClassVar[tuple[str, ...]] = ("aten.gather",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        index, number = op["index"], _element(graph, op["self"])
        if not isinstance(number, int) or index.type != op.result.type:
            return Missed("it does not gather from equal integers", op["self"])
        return {"index": index, "number": number}

    def rewrite(self, op: Op, rewriter: Rewriter, index: Value, number: int, **_: Any) -> None:
        rewriter.replace(op, rewriter.insert("aten.full_like", index, number, types=[op.result.type]).result)


def _element(graph: Graph, value: Value) -> Size | None:
    """Each integer of a value: one number, or PLACE if it is its index along the last axis; None if it is neither."""
    shape, dtype = value.tensor.shape, value.tensor.dtype
    at = (*(symbol(f"table.{axis}") for axis in range(len(shape) - 1)), PLACE)
    try:
        only = Elements(graph).element(value, at).only
    except (Unknown, TooComplex):
        return None
    if isinstance(only, int):
        return only
    return PLACE if only == PLACE and dtype is DType.i64 else None


@dataclass(frozen=True)
class PositionTables(Pass):
    """table[:n]  ->  embedding(table, arange(n))"""

    name: ClassVar[str] = "position-tables"
    effect: ClassVar[Effect] = Effect.EXACT

    def rules(self) -> Sequence[Rule]:
        """One rule for slices, one for elements of equal numbers."""
        return (NumberSlice(), GatherOfOne())
