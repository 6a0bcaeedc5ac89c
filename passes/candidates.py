"""Which operations read weights, and for each that is not quantized, why: by dataflow, never by a module's name."""

from qcompiler.ir import DType, Graph, Missed, Op, TensorType, Value
from qcompiler.ir.dataflow import parameters_of, readers_through

MATMULS = (
    "aten.linear", "aten.mm", "aten.matmul", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.einsum",
    "aten._grouped_mm", "transformers.grouped_mm_fallback", "aten.mv", "aten.addmv", "aten.dot",
)  # fmt: skip
"""Matrix products, as capture may spell them."""

OTHER_READERS = (
    "aten.embedding", "aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten.group_norm", "aten.batch_norm",
    "aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.conv2d.padding", "aten.conv1d.padding", "aten.convolution",
)  # fmt: skip
"""Operations with weights that are no matrix products."""

WHY_OTHER = {
    "embedding": "an embedding is a lookup, not a matmul",
    "norm": "the gain and bias of a norm are applied element by element",
    "conv": "a convolution is not a matmul",
}

ELEMENTWISE = (
    "softmax", "sigmoid", "_to_copy", "to", "add", "sub", "mul", "div", "neg", "view", "reshape", "unsqueeze", "squeeze",
    "expand", "masked_fill", "where", "clone", "transpose", "permute", "log_softmax", "tanh", "relu", "slice", "float",
)  # fmt: skip
"""What may stand between a router's product and its top-k."""

ALREADY = Missed("it is quantized already")

QUANTIZABLE = (DType.f32, DType.f16, DType.bf16)


def why_not_quantized(op: Op, graph: Graph) -> Missed | None:
    """Why a reader of weights must be left alone; None when it is a matmul that may be quantized."""
    for kind, why in WHY_OTHER.items():
        if kind in op.name:
            return Missed(why)
    if op.name != "aten.linear":
        return _why_no_linear(op, graph)
    x, w = op.tensor(0), op.tensor(1)
    if not graph.is_constant(w):
        return Missed("its weight is computed from the inputs", w)
    if x.op.name == "quant.dequantize" or w.op.name == "quant.dequantize":
        return ALREADY
    if graph.is_constant(x):
        return Missed("both of its operands are constant", x)
    if x.tensor.dtype not in QUANTIZABLE or w.tensor.dtype not in QUANTIZABLE:
        return Missed(f"its operands are {x.tensor.dtype} and {w.tensor.dtype}, not f32, f16 or bf16")
    if not all(isinstance(size, int) for size in w.tensor.shape) or len(w.tensor.shape) != 2:
        return Missed("its weight is no matrix of fixed size", w)
    if feeds_topk(op.result, graph):
        return Missed("it is a router: its product decides a top-k")
    return _vocabulary(w, graph)


def _why_no_linear(op: Op, graph: Graph) -> Missed:
    constant = [value for _, value in op.operands() if graph.is_constant(value) and isinstance(value.type, TensorType)]
    if not constant:
        return Missed("both of its operands are computed from the inputs")
    dimensions = max(len(value.tensor.shape) for value in constant)
    if dimensions > 2:
        return Missed(f"it multiplies by a batch of matrices (a weight of {dimensions} dimensions)", constant[0])
    return Missed("it is not of the form activation times constant matrix", constant[0])


def feeds_topk(value: Value, graph: Graph) -> bool:
    """Whether a top-k reads `value`, directly or through operations that work element by element."""

    def elementwise(op: Op) -> bool:
        return op.name.split(".")[1].lstrip("_") in ELEMENTWISE or op.name.split(".")[1] in ELEMENTWISE

    return any(op.name in ("aten.topk", "aten.sort") for op in readers_through(graph, value, elementwise))


def _vocabulary(w: Value, graph: Graph) -> Missed | None:
    for param in parameters_of(w):
        if param.attrs.get("role") == "output_embeddings":
            return Missed("it is the vocabulary projection: the model names its weight as its output embeddings", w)
        readers = readers_through(graph, param.result, lambda op: len(op.results) == 1 and graph.is_constant(op.result))
        if any(reader.name == "aten.embedding" for reader in readers):
            return Missed("it is the vocabulary projection: an embedding has the same weight", w)
    return None
