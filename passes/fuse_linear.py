"""Fuses dequantize, dequantize and matmul to one operation that never stores what it dequantized.

    %x_dq = quant.dequantize(%x_q, %x_s)
    %w_dq = quant.dequantize(%w_q, %w_s)
    %y_f32 = aten.linear(%x_dq, %w_dq, %b_f32)
    %y = aten._to_copy(%y_f32) {dtype = bf16}
  ->
    %y = quant.linear(%x_q, %x_s, %w_q, %w_s, %b) {out_dtype = bf16, …}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qcompiler.ir import DType, Graph, Match, Missed, Op, Rewriter, Rule, Value
from qcompiler.pass_manager import Effect, Pass


class DequantizeThenLinear(Rule):
    """linear(dequantize(x, xs), dequantize(w, ws), b)  ->  linear(x, xs, w, ws, b), with the cast behind it, if any"""

    root = ("aten.linear",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        x, w = op.tensor(0).op, op.tensor(1).op
        if x.name != "quant.dequantize" or w.name != "quant.dequantize":
            return Missed("its operands are not both dequantized")
        if op.result.tensor.dtype is not DType.f32:
            return Missed(f"it multiplies in {op.result.tensor.dtype}, not in f32")
        bias = op.args[2] if len(op.args) > 2 else None
        return {"x": x, "w": w, "bias": _before_cast(bias), "last": _cast_behind(op, graph) or op}

    def rewrite(self, op: Op, rewriter: Rewriter, x: Op, w: Op, bias: Value | None, last: Op, **_: Any) -> None:
        attrs = {"out_dtype": last.result.tensor.dtype, "x_block": x.attrs["block"], "w_block": w.attrs["block"]}
        args = [*x.args, *w.args, *([] if bias is None else [bias])]
        fused = rewriter.insert("quant.linear", *args, attrs=attrs)
        rewriter.replace(last, fused.result)
        rewriter.erase_unread(op)


def _before_cast(bias: Any) -> Value | None:
    """The bias in its own element type: the fused operation widens it by itself."""
    if isinstance(bias, Value) and bias.op.name == "aten._to_copy" and set(bias.op.attrs) == {"dtype"}:
        return bias.op.tensor(0)
    return bias if isinstance(bias, Value) else None


def _cast_behind(op: Op, graph: Graph) -> Op | None:
    """The only reader of a linear, when it does nothing but round to another element type."""
    users = graph.users(op.result)
    if len(users) == 1 and users[0].name == "aten._to_copy" and set(users[0].attrs) == {"dtype"}:
        return users[0] if users[0].result.tensor.dtype.is_float else None
    return None


@dataclass(frozen=True)
class FuseLinear(Pass):
    """dequantize · dequantize · linear  ->  quant.linear."""

    name: ClassVar[str] = "fuse-linear"
    effect: ClassVar[Effect] = Effect.REORDERS

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (DequantizeThenLinear(),)
