"""The scheme that takes the stored weights of a captured graph as they are.

quant.dequantize(codes f8e4m3fn, scales) {block = [-1, -1], x_scale = 0.02}    ->    "fp8_tensor_static"
"""

from collections import Counter

from qcompiler.dialects.quant import block_of, x_scale_of
from qcompiler.ir import DType, Graph
from qcompiler.numerics import ALL

FORMATS = {DType.f8e4m3fn: "fp8", DType.i8: "int8"}
"""Codes -> what the names of their schemes begin with."""

DYNAMIC = {(128, 128): "tile", (1, ALL): "row", (ALL, ALL): "tensor"}
STATIC = {(1, ALL): "tensor_static{w=channel}", (ALL, ALL): "tensor_static"}
"""Block of a weight -> the rest of the name."""


def stored_scheme(graph: Graph) -> str | None:
    """The scheme that fits most stored weights of a graph; None if there are none, or no scheme fits them."""
    names: Counter[str] = Counter()
    for op in graph.ops("quant.dequantize"):
        rests = DYNAMIC if x_scale_of(op.result) is None else {**DYNAMIC, **STATIC}
        kind, rest = FORMATS.get(op["data"].tensor.dtype), rests.get(block_of(op, "block"))
        if graph.is_constant(op.result) and kind and rest and (kind, rest) != ("int8", "tile"):
            names[f"{kind}_{rest}"] += 1
    return names.most_common(1)[0][0] if names else None
