"""Hands the quantized operations over to code generation, and settles the order of the scales in memory.

    %x_q, %x_s = quant.quantize(%x) {…}          ->  %x_q, %x_s = kernel.quantize(%x) {…, scale_layout = "col_major"}
    %x_q = quant.quantize_static(%x, %x_s) {…}   ->  %x_q = kernel.quantize_static(%x, %x_s) {…}
    %y = quant.linear(%x_q, %x_s, %w_q, %w_s)    ->  %y = kernel.scaled_linear(…) {…, x_scale_layout = "col_major"}
    %y = quant.grouped_linear(…, %offsets)       ->  %y = kernel.grouped_linear(…) {…, x_scale_layout = "col_major"}

Only the scales of an activation's tiles have a layout: with one scale a row, or fewer, it makes no difference.
Last in the pipeline: what is still in the quant dialect afterwards runs in plain torch. A scale for each channel stays
there: it varies along the sum, so no tensor core could apply it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qcompiler.dialects.quant import block_of
from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Role, Rule
from qcompiler.numerics import ALL
from qcompiler.pass_manager import Effect, Pass

KERNELS = {"quant.linear": "kernel.scaled_linear", "quant.grouped_linear": "kernel.grouped_linear"}
SIMULATED = "its scales vary from channel to channel, along the sum, where no tensor core can apply them"


@dataclass(frozen=True)
class QuantizeToKernel(Rule):
    """quant.quantize  ->  kernel.quantize, for an activation"""

    layout: str
    root: ClassVar[tuple[str, ...]] = ("quant.quantize",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        scale, (rows, columns) = op.results[1], block_of(op, "block")
        if columns == 1:
            return Missed(SIMULATED)
        for use in graph.uses(scale):
            if use.op.role is not Role.QUANTIZED_MATMUL:
                return Missed(f"its scales are also read by {use.op.name}, which knows one layout only", scale)
            if use.path != use.op.path("x_scale"):
                return Missed("its scales are read as those of a weight, which have one layout only", scale)
        return {"layout": self.layout if rows == 1 and columns != ALL else "row_major"}

    def rewrite(self, op: Op, rewriter: Rewriter, layout: str, **_: Any) -> None:
        made = rewriter.insert("kernel.quantize", *op.args, attrs={**op.attrs, "scale_layout": layout})
        rewriter.replace(op, *made.results)


class StaticToKernel(Rule):
    """quant.quantize_static  ->  kernel.quantize_static"""

    root = ("quant.quantize_static",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        return Missed(SIMULATED) if block_of(op, "block")[1] == 1 else {}

    def rewrite(self, op: Op, rewriter: Rewriter, **_: Any) -> None:
        rewriter.replace(op, rewriter.insert("kernel.quantize_static", *op.args, attrs=op.attrs).result)


@dataclass(frozen=True)
class LinearToKernel(Rule):
    """quant.linear  ->  kernel.scaled_linear; quant.grouped_linear  ->  kernel.grouped_linear"""

    root: ClassVar[tuple[str, ...]] = tuple(KERNELS)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if block_of(op, "x_block")[1] == 1:
            return Missed(SIMULATED)
        return {"layout": op["x_scale"].op.attrs.get("scale_layout", "row_major")}

    def rewrite(self, op: Op, rewriter: Rewriter, layout: str, **_: Any) -> None:
        made = rewriter.insert(KERNELS[op.name], *op.args, attrs={**op.attrs, "x_scale_layout": layout})
        rewriter.replace(op, made.result)


@dataclass(frozen=True)
class ToKernels(Pass):
    """quant  ->  kernel.

    Attributes:
        scale_layout: Order of the activation's scales in memory.
    """

    name: ClassVar[str] = "to-kernels"
    effect: ClassVar[Effect] = Effect.EXACT

    scale_layout: Literal["row_major", "col_major"] = "col_major"

    def rules(self) -> Sequence[Rule]:
        """Producers first, since the layout is theirs to say."""
        return (QuantizeToKernel(self.scale_layout), StaticToKernel(), LinearToKernel())
