"""Fuses two dequantizes and a matmul into one operation that never stores dequantized operands.

    %x_dq = quant.dequantize(%x_q, %x_s)
    %w_dq = quant.dequantize(%w_q, %w_s)
    %y_f32 = aten.linear(%x_dq, %w_dq, %b_f32)
    %y = aten._to_copy(%y_f32) {dtype = bf16}
  ->
    %y = quant.linear(%x_q, %x_s, %w_q, %w_s, %b) {out_dtype = bf16, …}

A cast after the matmul is fused only if the FP32 result has no other user.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qcompiler.dialects.quant import LEVELS
from qcompiler.ir import Argument, DType, Graph, Match, Missed, Op, Rewriter, Role, Rule, Value
from qcompiler.pass_manager.pipeline import Effect, Pass

NOT_QUANTIZED = Missed("none of its operands is quantized")
OUTPUTS = (DType.bf16, DType.f16)
"""Element types that the fused operation can round to."""


class DequantizeThenLinear(Rule):
    """linear(dequantize(x, xs), dequantize(w, ws), b)  ->  linear(x, xs, w, ws, b), with the cast after it, if any"""

    root = ("aten.linear",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        x, w, bias = op["input"].op, op["weight"].op, op.get("bias")
        plain = [value for value in (op["input"], op["weight"]) if value.op.role is not Role.DEQUANTIZE]
        if plain:
            return NOT_QUANTIZED if len(plain) == 2 else Missed("one of its operands is not quantized", plain[0])
        for value in (op["input"], op["weight"], op.result):
            if value.tensor.dtype is not DType.f32:
                return Missed(f"it multiplies in {value.tensor.dtype}, not in f32", value)
        if len(w.result.tensor.shape) != 2:
            return Missed("its weight is not a matrix", w.result)
        if bias is not None and bias.tensor.shape != w.result.tensor.shape[:1]:
            return Missed("its bias is not one number per column", bias)
        return {"x": x, "w": w, "bias": _before_cast(bias), "last": _cast_after(op, graph) or op}

    def rewrite(self, op: Op, rewriter: Rewriter, x: Op, w: Op, bias: Value | None, last: Op, **_: Any) -> None:
        args: list[Argument] = [x["data"], x["scale"], w["data"], w["scale"], bias]
        args += [side.get(level) for level in LEVELS for side in (x, w)]
        while args[-1] is None:
            args.pop()
        attrs: dict[str, Argument] = {"out_dtype": last.result.tensor.dtype}
        attrs |= {"w_format": w.format(), "x_format": x.format()}
        fused = rewriter.insert("quant.linear", *args, attrs=attrs)
        read = [op, *(value.op for _, value in op.operands())]
        rewriter.replace(last, fused.result)
        for unread in read:
            rewriter.erase_unread(unread)


def _before_cast(bias: Value | None) -> Value | None:
    """The bias in its original element type: the fused operation widens it to FP32."""
    if bias is not None and bias.op.name == "aten._to_copy" and bias.op.attrs == {"dtype": DType.f32}:
        source = bias.op["self"]
        return source if source.tensor.dtype in OUTPUTS else bias
    return bias


def _cast_after(op: Op, graph: Graph) -> Op | None:
    """The only user of a linear, if it only rounds to a narrower element type."""
    users = graph.users(op.result)
    if len(users) == 1 and users[0].name == "aten._to_copy" and users[0].attrs.get("dtype") in OUTPUTS:
        return users[0] if len(users[0].attrs) == 1 else None
    return None


@dataclass(frozen=True)
class FuseLinear(Pass):
    """dequantize · dequantize · linear  ->  quant.linear."""

    name: ClassVar[str] = "fuse-linear"
    effect: ClassVar[Effect] = Effect.REORDERS
    unrelated: ClassVar[tuple[Missed, ...]] = (NOT_QUANTIZED,)

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (DequantizeThenLinear(),)
