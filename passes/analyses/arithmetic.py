"""Maps torch operations to fused expressions: row arithmetic in the syntax of `qcompiler.dialects.fused_expression`.

    %y = aten.rms_norm(%x, [256], %w, 1e-06) : bf16[s0, 256]    ->    bf16(x0 * rsqrt(mean(x0 * x0) + 1e-06) * x1)

For bf16 and f16, torch computes these operations in FP32 and rounds the result once; fused expressions do too.
Where torch also rounds an intermediate result, the expression is used only if it can round at the same place.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qcompiler.ir import Argument, DType, Op, Role, TensorType, Value
from qcompiler.numerics.dtypes import torch_dtype

FLOATS = (DType.bf16, DType.f16, DType.f32)
"""Element types that a fused expression reads and returns."""

FUNCTIONS = {
    "aten.cos": "cos(x0)", "aten.exp": "exp(x0)", "aten.neg": "neg(x0)", "aten.reciprocal": "1.0 / x0",
    "aten.relu": "relu(x0)", "aten.rsqrt": "rsqrt(x0)", "aten.sigmoid": "sigmoid(x0)", "aten.silu": "silu(x0)",
    "aten.sin": "sin(x0)", "aten.sqrt": "sqrt(x0)", "aten.square": "x0 * x0", "aten.tanh": "tanh(x0)",
}  # fmt: skip
"""Unary operations that take no options."""

BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
SUMS = ("add", "sub", "rsub")
POWERS = {2: "x0 * x0", 0.5: "sqrt(x0)", -0.5: "rsqrt(x0)", -1: "1.0 / x0"}
VIEWS = ("aten.view", "aten._unsafe_view", "aten.reshape")

LARGEST = torch.finfo(torch.float32).max
FLOAT_EPSILON = torch.finfo(torch.float32).eps
"""The epsilon that torch uses for an RMS norm that gives none."""


@dataclass(frozen=True)
class Term:
    """One operation as the text of a fused expression.

    Attributes:
        text: The expression over x0, x1, …, before rounding to the element type.
        inputs: The values of x0, x1, ….
    """

    text: str
    inputs: tuple[Value, ...]


def term_of(op: Op) -> Term | None:
    """An operation with one result as a term, or None if a fused expression cannot compute it.

    Its inputs have the shape of its result, or one number per row, or one per column.
    """
    if len(op.results) != 1 or not _is_float(op.result):
        return None
    term = _spelled(op)
    if term is None or not all(_is_float(value) and _fits(value, op.result) for value in term.inputs):
        return None
    return term


def broadcast_term(op: Op) -> Term | None:
    """An operation as a term whose inputs broadcast to its result as in torch, or whose rows do, if it reduces rows."""
    if len(op.results) != 1 or not _is_float(op.result):
        return None
    term = _spelled(op)
    if term is None or not all(map(_is_float, term.inputs)):
        return None
    fits = _has_rows_of if op.name == "aten.mean.dim" else _broadcasts
    return term if all(fits(value, op.result) for value in term.inputs) else None


def same_numbers(op: Op) -> Value | None:
    """The operand, if an operation only rearranges its rows or widens its type; else None."""
    if op.role not in (Role.VIEW, Role.CAST) or len(op.results) != 1 or not _is_float(op.result):
        return None
    x, y = op["x"], op.result
    if not _is_float(x) or not x.tensor.shape or not y.tensor.shape:
        return None
    if op.name in VIEWS:
        return x if x.tensor.shape[-1] == y.tensor.shape[-1] else None
    if is_cast(op) and y.tensor.dtype in (DType.f32, x.tensor.dtype):
        return x
    return None


def is_row_view(op: Op) -> bool:
    """Whether an operation for which `same_numbers` holds rearranges rows."""
    return op.name in VIEWS


def _spelled(op: Op) -> Term | None:
    """The term, for operands of any shape and element type."""
    if op.name in FUNCTIONS:
        return None if op.attrs or len(op.args) != 1 else Term(FUNCTIONS[op.name], (op["self"],))
    special = SPECIAL.get(op.name)
    if special is not None:
        return special(op)
    dialect, name, *_ = op.name.split(".")
    return _binary(op, name) if dialect == "aten" and (name in BINARY or name == "rsub") else None


def _binary(op: Op, name: str) -> Term | None:
    """add, sub, rsub, mul and div of tensors or numbers; alpha may only be a sign."""
    if op.name.partition(f".{name}.")[2] not in ("Tensor", "Scalar"):
        return None
    alpha = op.argument("alpha") if name in SUMS else 1
    if not set(op.attrs) <= {"alpha"} or len(op.args) > 3 or alpha not in (1, -1) or isinstance(alpha, bool):
        return None
    sides = op.argument("self"), op.argument("other")
    left, right = reversed(sides) if name == "rsub" else sides
    sign = BINARY.get(name, "-")
    if alpha == -1:
        # alpha applies to the second argument, which is the left one in rsub
        if name == "rsub" or name not in SUMS:
            return None
        sign = {"+": "-", "-": "+"}[sign]
    texts: list[str] = []
    inputs: list[Value] = []
    for side in (left, right):
        if isinstance(side, Value):
            texts.append(f"x{len(inputs)}")
            inputs.append(side)
        elif _is_number(side) and (name not in SUMS or _is_exact(side, op.result)):
            texts.append(repr(float(side)))  # type: ignore[arg-type]  # a number, as _is_number has found
        else:
            return None
    return Term(f"{texts[0]} {sign} {texts[1]}", tuple(inputs)) if inputs else None


def _power(op: Op) -> Term | None:
    x, exponent = op["self"], op.argument("exponent")
    if exponent == 3 and op.result.type == x.type:
        # torch also rounds the square: in bf16 everywhere, in f16 on a GPU only.
        squares = {DType.f32: "x0 * x0 * x0", DType.bf16: "bf16(x0 * x0) * x0"}
        text = squares.get(x.tensor.dtype)
    else:
        text = POWERS.get(exponent) if _is_number(exponent) else None  # type: ignore[arg-type]  # a number
    return Term(text, (x,)) if text else None


def _gelu(op: Op) -> Term | None:
    functions = {"none": "gelu(x0)", "tanh": "gelu_tanh(x0)"}
    text = functions.get(str(op.argument("approximate")))
    return Term(text, (op["self"],)) if text else None


def _clamp(op: Op) -> Term | None:
    """Limits that are exact in the element type, which torch converts them to; 0.0 may become -0.0."""
    text = "x0"
    for name, function in (("min", "at_least"), ("max", "at_most")):
        limit = op.argument(name)
        if limit is not None:
            if not _is_number(limit) or limit == 0 or not _is_exact(limit, op.result):
                return None
            text = f"{function}({text}, {float(limit)!r})"  # type: ignore[arg-type]  # a number
    return Term(text, (op["self"],)) if op["self"].type == op.result.type else None


def _cast(op: Op) -> Term | None:
    return Term("x0", (op["x"],)) if is_cast(op) else None


def _mean(op: Op) -> Term | None:
    """The mean of each row in FP32."""
    x, axes = op["self"], op.argument("dim")
    last = len(x.tensor.shape) - 1 if isinstance(x.type, TensorType) else 0
    kept = op.argument("keepdim") is True
    if axes not in ((-1,), (last,)) or not kept or op.result.tensor.dtype is not DType.f32:
        return None
    return Term("mean(x0)", (x,))


def _layer_norm(op: Op) -> Term | None:
    x, gain, bias = op["input"], op.get("weight"), op.get("bias")
    if not _over_rows(op):
        return None
    eps = op.argument("eps")
    return _with_affine(f"standardize(x0, {eps!r})", x, gain, bias) if _is_number(eps) else None


def _rms_norm(op: Op) -> Term | None:
    x, gain, eps = op["input"], op.get("weight"), op.argument("eps")
    eps = FLOAT_EPSILON if eps is None else eps
    if not _over_rows(op) or not _is_number(eps):
        return None
    return _with_affine(f"x0 * rsqrt(mean(x0 * x0) + {eps!r})", x, gain, None)


def _over_rows(op: Op) -> bool:
    """Whether a norm normalizes only the last dimension."""
    shape = op["input"].tensor.shape
    return bool(shape) and op.argument("normalized_shape") == shape[-1:]


def _with_affine(text: str, x: Value, gain: Value | None, bias: Value | None) -> Term:
    inputs = [x]
    for sign, factor in (("*", gain), ("+", bias)):
        if factor is not None:
            text += f" {sign} x{len(inputs)}"
            inputs.append(factor)
    return Term(text, tuple(inputs))


SPECIAL: dict[str, Callable[[Op], Term | None]] = {
    "aten._to_copy": _cast, "aten.clamp": _clamp, "aten.to.dtype": _cast, "aten.gelu": _gelu,
    "aten.layer_norm": _layer_norm, "aten.mean.dim": _mean, "aten.pow.Tensor_Scalar": _power,
    "aten.rms_norm": _rms_norm,
}  # fmt: skip


def is_cast(op: Op) -> bool:
    """Whether an operation only converts the element type."""
    return op.role is Role.CAST and (
        (set(op.attrs) == {"dtype"} and len(op.args) == 1) or (not op.attrs and len(op.args) == 2)
    )


def _is_float(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.tensor.dtype in FLOATS


def _is_number(arg: Argument) -> bool:
    return isinstance(arg, int | float) and not isinstance(arg, bool) and abs(arg) <= LARGEST


def _is_exact(number: Argument, result: Value) -> bool:
    """Whether an addend is the same in FP32 and in the element type (torch rounds it to that type on a CPU)."""
    dtype = torch_dtype(result.tensor.dtype)
    wide = torch.tensor(number, dtype=torch.float32)
    return bool(wide.to(dtype).float() == wide)


def _broadcasts(value: Value, result: Value) -> bool:
    """Whether an operand broadcasts to the result and is not converted to its type (torch converts scalars)."""
    own, shape = value.tensor.shape, result.tensor.shape
    if not own:
        return value.tensor.dtype is result.tensor.dtype
    aligned = zip(own, shape[len(shape) - len(own) :], strict=True) if len(own) <= len(shape) else [(0, 1)]
    return all(size in (1, whole) for size, whole in aligned)


def _has_rows_of(value: Value, result: Value) -> bool:
    """Whether a reduced operand has the rows of the result."""
    return bool(value.tensor.shape) and value.tensor.shape[:-1] == result.tensor.shape[:-1]


def _fits(value: Value, result: Value) -> bool:
    """Whether an operand has the shape of the result, one number per row, or one per column."""
    shape, own = result.tensor.shape, value.tensor.shape
    if not shape or not own:
        return False
    return own in (shape, (*shape[:-1], 1), shape[-1:]) or (shape[-1] == 1 and own[:-1] == shape[:-1])
