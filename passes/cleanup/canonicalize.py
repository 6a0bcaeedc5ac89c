"""Rewrites all forms of a matmul with a constant weight to `aten.linear`, and removes no-ops.

    aten.mm(%x, %w)           ->  aten.linear(%x, aten.t(%w))            also matmul
    aten.addmm(%b, %x, %w)    ->  aten.linear(%x, aten.t(%w), %b)
    aten.bmm(%x, %w)          ->  aten.linear(%x, aten.t(aten.squeeze(%w)))   for a batch of one matrix
    aten.inner(%x, %w)        ->  aten.linear(%x, %w)
    aten.t(aten.t(%w))        ->  %w
    aten.clone(%x)            ->  %x          and casts, views and dropouts that change nothing
    aten.masked_fill(%x, %m)  ->  %x          if %m is proven to be false everywhere
    aten.clamp(%i, 0, 7)      ->  %i          if the integers %i are proven to be inside
    aten.index(%x, [[4, 5]])  ->  aten.slice(%x, 0, 4, 6)             and other ranges of an axis: see `axis_ranges`
    aten.linear(%b, %w)       ->  aten.linear(%a, %w)     if %b is computed like %a, an earlier value

First in every pipeline, so that later passes handle one form only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from passes.analyses.equal_values import equal_values
from passes.analyses.integer_ranges import is_false, limits_of
from passes.analyses.memory import is_view, why_not_replaced
from passes.cleanup.axis_ranges import DropCopy, IndexToSlice, ScatterToCat
from qcompiler.ir import Argument, Graph, Match, Missed, Op, Rewriter, Rule, TensorType, Value
from qcompiler.pass_manager.pipeline import Effect, Pass


class MatmulToLinear(Rule):
    """mm(x, w), matmul(x, w), bmm(x, w), addmm(b, x, w), inner(x, w)  ->  linear(x, w', b), for a constant matrix w"""

    root = ("aten.mm", "aten.matmul", "aten.addmm", "aten.bmm", "aten.inner")

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        bias = op["self"] if op.name == "aten.addmm" else None
        x, w = op["x"], op["w"]
        lead, matrix, dimensions = w.tensor.shape[:-2], w.tensor.shape[-2:], len(w.tensor.shape)
        if not graph.is_constant(w):
            return Missed("its right operand is computed from the inputs", w)
        if graph.is_constant(x):
            return Missed("both of its operands are constant", x)
        if len(matrix) < 2:
            return Missed("its right operand is a vector, not a matrix", w)
        flat = op.name != "aten.inner" and dimensions <= len(x.tensor.shape)
        if lead and not (flat and all(size == 1 for size in lead)):
            return Missed(f"its right operand has {dimensions} dimensions, not 2", w)
        if op.attrs:
            return Missed(f"it scales its operands: {', '.join(sorted(op.attrs))} is given")
        if bias is not None and bias.tensor.shape != matrix[1:]:
            return Missed("its addend is not a bias of one number per column", bias)
        return {"x": x, "w": w, "bias": bias}

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, w: Value, bias: Value | None, **_: Any) -> None:
        dtype, matrix = w.tensor.dtype, w.tensor.shape[-2:]
        if lead := tuple(range(len(w.tensor.shape) - 2)):
            kind = TensorType(dtype, matrix)
            w = rewriter.insert("aten.squeeze.dims", w, lead, types=[kind], names=[f"{w.name}_matrix"]).result
        if op.name != "aten.inner":
            kind = TensorType(dtype, matrix[::-1])
            w = rewriter.insert("aten.t", w, types=[kind], names=[f"{w.name}_t"]).result
        args = (x, w) if bias is None else (x, w, bias)
        rewriter.replace(op, rewriter.insert("aten.linear", *args, types=[op.result.type]).result)


class TransposeTwice(Rule):
    """t(t(x))  ->  x, also if either is written as transpose or permute"""

    root = ("aten.t", "aten.transpose.int", "aten.permute")

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if not swaps_both(op):
            return Missed("it does not swap the two dimensions of a matrix")
        inner = op["self"].op
        if inner.name not in self.root or not swaps_both(inner):
            return Missed("its input is not a transposed matrix", op["self"])
        return {"inner": inner}

    def rewrite(self, op: Op, rewriter: Rewriter, inner: Op, **_: Any) -> None:
        rewriter.replace(op, inner["self"])
        rewriter.erase_unread(inner)


def swaps_both(op: Op) -> bool:
    """Whether `op`, a permutation of dimensions, transposes a matrix."""
    if len(op["self"].tensor.shape) != 2:
        return False
    if op.name == "aten.t":
        return True
    axes = op.argument("dims") if op.name == "aten.permute" else (op.argument("dim0"), op.argument("dim1"))
    order = [axis % 2 for axis in axes if isinstance(axis, int)] if isinstance(axes, tuple) else []
    return order == [1, 0] or (order == [0, 1] and op.name == "aten.transpose.int")


class DropNoOp(Rule):
    """clone(x), cast to its own type, view to its own shape, dropout outside training  ->  x"""

    root = (
        "aten.clone", "aten._to_copy", "aten.to.dtype", "aten.view", "aten.reshape", "aten.expand", "aten.alias",
        "aten.detach", "aten.lift_fresh_copy", "aten.dropout",
    )  # fmt: skip

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        x = op["input" if op.name == "aten.dropout" else "self"]
        if x.type != op.result.type:
            return Missed(f"it changes {x.type} to {op.result.type}")
        if op.name == "aten.dropout" and op.argument("train") is not False:
            return Missed("it drops elements")
        strange = sorted(set(op.attrs) - {"dtype", "train"})
        if strange or (op.name == "aten.to.dtype" and len(op.args) > 2):
            return Missed(f"it may have another effect: {strange[0] if strange else 'copy'} is given")
        # A view shares the memory of its input; a copy has its own.
        return (None if is_view(op) else why_not_replaced(graph, op.result, x)) or {"x": x}

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, **_: Any) -> None:
        rewriter.replace(op, x, keep_names=False)


class DropFill(Rule):
    """masked_fill(x, mask, value)  ->  x, for a mask that is proven to be false everywhere

    Such as the mask of entries whose expert is beyond the last one: experts are places along the axis of the scores.
    """

    root = ("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        x, mask = op["self"], op["mask"]
        if x.type != op.result.type:
            return Missed(f"it broadcasts {x.type} to {op.result.type}", x)
        if not is_false(graph, mask):
            return Missed("its mask may be true", mask)
        return why_not_replaced(graph, op.result, x) or {"x": x}

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, **_: Any) -> None:
        rewriter.replace(op, x, keep_names=False)


class DropClamp(Rule):
    """clamp(x, low, high)  ->  x, for integers that are proven to be inside

    Such as experts, before they index the biases of all experts.
    """

    root = ("aten.clamp",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        x, known = op["self"], limits_of(op["self"])
        low, high = op.argument("min"), op.argument("max")
        if known is None or not isinstance(known.low, int) or not isinstance(known.high, int):
            return Missed("its operand has no known limits", x)
        inside = (low is None or _is_most(low, known.low)) and (high is None or _is_most(known.high, high))
        if not inside or x.type != op.result.type:
            return Missed(f"its operand may be from {known.low} to {known.high}", x)
        return why_not_replaced(graph, op.result, x) or {"x": x}

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, **_: Any) -> None:
        rewriter.replace(op, x, keep_names=False)


def _is_most(low: Argument, high: Argument) -> bool:
    return isinstance(low, int) and isinstance(high, int) and low <= high


@dataclass(frozen=True)
class Canonicalize(Pass):
    """mm, matmul, addmm, … with a constant matrix  ->  linear;  no-ops are removed, and equal inputs become one."""

    name: ClassVar[str] = "canonicalize"
    effect: ClassVar[Effect] = Effect.REORDERS

    def rules(self) -> Sequence[Rule]:
        """Rewrites come first, then removal of operations they make redundant."""
        forms = MatmulToLinear(), TransposeTwice(), IndexToSlice(), ScatterToCat()
        return (*forms, DropNoOp(), DropCopy(), DropFill(), DropClamp())

    def run(self, graph: Graph) -> bool:
        """Applies the rules; then linears with equal inputs read one of them, and can be merged and share a scale."""
        changed = super().run(graph)
        equal = equal_values(graph)
        inputs = ((op, op.argument("input")) for op in graph.ops("aten.linear"))
        repeated = {op: old for op, old in inputs if isinstance(old, Value) and old in equal}
        for op, old in repeated.items():
            graph.replace_in(op, old, equal[old])
        rewriter = Rewriter(graph, graph.return_op, self.name)
        for old in repeated.values():  # last, because a linear may be among the operations that compute another's input
            rewriter.erase_unread(old.op)
        return changed or bool(repeated)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Reports reasons for matmuls only: views that are not no-ops are expected."""
        return {name: why for name, why in super().explain(graph).items() if MatmulToLinear().starts_at(graph[name].op)}
