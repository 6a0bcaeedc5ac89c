"""Quantizes batched matmuls with constant matrices, such as Llama 4 experts, as groups of equal row counts.

%y = aten.bmm(%x, %w) : bf16[8, s0, 512]                   %x is [8, s0, K], %w is [8, K, 512]
->
%rows = aten.reshape(%x, [-1, K])                          the rows of the first matrix, then of the second, ...
%t = aten.sym_size.int(%x, 1)
%steps = aten.arange.start(1, 9) {dtype = i32}
%ends = aten.mul.Tensor(%steps, %t)                        the row after the last of each group
%g = quant.grouped_linear(%rows_q, %rows_s, %w_q, %w_s, %ends) {out_dtype = bf16, ...}
%y = aten.reshape(%g, [8, %x_size, 512])
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from passes.analyses.candidates import why_not_quantized
from passes.quantizing.grouped import QuantizeGrouped
from passes.quantizing.scheme_options import SchemeOptions
from qcompiler.ir import DType, Graph, Match, Missed, Op, Rewriter, Rule, ScalarType, TensorType, Value
from qcompiler.ir.dataflow import parameters_of
from qcompiler.ir.sizes import product

BATCHED = ("aten.bmm", "aten.matmul")
"""Matmuls of a batch of activations with a batch of as many matrices."""


@dataclass(frozen=True)
class QuantizeBatched(Rule):
    """bmm(x, w)  ->  grouped_linear(quantize(rows of x), quantize(transpose(w)), ends of groups)"""

    options: SchemeOptions
    root: ClassVar[tuple[str, ...]] = BATCHED

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        x, w = op["x"], op["w"]
        if not graph.is_constant(w) or graph.is_constant(x) or not _is_batched(x, w) or op.attrs:
            return why_not_quantized(op, graph) or Missed("it is not a matmul of an activation and a constant matrix")
        if any(len(source.result.tensor.shape) == 2 for source in parameters_of(w)):
            return Missed("its matrices are parts of one matrix, which checkpoints store as the weight of a linear", w)
        return QuantizeGrouped(self.options).why_not(op, graph) or {"x": x, "w": w}

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, w: Value, **_: Any) -> None:
        groups, k, n = _fixed(w)
        rows = _rows(rewriter, x)
        flat = TensorType(x.tensor.dtype, (product(x.tensor.shape[:2]), k))
        flattened = rewriter.insert("aten.reshape", x, (-1, k), types=[flat], names=[f"{x.name}_rows"]).result
        counts, name = TensorType(DType.i32, (groups,)), op.result.name
        steps = rewriter.insert(
            "aten.arange.start", 1, groups + 1, attrs={"dtype": DType.i32}, types=[counts], names=[f"{name}_steps"]
        ).result
        ends = rewriter.insert("aten.mul.Tensor", steps, rows, types=[counts], names=[f"{name}_ends"]).result
        made = QuantizeGrouped(self.options).grouped_linear(rewriter, flattened, w, ends, op.result.tensor.dtype)
        rewriter.replace(op, rewriter.insert("aten.reshape", made, (groups, rows, n), types=[op.result.type]).result)
        rewriter.erase_unread(w.op)


def _is_batched(x: Value, w: Value) -> bool:
    """Whether there is one matrix of fixed size for each batch of rows."""
    same = len(x.tensor.shape) == len(w.tensor.shape) == 3 and x.tensor.shape[0] == w.tensor.shape[0]
    return same and len(_fixed(w)) == 3


def _fixed(w: Value) -> tuple[int, ...]:
    """The sizes of a weight, if fixed: groups, K and N."""
    return tuple(size for size in w.tensor.shape if isinstance(size, int))


def _rows(rewriter: Rewriter, x: Value) -> "Value | int":
    """The number of rows for each matrix: a literal, or a value if it is known only at run time."""
    rows = x.tensor.shape[1]
    if isinstance(rows, int):
        return rows
    return rewriter.insert("aten.sym_size.int", x, 1, types=[ScalarType("int", rows)], names=[f"{x.name}_size"]).result
