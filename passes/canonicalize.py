"""Brings the many spellings of a matmul with a constant weight to one, `aten.linear`, and drops what does nothing.

    aten.mm(%x, %w)           ->  aten.linear(%x, aten.t(%w))
    aten.matmul(%x, %w)       ->  aten.linear(%x, aten.t(%w))
    aten.addmm(%b, %x, %w)    ->  aten.linear(%x, aten.t(%w), %b)
    aten.t(aten.t(%w))        ->  %w
    aten.clone(%x)            ->  %x          and casts, views and dropouts that change nothing

First in every pipeline: the other passes then know one spelling only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Rule, TensorType, Value
from qcompiler.pass_manager import Effect, Pass


class MatmulToLinear(Rule):
    """mm(x, w), matmul(x, w), addmm(b, x, w)  ->  linear(x, t(w), b), for a constant 2-D w"""

    root = ("aten.mm", "aten.matmul", "aten.addmm")

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        bias = op.tensor(0) if op.name == "aten.addmm" else None
        x, w = op.tensor(-2), op.tensor(-1)
        if not graph.is_constant(w):
            return Missed("its right operand is computed from the inputs", w)
        if len(w.tensor.shape) != 2:
            return Missed(f"its right operand has {len(w.tensor.shape)} dimensions, not 2", w)
        if op.attrs:
            return Missed(f"it scales its operands: {', '.join(sorted(op.attrs))} is given")
        if bias is not None and bias.tensor.shape != w.tensor.shape[1:]:
            return Missed("what it adds is no bias of one number a column", bias)
        return {"x": x, "w": w, "bias": bias}

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, w: Value, bias: Value | None, **_: Any) -> None:
        k, n = w.tensor.shape
        transposed = rewriter.insert("aten.t", w, types=[TensorType(w.tensor.dtype, (n, k))], names=[f"{w.name}_t"])
        args = (x, transposed.result) if bias is None else (x, transposed.result, bias)
        linear = rewriter.insert("aten.linear", *args, types=[op.result.type])
        rewriter.replace(op, linear.result)


class TransposeTwice(Rule):
    """t(t(x))  ->  x, also when either is spelled transpose or permute"""

    root = ("aten.t", "aten.transpose.int", "aten.permute")

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        inner = op.tensor(0).op
        if not swaps_both(op):
            return Missed("it does not swap the two dimensions of a matrix")
        if inner.name not in self.root or not swaps_both(inner):
            return Missed("its input is no transposed matrix", op.tensor(0))
        return {"x": inner.tensor(0)}

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, **_: Any) -> None:
        inner = op.tensor(0).op
        rewriter.replace(op, x)
        rewriter.erase_unread(inner)


def swaps_both(op: Op) -> bool:
    """Whether `op` transposes a matrix."""
    if len(op.tensor(0).tensor.shape) != 2:
        return False
    if op.name == "aten.t":
        return True
    axes = op.args[1] if op.name == "aten.permute" else op.args[1:]
    return isinstance(axes, tuple) and tuple(axis % 2 for axis in axes if isinstance(axis, int)) in ((1, 0), (0, 1)) and (
        op.name == "aten.transpose.int" or axes[0] in (1, -1)
    )


class DropNoOp(Rule):
    """clone(x), cast to its own type, view to its own shape, dropout outside of training  ->  x"""

    root = (
        "aten.clone", "aten._to_copy", "aten.to.dtype", "aten.view", "aten.reshape", "aten.expand", "aten.alias",
        "aten.detach", "aten.lift_fresh_copy", "aten.dropout", "aten.contiguous",
    )  # fmt: skip

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        x = op.tensor(0)
        if x.type != op.result.type:
            return Missed(f"it changes {x.type} to {op.result.type}")
        if op.name == "aten.dropout" and op.args[2] is not False:
            return Missed("it drops elements")
        if any(key in op.attrs for key in ("memory_format", "device", "layout")):
            return Missed("it may change the order in memory")
        if x.op.name in ("core.input", "core.buffer") and graph.return_op in graph.users(op.result):
            return Missed("an output must not be the very tensor that came in", x)
        return {"x": x}

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, **_: Any) -> None:
        rewriter.replace(op, x, keep_names=False)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """mm, matmul, addmm with a constant matrix  ->  linear;  what does nothing  ->  nothing."""

    name: ClassVar[str] = "canonicalize"
    effect: ClassVar[Effect] = Effect.REORDERS

    def rules(self) -> Sequence[Rule]:
        """Spelling first, then what the new spelling makes superfluous."""
        return (MatmulToLinear(), TransposeTwice(), DropNoOp())

    def explain(self, graph: Graph) -> dict[str, str]:
        """Only matmuls are worth a reason: that a view is not a no-op surprises nobody."""
        matmul = MatmulToLinear()
        misses = ((op, matmul.match(op, graph)) for op in graph.ops() if op.name in matmul.root)
        return {op.result.name: str(missed) for op, missed in misses if isinstance(missed, Missed)}
