"""Hands the quantized operations over to code generation, and settles the order of the scales in memory.

    %x_q, %x_s = quant.quantize(%x) {…}          ->  %x_q, %x_s = kernel.quantize(%x) {…, scale_layout = "col_major"}
    %y = quant.linear(%x_q, %x_s, %w_q, %w_s)    ->  %y = kernel.scaled_linear(…) {…, x_scale_layout = "col_major"}

Last in the pipeline: what is still in the quant dialect afterwards runs in plain torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Rule
from qcompiler.pass_manager import Effect, Pass


@dataclass(frozen=True)
class QuantizeToKernel(Rule):
    """quant.quantize  ->  kernel.quantize"""

    layout: str
    root: ClassVar[tuple[str, ...]] = ("quant.quantize",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        readers = graph.users(op.results[1])
        if others := [reader for reader in readers if reader.name not in ("quant.linear", "kernel.scaled_linear")]:
            return Missed(f"its scales are also read by {others[0].name}, which knows one layout only")
        return {}

    def rewrite(self, op: Op, rewriter: Rewriter, **_: Any) -> None:
        made = rewriter.insert("kernel.quantize", *op.args, attrs={**op.attrs, "scale_layout": self.layout})
        rewriter.replace(op, *made.results)


@dataclass(frozen=True)
class LinearToKernel(Rule):
    """quant.linear  ->  kernel.scaled_linear"""

    root: ClassVar[tuple[str, ...]] = ("quant.linear",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        producer = op.tensor(1).op
        layout = producer.attrs["scale_layout"] if producer.name == "kernel.quantize" else "row_major"
        return {"layout": layout}

    def rewrite(self, op: Op, rewriter: Rewriter, layout: str, **_: Any) -> None:
        made = rewriter.insert("kernel.scaled_linear", *op.args, attrs={**op.attrs, "x_scale_layout": layout})
        rewriter.replace(op, made.result)


@dataclass(frozen=True)
class ToKernels(Pass):
    """quant  ->  kernel.

    Attributes:
        scale_layout: Order of the activation's scales in memory: row_major or col_major.
    """

    name: ClassVar[str] = "to-kernels"
    effect: ClassVar[Effect] = Effect.EXACT

    scale_layout: str = "col_major"

    def rules(self) -> Sequence[Rule]:
        """Producers first, since the layout is theirs to say."""
        return (QuantizeToKernel(self.scale_layout), LinearToKernel())
