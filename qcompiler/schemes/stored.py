"""Finds the scheme that keeps the stored quantized weights of a captured graph.

quant.dequantize(codes, scales) {format = #fp8_tensor, x_scale = 0.02}    ->    "fp8_tensor_static"
"""

from collections import Counter

from qcompiler.dialects.quant import x_scale_of
from qcompiler.ir import Graph
from qcompiler.ir.formats import FP8_BLOCK, FP8_ROW, FP8_TENSOR, INT8_ROW, INT8_TENSOR

DYNAMIC = {
    FP8_BLOCK: "fp8_tile", FP8_ROW: "fp8_row", FP8_TENSOR: "fp8_tensor",
    INT8_ROW: "int8_row", INT8_TENSOR: "int8_tensor",
}  # fmt: skip
STATIC = {
    FP8_ROW: "fp8_tensor_static{w=channel}",
    FP8_TENSOR: "fp8_tensor_static",
    INT8_ROW: "int8_tensor_static{w=channel}",
    INT8_TENSOR: "int8_tensor_static",
}
"""Weight format -> scheme."""


def stored_scheme(graph: Graph) -> str | None:
    """The scheme that matches the most stored weights of a graph; None if no scheme matches any."""
    names: Counter[str] = Counter()
    for op in graph.ops("quant.dequantize"):
        schemes = DYNAMIC if x_scale_of(op.result) is None else {**DYNAMIC, **STATIC}
        if graph.is_constant(op.result) and (name := schemes.get(op.format())):
            names[name] += 1
    return names.most_common(1)[0][0] if names else None
