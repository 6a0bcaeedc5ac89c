"""Fuses elementwise arithmetic and the quantization after it into one operation.

    %g = aten.silu(%gate)
    %h = aten.mul.Tensor(%g, %up)
    %h_q, %h_s = kernel.quantize(%h) {…}
  ->
    %h_q, %h_s = kernel.fused_quantize(%gate, %up) {expression = "bf16(bf16(silu(x0)) * x1)", keep = [], …}

Runs after fuse-norm-quantize, which fuses row reductions. The fused expression rounds where the operations did. Results
are bit-exact, except where torch has several ways to compute a function: on a CPU, gelu in f16, and 1 / sqrt in bf16
and f16, whose last elements torch computes differently from those that fill a vector register.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from passes.fusing.fused_producer import TURNED_CODES, ArithmeticThenQuantize
from qcompiler.ir import Rule
from qcompiler.pass_manager.pipeline import Effect, Pass


@dataclass(frozen=True)
class FuseActivationQuantize(Pass):
    """quantize(silu(x) * y)  ->  fused_quantize(x, y)."""

    name: ClassVar[str] = "fuse-activation-quantize"
    effect: ClassVar[Effect] = Effect.REORDERS
    budget: ClassVar[float] = TURNED_CODES

    def rules(self) -> Sequence[Rule]:
        """One rule, for arithmetic without a reduction over the row."""
        return (ArithmeticThenQuantize(across=False),)
