"""Rules for operations that read or write ranges of an axis in an indirect way: they become slices and concatenations.

aten.index.Tensor(%x, [None, %i])                          ->  aten.slice.Tensor(%x, 1, 4, 6)      if %i holds [4, 5]
aten.slice_scatter(slice_scatter(%e, %a, 1, 0, 4), %b, 1, 4, 6)  ->  aten.cat([%a, %b], 1)         if %e has 6 columns
"""

from typing import Any

from passes.analyses.memory import why_not_replaced
from passes.analyses.sharding_factors import axis_of, range_of
from passes.analyses.stored_indices import is_count
from qcompiler.ir import DType, Graph, Match, Missed, Op, Rewriter, Rule, TensorType, Value
from qcompiler.ir.graph import PARAM
from qcompiler.ir.op import Tag

MOST = 1 << 16
"""Maximum number of indices that are read."""


class IndexToSlice(Rule):
    """index(x, [None, [4, 5]])  ->  clone(slice(x, 1, 4, 6))

    The copy has the strides of the result of the index.
    """

    root = ("aten.index.Tensor",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        tensors, listed = _tensors(op, "self"), op.argument("indices")
        axes = [(axis, at) for axis, at in enumerate(listed if isinstance(listed, tuple) else ()) if at is not None]
        if not tensors or len(axes) != 1 or not isinstance(at := axes[0][1], Value):
            return Missed("it has several indices")
        (x,), axis = tensors, axes[0][0]
        if at.op.name != PARAM or str(at.op.attrs["name"]) not in graph.weights:
            return Missed("its index is not stored", at)
        if len(at.tensor.shape) != 1 or at.tensor.dtype not in (DType.i64, DType.i32):
            return Missed("its index is not a vector of integers", at)
        (count,), size = at.tensor.shape, x.tensor.shape[axis]
        if not isinstance(size, int) or not isinstance(count, int) or not 0 < count <= MOST:
            return Missed("the number of its indices, or the size of the axis, is not fixed", at)
        numbers = graph.weights[str(at.op.attrs["name"])]
        first = int(numbers[0])
        begin = first + size if first < 0 else first
        if not is_count(numbers) or begin < 0 or begin + count > size or first < 0 < first + count:
            return Missed("its indices are not a range of the axis", at)
        return {"x": x, "axis": axis, "begin": begin, "end": begin + count}

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, axis: int, begin: int, end: int, **_: Any) -> None:
        kind, index = op.result.type, next(value for _, value in op.operands() if value is not x)
        part = rewriter.insert("aten.slice.Tensor", x, axis, begin, end, types=[kind]).result
        attrs = {"memory_format": Tag("contiguous_format")}
        rewriter.replace(op, rewriter.insert("aten.clone", part, attrs=attrs, types=[kind]).result)
        rewriter.erase_unread(index.op)


class ScatterToCat(Rule):
    """slice_scatter(slice_scatter(e, a, 1, 0, 4), b, 1, 4, 6)  ->  cat([a, b], 1), if that is all of e"""

    root = ("aten.slice_scatter",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        written: list[tuple[int, int, Value]] = []
        if (axis := _axis(op)) is None:
            return Missed("its axis is not fixed")
        scatter, base = op, op.result
        while scatter.name in self.root and _axis(scatter) == axis:
            tensors, limits = _tensors(scatter, "self", "src"), range_of(scatter, scatter.result.tensor.shape[axis])
            if not tensors or limits is None or tensors[1].tensor.dtype is not scatter.result.tensor.dtype:
                return Missed("it casts what it writes, or writes no fixed range", base)
            written.append((*limits, tensors[1]))
            base, scatter = tensors[0], tensors[0].op
        written.sort(key=lambda each: each[:2])
        ends = [0, *(end for _, end, _ in written)]
        if [*(start for start, *_ in written), op.result.tensor.shape[axis]] != ends:
            return Missed("it keeps elements of its first operand, or writes some twice", base)
        return {"parts": tuple(source for *_, source in written), "axis": axis}

    def rewrite(self, op: Op, rewriter: Rewriter, parts: tuple[Value, ...], axis: int, **_: Any) -> None:
        base = op["self"].op
        rewriter.replace(op, rewriter.insert("aten.cat", parts, axis, types=[op.result.type]).result)
        rewriter.erase_unread(base)


class DropCopy(Rule):
    """copy(x, y)  ->  y, if y has the type of x"""

    root = ("aten.copy",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if not (tensors := _tensors(op, "self", "src")):
            return Missed("it copies no tensor")
        _, source = tensors
        if source.type != op.result.type:
            return Missed(f"it changes {source.type} to {op.result.type}")
        return why_not_replaced(graph, op.result, source) or {"source": source}

    def rewrite(self, op: Op, rewriter: Rewriter, source: Value, **_: Any) -> None:
        base = op["self"].op
        rewriter.replace(op, source, keep_names=False)
        rewriter.erase_unread(base)


def _tensors(op: Op, *names: str) -> list[Value]:
    """Operands of an operation, if they and its only result are tensors; nothing otherwise."""
    found = [value for name in names if (value := op.get(name)) is not None]
    tensors = all(isinstance(value.type, TensorType) for value in (*found, *op.results))
    return found if tensors and len(found) == len(names) and len(op.results) == 1 else []


def _axis(op: Op) -> int | None:
    """The axis of a scatter, from 0; None if it is not fixed."""
    shape = op.result.tensor.shape if _tensors(op, "self") else ()
    return axis_of(op, "dim", len(shape)) if shape else None
