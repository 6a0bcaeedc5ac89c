"""Fuses a norm, the residual sum before it, and the quantization after it into one operation.

    %h = aten.add.Tensor(%x, %r)                         %h is read elsewhere, too
    %n = aten.rms_norm(%h, [256], %w, 1e-06)
    %n_q, %n_s = kernel.quantize(%n) {…}
  ->
    %n_q, %n_s, %h = kernel.fused_quantize(%x, %r, %w) {expression = "h0 = bf16(x0 + x1); …", keep = ["h0"], …}

It fuses any arithmetic that reduces rows by means, however the model writes it. The expression rounds where the
operations did. Results are bit-exact, except where torch fuses or reorders FP32 operations: a layer norm of FP32
tensors multiplies by the gain and adds the bias in one step, and a layer norm of f16 tensors sums in another order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from passes.fusing.fused_producer import NO_REDUCTION, TURNED_CODES, ArithmeticThenQuantize
from qcompiler.ir import Missed, Rule
from qcompiler.pass_manager.pipeline import Effect, Pass


@dataclass(frozen=True)
class FuseNormQuantize(Pass):
    """quantize(norm(x + r))  ->  fused_quantize(x, r), with the sum as residual output."""

    name: ClassVar[str] = "fuse-norm-quantize"
    effect: ClassVar[Effect] = Effect.REORDERS
    budget: ClassVar[float] = TURNED_CODES
    unrelated: ClassVar[tuple[Missed, ...]] = (NO_REDUCTION,)

    def rules(self) -> Sequence[Rule]:
        """One rule, for arithmetic with a reduction over the row."""
        return (ArithmeticThenQuantize(across=True),)
