"""Lowers quantized operations to the kernel dialect and sets the memory layout of scales.

    %x_q, %x_s = quant.quantize(%x) {format = #fp8_tile}
    %y = quant.linear(%x_q, %x_s, %w_q, %w_s) {x_format = #fp8_tile, …}
  ->
    %x_q, %x_s = kernel.quantize(%x) {format = #fp8_tile<scale_layout = "col_major">}
    %y = kernel.scaled_linear(%x_q, %x_s, %w_q, %w_s) {x_format = #fp8_tile<scale_layout = "col_major">, …}

The same applies to quant.quantize_static and quant.grouped_linear. Only the tile scales of an activation have a layout:
with one scale per row or fewer, it makes no difference. Last in the pipeline: operations that remain in the quant
dialect, because no kernel supports their format, run in plain torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from qcompiler.dialects.kernel import why_no_kernel
from qcompiler.ir import ALL, Format, Graph, Match, Missed, Op, Rewriter, Role, Rule
from qcompiler.pass_manager.pipeline import Effect, Pass

KERNELS = {"quant.linear": "kernel.scaled_linear", "quant.grouped_linear": "kernel.grouped_linear"}


def why_not(op: Op) -> str | None:
    """Why no kernel runs an operation, by its formats; None if one does."""
    formats = (value for value in op.attrs.values() if isinstance(value, Format))
    return next(filter(None, map(why_no_kernel, formats)), None)


@dataclass(frozen=True)
class QuantizeToKernel(Rule):
    """quant.quantize  ->  kernel.quantize, for an activation"""

    layout: Literal["row_major", "col_major"]
    root: ClassVar[tuple[str, ...]] = ("quant.quantize",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if why := why_not(op):
            return Missed(why)
        scale, format = op.results[1], op.format()
        for use in graph.uses(scale):
            if use.op.role is not Role.QUANTIZED_MATMUL:
                return Missed(f"its scales are also read by {use.op.name}, which supports one layout only", scale)
            if use.path != use.op.path("x_scale"):
                return Missed("its scales are read as weight scales, which have one layout only", scale)
            if why := why_not(use.op):
                return Missed(why, use.op.result)
        rows, columns = format.block
        return {"format": replace(format, scale_layout=self.layout) if rows == 1 and columns != ALL else format}

    def rewrite(self, op: Op, rewriter: Rewriter, format: Format, **_: Any) -> None:
        rewriter.replace(op, *rewriter.insert("kernel.quantize", *op.args, attrs={"format": format}).results)


class StaticToKernel(Rule):
    """quant.quantize_static  ->  kernel.quantize_static"""

    root = ("quant.quantize_static",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        return Missed(why) if (why := why_not(op)) else {}

    def rewrite(self, op: Op, rewriter: Rewriter, **_: Any) -> None:
        rewriter.replace(op, rewriter.insert("kernel.quantize_static", *op.args, attrs=op.attrs).result)


@dataclass(frozen=True)
class LinearToKernel(Rule):
    """quant.linear  ->  kernel.scaled_linear; quant.grouped_linear  ->  kernel.grouped_linear"""

    root: ClassVar[tuple[str, ...]] = tuple(KERNELS)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if why := why_not(op):
            return Missed(why)
        written = op["x_scale"].op.attrs.get("format")
        layout = written.scale_layout if isinstance(written, Format) else "row_major"
        return {"x_format": replace(op.format("x_format"), scale_layout=layout)}

    def rewrite(self, op: Op, rewriter: Rewriter, x_format: Format, **_: Any) -> None:
        made = rewriter.insert(KERNELS[op.name], *op.args, attrs={**op.attrs, "x_format": x_format})
        rewriter.replace(op, made.result)


@dataclass(frozen=True)
class ToKernels(Pass):
    """quant  ->  kernel.

    Attributes:
        scale_layout: Memory order of the activation scales.
    """

    name: ClassVar[str] = "to-kernels"
    effect: ClassVar[Effect] = Effect.EXACT

    scale_layout: Literal["row_major", "col_major"] = "col_major"

    def rules(self) -> Sequence[Rule]:
        """Producers first, because they set the layout."""
        return (QuantizeToKernel(self.scale_layout), StaticToKernel(), LinearToKernel())
