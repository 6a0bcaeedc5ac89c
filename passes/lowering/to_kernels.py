"""Lowers quantized operations to the kernel dialect and sets the memory layout of scales.

    %x_q, %x_s = quant.quantize(%x) {format = #fp8_tile}
    %y = quant.linear(%x_q, %x_s, %w_q, %w_s) {x_format = #fp8_tile, …}
  ->
    %x_q, %x_s = kernel.quantize(%x) {format = #fp8_tile<scale_layout = "col_major">}
    %y = kernel.scaled_linear(%x_q, %x_s, %w_q, %w_s) {x_format = #fp8_tile<scale_layout = "col_major">, …}

Every operation that the kernel dialect implements is replaced (`OpDef.implements`), here also quant.quantize_static and
quant.grouped_linear. Only the tile scales of an activation have a layout: with one scale per row or fewer, it makes no
difference, and ranks send scales row by row. Last in the pipeline: operations that remain in the quant dialect, because
no kernel supports their format, run in plain torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from qcompiler.dialects.kernel import why_no_kernel
from qcompiler.dialects.quant import is_static
from qcompiler.ir import ALL, Effects, Format, Graph, Match, Missed, Op, Rewriter, Role, Rule
from qcompiler.ir.op_table import implementation_of
from qcompiler.pass_manager.pipeline import Effect, Pass


def why_not(op: Op) -> str | None:
    """Why no kernel runs an operation, by its formats; None if one does."""
    formats = (value for value in op.attrs.values() if isinstance(value, Format))
    return next(filter(None, map(why_no_kernel, formats)), None)


@dataclass(frozen=True)
class ToKernel(Rule):
    """quant.*  ->  the operation of the kernel dialect that implements it"""

    layout: Literal["row_major", "col_major"]

    def starts_at(self, op: Op) -> bool:
        """Whether an operation is implemented."""
        return implementation_of(op.name) is not None

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        kernel, why = implementation_of(op.name), why_not(op)
        if kernel is None or why:
            return Missed(why or f"no kernel implements {op.name}")
        if op.role is Role.QUANTIZE and not is_static(op):
            if isinstance(format := self._written(op, graph), Missed):
                return format
            return {"kernel": kernel.name, "format": format}
        if (scale := op.get("x_scale")) is None:
            return {"kernel": kernel.name}
        written = scale.op.attrs.get("format")
        layout = written.scale_layout if isinstance(written, Format) else "row_major"
        return {"kernel": kernel.name, "x_format": replace(op.format("x_format"), scale_layout=layout)}

    def _written(self, op: Op, graph: Graph) -> Format | Missed:
        """The format with a layout of the scales that all users can read."""
        scale, format = op.results[1], op.format()
        sent = [use for use in graph.uses(scale) if Effects.COMMUNICATES in use.op.effects]
        for use in (use for use in graph.uses(scale) if use not in sent):
            if use.op.role is not Role.QUANTIZED_MATMUL:
                return Missed(f"its scales are also read by {use.op.name}, which supports one layout only", scale)
            if use.path != use.op.path("x_scale"):
                return Missed("its scales are read as weight scales, which have one layout only", scale)
            if why := why_not(use.op):
                return Missed(why, use.op.result)
        rows, columns = format.block
        tiled = rows == 1 and columns != ALL and not sent  # ranks send scales row by row
        return replace(format, scale_layout=self.layout) if tiled else format

    def rewrite(self, op: Op, rewriter: Rewriter, kernel: str, **formats: Format) -> None:
        rewriter.replace(op, *rewriter.insert(kernel, *op.args, attrs={**op.attrs, **formats}).results)


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
        """One rule, in graph order: producers set the layout before it reaches their users."""
        return (ToKernel(self.scale_layout),)
