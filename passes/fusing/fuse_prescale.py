"""Fuses a per-channel multiplication of an activation into the quantization after it.

    %x_f32 = aten.mul.Tensor(%x, %factors) : f32[s0, 256]         factors: a constant vector
    %x_smooth = aten._to_copy(%x_f32) {dtype = bf16}
    %q, %s = quant.quantize(%x_smooth) {…}
  ->
    %q, %s = quant.quantize(%x, %factors) {…}

The scaled activation is then never stored, and never rounded to bf16. Where that rounding decided between two codes,
the code may change: about half the error of the quantization itself in bf16, none in FP32 or for powers of two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qcompiler.ir import DType, Graph, Match, Missed, Op, Rewriter, Rule, Value
from qcompiler.pass_manager.pipeline import Effect, Pass


class MulThenQuantize(Rule):
    """quantize(mul(x, factors))  ->  quantize(x, factors), with the cast between them, if any"""

    root = ("quant.quantize", "quant.quantize_static")

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if op.get("prescale") is not None:
            return Missed("it already has a prescale")
        product = op["x"].op
        if product.name == "aten._to_copy" and set(product.attrs) == {"dtype"}:
            product = product["self"].op
        left, right = (product.get("self"), product.get("other")) if product.name == "aten.mul.Tensor" else (None, None)
        if left is None or right is None:
            return Missed("its input is not a multiplication", op["x"])
        for x, factors in ((left, right), (right, left)):
            if self.scales_channels(x, factors, graph):
                return {"x": x, "factors": factors}
        return Missed("its input is not an activation times a constant FP32 vector", op["x"])

    def scales_channels(self, x: Value, factors: Value, graph: Graph) -> bool:
        """Whether `factors` is a constant with one number per channel, multiplied in FP32."""
        if not graph.is_constant(factors) or graph.is_constant(x) or factors.tensor.dtype is not DType.f32:
            return False
        return x.tensor.dtype.bits <= 32 and x.tensor.dtype.is_float and factors.tensor.shape == x.tensor.shape[-1:]

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, factors: Value, **_: Any) -> None:
        product = op["x"].op
        scale = op.get("scale")
        args = (x, *([] if scale is None else [scale]), factors)
        rewriter.replace(op, *rewriter.insert(op.name, *args, attrs=op.attrs).results)
        rewriter.erase_unread(product)


@dataclass(frozen=True)
class FusePrescale(Pass):
    """quantize(mul(x, factors))  ->  quantize(x, factors)."""

    name: ClassVar[str] = "fuse-prescale"
    effect: ClassVar[Effect] = Effect.LOSSY
    budget: ClassVar[float] = 0.05

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (MulThenQuantize(),)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Nothing: an input that is not a multiplication needs no prescale."""
        return {}
