"""Which operations read weights, and why some are not quantized: by dataflow, never by module name."""

from qcompiler.ir import DType, Graph, Missed, Op, Role, TensorType, Value
from qcompiler.ir.dataflow import parameters_of, users_through

OTHER_READERS = (
    "aten.embedding", "aten.embedding_bag", "aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm",
    "aten.group_norm", "aten.native_group_norm", "aten.instance_norm", "aten.batch_norm",
    "aten._native_batch_norm_legit_no_training", "aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.conv2d.padding",
    "aten.conv1d.padding", "aten.convolution", "aten.conv_transpose1d", "aten.conv_transpose2d.input",
    "aten.conv_transpose3d.input", "aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input",
)  # fmt: skip
"""Operations with weights that are not matmuls."""

WHY_OTHER = {
    "embedding": "an embedding is a lookup, not a matmul",
    "norm": "the gain and bias of a norm are applied elementwise",
    "conv": "a convolution is not a matmul",
    "": "the matmuls of a recurrent layer are inside one operation",
}
"""Part of the name of one of OTHER_READERS -> why it is skipped."""

LOOKUPS = ("aten.embedding", "aten.embedding_bag", "aten.index.Tensor", "aten.index_select")
"""Operations that look up rows of a table."""

ELEMENTWISE = (
    "_softmax", "softmax", "log_softmax", "sigmoid", "tanh", "relu", "exp", "log", "sqrt", "softplus", "neg", "to",
    "_to_copy", "add", "sub", "mul", "div", "clamp", "masked_fill", "where", "clone", "view", "_unsafe_view", "reshape",
    "unflatten", "unsqueeze", "squeeze", "expand", "transpose", "permute", "t", "slice", "select", "split", "chunk",
)  # fmt: skip
"""Operations allowed between a router's matmul and its top-k."""

TOP_K = (
    "aten.topk", "aten.sort", "aten.sort.stable", "aten.argsort", "aten.argsort.stable", "aten.kthvalue",
)  # fmt: skip
"""Operations that select several elements by size."""

TOP_1 = ("aten.argmax", "aten.max.dim", "aten.multinomial")
"""Operations that select one element; the last result is its index."""

ANGLES = ("aten.sin", "aten.cos", "aten.tan")
"""Periodic functions: the argument may span many turns, and only the remainder matters."""

ALREADY = Missed("it is already quantized")
NO_WEIGHTS = Missed("it reads no weights")
NOT_CANDIDATES = (str(ALREADY), str(NO_WEIGHTS))
"""Reasons omitted from the report."""

QUANTIZABLE = (DType.f32, DType.f16, DType.bf16)

SMALLEST = 16
"""Minimum rows and columns of a weight that is quantized: FP8 and INT8 GEMMs, here and in other engines, work on
multiples of 16, and quantizing the input of a smaller layer costs more per call than it saves."""


def why_not_quantized(op: Op, graph: Graph, named: bool = False) -> Missed | None:
    """Why an operation that reads weights is not quantized; None for a matmul that is quantized.

    Args:
        op: Any operation.
        graph: The graph that contains it.
        named: Whether the user names the layer (see `analyses.layers`): the heuristics of `why_skipped` do not apply.
    """
    constant = [v for _, v in op.operands() if isinstance(v.type, TensorType) and graph.is_constant(v)]
    if op.name in OTHER_READERS:
        return Missed(why_no_matmul(op)) if constant else NO_WEIGHTS
    if op.name != "aten.linear":
        return _why_no_linear(op, graph, constant)
    return _why_not_this_kind(op, graph) or (None if named else why_skipped(op, graph))


def why_skipped(op: Op, graph: Graph) -> Missed | None:
    """Why a linear that can be quantized is skipped unless the user names it; None for an ordinary layer."""
    return _vocabulary(op["weight"], graph) or _router(op, graph) or _angle(op, graph) or why_tiny(op["weight"])


def why_tiny(w: Value) -> Missed | None:
    """Whether a weight has too few rows or columns to be worth quantizing, such as a rank-8 adapter."""
    if is_stored_quantized(w) or all(isinstance(size, int) and size >= SMALLEST for size in w.tensor.shape[-2:]):
        return None
    return Missed(f"its weight has fewer than {SMALLEST} rows or columns: {list(w.tensor.shape[-2:])}", w)


def has_lookup(w: Value, graph: Graph) -> bool:
    """Whether an embedding reads a parameter that the weight is computed from."""
    return any(_is_looked_up(param.result, graph) for param in parameters_of(w))


def _is_looked_up(param: Value, graph: Graph) -> bool:
    users = users_through(graph, param, lambda op: all(map(graph.is_constant, op.results)))
    return any(user.name in LOOKUPS and not all(map(graph.is_constant, user.results)) for user in users)


def why_no_matmul(op: Op) -> str:
    """Why one of OTHER_READERS is skipped."""
    return next(why for kind, why in WHY_OTHER.items() if kind in op.name)


def _why_no_linear(op: Op, graph: Graph, constant: list[Value]) -> Missed:
    if not constant:
        return Missed("both of its operands are computed from the inputs")
    if all(map(graph.is_constant, op.results)):
        return Missed("all of its operands are constant", constant[0])
    largest = max(constant, key=lambda value: len(value.tensor.shape))
    dimensions = len(largest.tensor.shape)
    if dimensions > 2:
        return Missed(f"it multiplies by a batch of matrices (a weight of {dimensions} dimensions)", largest)
    return Missed("it does not multiply an activation by a constant matrix", largest)


def _why_not_this_kind(op: Op, graph: Graph) -> Missed | None:
    """Whether the operands are an activation, a constant matrix and a vector, of types that can be quantized."""
    x, w, bias = op["input"], op["weight"], op.get("bias")
    if x.op.role is Role.DEQUANTIZE:
        return ALREADY if is_stored_quantized(w) else Missed("one of its operands is already quantized", x)
    if not graph.is_constant(w):
        return Missed("its weight is computed from the inputs", w)
    if graph.is_constant(x):
        return Missed("both of its operands are constant", x)
    if x.tensor.dtype not in QUANTIZABLE or w.tensor.dtype not in QUANTIZABLE:
        return Missed(f"its operands are {x.tensor.dtype} and {w.tensor.dtype}, not f32, f16 or bf16")
    if not all(isinstance(size, int) for size in w.tensor.shape) or len(w.tensor.shape) != 2:
        return Missed("its weight is not a matrix of fixed size", w)
    if x.tensor.shape[-1] != w.tensor.shape[1]:
        return Missed(f"the size of its reduction dimension is not fixed ({x.tensor.shape[-1]})", x)
    if w.tensor.elements == 0:
        return Missed("its weight has no elements", w)
    if bias is not None and bias.tensor.shape != w.tensor.shape[:1]:
        return Missed("its bias is not one number per column", bias)
    return None


def _router(op: Op, graph: Graph) -> Missed | None:
    if feeds_topk(op.result, graph):
        return Missed("it is a router: a top-k selects from its output")
    return None


def _angle(op: Op, graph: Graph) -> Missed | None:
    """Whether a matmul computes an angle: a relative error of a few percent may exceed a full turn."""
    for user in users_through(graph, op.result, _is_elementwise):
        if user.name in ANGLES:
            return Missed(f"it computes an angle: {user.name.removeprefix('aten.')} reads its output")
    return None


def feeds_topk(value: Value, graph: Graph) -> bool:
    """Whether a top-k reads `value`, directly or through elementwise operations.

    TOP_1 counts only if the model computes with the selection: a classifier that returns it is not a router.
    """
    for op in users_through(graph, value, _is_elementwise):
        if op.name in TOP_K or (op.name in TOP_1 and _is_followed(op.results[-1], graph)):
            return True
    return False


def _is_followed(value: Value, graph: Graph) -> bool:
    users = users_through(graph, value, _is_elementwise)
    return any(op.name != "core.return" and not _is_elementwise(op) for op in users)


def _is_elementwise(op: Op) -> bool:
    return op.name.split(".")[1] in ELEMENTWISE


def is_stored_quantized(w: Value) -> bool:
    """Whether a weight is stored as codes and scales, as in a quantized checkpoint; these are used unchanged."""
    return w.op.role is Role.DEQUANTIZE


def _vocabulary(w: Value, graph: Graph) -> Missed | None:
    if is_stored_quantized(w):
        return None  # the author of the checkpoint chose to quantize it
    for param in parameters_of(w):
        if param.attrs.get("role") == "output_embeddings":
            return Missed("it is the vocabulary projection: the model names its weight as its output embeddings", w)
        if _is_looked_up(param.result, graph):
            return Missed("it is the vocabulary projection: an embedding has the same weight", w)
    return None
