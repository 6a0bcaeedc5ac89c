"""Makes one operation of a norm, the residual sum in front of it, and the quantization behind it.

    %h = aten.add.Tensor(%x, %r)                         %h is read elsewhere, too
    %n = aten.rms_norm(%h, [256], %w, 1e-06)
    %n_q, %n_s = kernel.quantize(%n) {…}
  ->
    %n_q, %n_s, %h = kernel.fused_quantize(%x, %r, %w) {body = "h0 = bf16(x0 + x1); …", keep = ["h0"], …}

It works for whatever reduces rows by means and is arithmetic else, however the model spells it. The body rounds where
the operations did. Bits are equal but where torch does not compute a row by row sum and a product in FP32 on their own:
a layer norm of FP32 tensors multiplies by the gain and adds the bias at once, and one of f16 sums in another order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from passes.fusing.fused_producer import NO_REDUCTION, TURNED_CODES, ArithmeticThenQuantize
from qcompiler.ir import Graph, Rule
from qcompiler.pass_manager.pipeline import Effect, Pass


@dataclass(frozen=True)
class FuseNormQuantize(Pass):
    """quantize(norm(x + r))  ->  fused_quantize(x, r), which keeps the sum for others."""

    name: ClassVar[str] = "fuse-norm-quantize"
    effect: ClassVar[Effect] = Effect.REORDERS
    budget: ClassVar[float] = TURNED_CODES

    def rules(self) -> Sequence[Rule]:
        """One rule, for arithmetic with a reduction over the row."""
        return (ArithmeticThenQuantize(across=True),)

    def explain(self, graph: Graph) -> dict[str, str]:
        """What no reduction computes needs no reason: it is none of this pass's business."""
        return {name: why for name, why in super().explain(graph).items() if why != str(NO_REDUCTION)}
