"""Quantizes the matmuls of a mixture of experts: groups of rows, each with its own constant matrix.

    %y = aten._grouped_mm(%x, %w, %offsets) : bf16[s0, 512]          %w is [experts, K, N]
  ->
    %x_q, %x_s = quant.quantize(%x) {format = #fp8_tile}
    %w_t = aten.transpose.int(%w, -2, -1)
    %w_q, %w_s = quant.quantize(%w_t) {format = #fp8_block}        stored as [experts, N, K]
    %y = quant.grouped_linear(%x_q, %x_s, %w_q, %w_s, %offsets) {out_dtype = bf16, …}

Fused directly: torch has no grouped FP32 matmul that runs on all devices, so dequantizing first is not an option.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from passes.analyses.candidates import QUANTIZABLE, is_stored_quantized, why_tiny
from passes.analyses.layers import why_not_selected
from passes.quantizing.scheme_options import SchemeOptions
from qcompiler.dialects.aten import GROUPED
from qcompiler.ir import Argument, DType, Format, Graph, Match, Missed, Op, Rewriter, Rule, TensorType, Value
from qcompiler.ir.formats import FP8_BLOCK, FP8_TILE

ROW_BYTES = 16
"""The copy engine requires row sizes that are multiples of this many bytes."""


@dataclass(frozen=True)
class QuantizeGrouped(Rule):
    """grouped_mm(x, w, offsets)  ->  grouped_linear(quantize(x), quantize(transpose(w)), offsets)"""

    options: SchemeOptions
    root: ClassVar[tuple[str, ...]] = GROUPED

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        offsets = op.get("offs")
        if reason := _why_not_operands(op, offsets, graph) or self.why_not(op, graph):
            return reason
        return {"x": op["x"], "w": op["w"], "offsets": offsets}

    def why_not(self, op: Op, graph: Graph) -> Missed | None:
        """Why the matmul of each group is not quantized: types, sizes, the scheme, or the layer."""
        if reason := _why_not_types(op) or _why_not_sizes(op) or self.why_not_scheme():
            return reason
        if reason := why_not_selected(self.options.layers, op, graph) or _why_not_stored(op["w"]):
            return reason
        return None if self.options.naming_pattern(op, graph) else why_tiny(op["w"])

    def why_not_scheme(self) -> Missed | None:
        """Why the options do not apply to a grouped matmul."""
        options = self.options
        if options.x_format.decodes_like(FP8_TILE) and options.w_format.decodes_like(FP8_BLOCK):
            return None
        got = f"{options.x_format} and {options.w_format}"
        return Missed(f"a grouped matmul supports only {FP8_TILE} and {FP8_BLOCK}, the scheme has {got}")

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, w: Value, offsets: Value, **_: Any) -> None:
        rewriter.replace(op, self.grouped_linear(rewriter, x, w, offsets, op.result.tensor.dtype))
        rewriter.erase_unread(w.op)

    def grouped_linear(self, rewriter: Rewriter, x: Value, w: Value, offsets: Value, out: DType) -> Value:
        """The quantized matmul of groups of rows of `x`, `[T, K]`, with `w`, `[E, K, N]`."""
        operands = (*self.quantized(rewriter, x, self.options.x_format), *self.weight(rewriter, w), offsets)
        formats: dict[str, Argument] = {"w_format": self.options.w_format, "x_format": self.options.x_format}
        return rewriter.insert("quant.grouped_linear", *operands, attrs={"out_dtype": out, **formats}).result

    def weight(self, rewriter: Rewriter, w: Value) -> tuple[Value, ...]:
        """Codes and scales of `[experts, N, K]`; the stored ones if the weights are quantized already."""
        if (stored := _stored(w)) is not None:
            return stored["data"], stored["scale"]
        groups, k, n = w.tensor.shape
        kind = TensorType(w.tensor.dtype, (groups, n, k))
        turned = rewriter.insert("aten.transpose.int", w, -2, -1, types=[kind], names=[f"{w.name}_t"]).result
        return self.quantized(rewriter, turned, self.options.w_format)

    def quantized(self, rewriter: Rewriter, value: Value, format: Format) -> tuple[Value, ...]:
        """Codes and scales of `value`."""
        names = [f"{value.name}_q", f"{value.name}_s"]
        return rewriter.insert("quant.quantize", value, attrs={"format": format}, names=names).results


def _stored(w: Value) -> Op | None:
    """The dequantize of `[experts, N, K]` codes whose transpose is the `[experts, K, N]` weights."""
    if w.op.name != "aten.transpose.int" or not is_stored_quantized(w.op["self"]):
        return None
    axes = (w.op.argument("dim0"), w.op.argument("dim1"))
    return w.op["self"].op if {axis % 3 for axis in axes if isinstance(axis, int)} == {1, 2} else None


def _why_not_stored(w: Value) -> Missed | None:
    """Why weights stored as codes and scales cannot be multiplied as they are."""
    if is_stored_quantized(w):
        return Missed("its weights are stored quantized with N last, a layout that tensor cores cannot read", w)
    if (stored := _stored(w)) is None:
        return None
    if (format := stored.format()).decodes_like(FP8_BLOCK):
        return None
    return Missed(f"its weights are stored as {format}", stored["data"])


def _why_not_operands(op: Op, offsets: Value | None, graph: Graph) -> Missed | None:
    """Whether the operands are an activation, constant matrices and offsets, of types that can be quantized."""
    x, w = op["x"], op["w"]
    if not graph.is_constant(w):
        both = "both of its operands are computed from the inputs"
        return Missed("its weights are computed from the inputs", w) if graph.is_constant(x) else Missed(both)
    if graph.is_constant(x):
        return Missed("both of its operands are constant", x)
    if offsets is None or len(x.tensor.shape) != 2 or len(w.tensor.shape) != 3:
        return Missed("its groups are not groups of rows of one activation", x)
    if offsets.type != TensorType(DType.i32, w.tensor.shape[:1]):
        return Missed("its offsets are not one i32 per matrix", offsets)
    if op.name == "aten._grouped_mm" and op.argument("bias") is not None:
        return Missed("it also adds a bias")
    return None


def _why_not_types(op: Op) -> Missed | None:
    x, w = op["x"], op["w"]
    dtypes = (x.tensor.dtype, w.tensor.dtype, op.result.tensor.dtype)
    if any(dtype not in QUANTIZABLE for dtype in dtypes):
        return Missed(f"it computes {dtypes[2]} from {dtypes[0]} and {dtypes[1]}, not f32, f16 or bf16")
    return None


def _why_not_sizes(op: Op) -> Missed | None:
    """Whether the grouped kernels can address the operands."""
    x, w = op["x"], op["w"]
    _, k, n = w.tensor.shape
    if not isinstance(k, int) or not isinstance(n, int) or w.tensor.elements == 0 or x.tensor.shape[-1] != k:
        return Missed("its weights have no fixed size", w)
    out = op.result.tensor.dtype
    if k % ROW_BYTES != 0:
        return Missed(f"the grouped kernels need K to be a multiple of {ROW_BYTES}, got {k}", w)
    if n * out.bits // 8 % ROW_BYTES != 0:
        return Missed(f"the grouped kernels need output rows of a multiple of {ROW_BYTES} bytes, got {n} of {out}", w)
    return None
