"""The `kernel` dialect, the input of code generation: like `quant`, for 8-bit codes with FP32 scales.

Only this dialect uses the `scale_layout` of a format: the memory layout of an activation's scales.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from qcompiler import numerics
from qcompiler.dialects.fused_expression import FusedExpression, parse
from qcompiler.dialects.quant import FORMAT as ANY_FORMAT
from qcompiler.dialects.quant import LEVELS, LINEAR, linear_shape, stored_types
from qcompiler.errors import ParseError
from qcompiler.ir import Argument, DType, Format, Op, Role, Size, TensorType, Type, Value
from qcompiler.ir.op_table import TEXT, AttributeCheck, OpDef, OpError, declare, lookup
from qcompiler.numerics.dtypes import ir_dtype


def why_no_kernel(format: Format) -> str | None:
    """Why operations on a format stay in `quant` and run in plain torch; None if this dialect has them."""
    if format.block[1] == 1:
        return "its scales vary along K, the reduction dimension, where tensor cores cannot apply them"
    return (
        None
        if _is_legal(format)
        else f"kernels need symmetric 8-bit codes and one level of FP32 scales, but the format is {format}"
    )


def _is_legal(format: Argument) -> bool:
    return isinstance(format, Format) and format.element.bits == 8 and format.scale is DType.f32 and format.symmetric


FORMAT: tuple[AttributeCheck, str] = (_is_legal, "a format of 8-bit codes and FP32 scales such as #fp8_tile")
NAMES: tuple[AttributeCheck, str] = (
    lambda a: isinstance(a, tuple) and all(isinstance(name, str) for name in a),
    'a list of names such as ["h"]',
)
PARTS: tuple[AttributeCheck, str] = (lambda a: a in (1, 2) and not isinstance(a, bool), "1 or 2")


def implement(source: str, name: str) -> OpDef:
    """Declares an operation that implements another one: the same, for `FORMAT` and with a memory layout of scales.

    Args:
        source: The operation of the `quant` dialect, whose operands for tensor scales and zero points are omitted.
        name: The operation of the `kernel` dialect.
    """
    given = lookup(source)
    if given is None or given.types is None:
        raise OpError(f"{name} implements {source}, which has no type rule")
    types = given.types

    def laid_out(op: Op) -> tuple[Type, ...]:
        check_layout(op)
        return types(op)

    laid_out.__doc__ = f"Like `{source}`; also checks the memory layout of the activation scales."
    return declare(
        replace(
            given,
            name=name,
            doc=f"`{source}` with a given memory layout of the activation scales.",
            operands=tuple(operand for operand in given.operands if not operand.removesuffix("?").endswith(LEVELS)),
            attributes={key: FORMAT if check is ANY_FORMAT else check for key, check in given.attributes.items()},
            types=laid_out,
            implements=source,
        )
    )


def check_layout(op: Op) -> None:
    """Checks that an operation reads the activation scales in the layout that their producer writes."""
    if op.get("x_scale") is None:
        return
    written, read = op["x_scale"].op.attrs.get("format"), op.format("x_format")
    if isinstance(written, Format) and written.scale_layout != read.scale_layout:
        raise OpError(f"{op['x_scale']} is written {written.scale_layout} but read {read.scale_layout}", "x_scale")


def is_fused(op: Op) -> bool:
    """Whether an operation has a fused expression."""
    return op.name.startswith(("kernel.", "coll.")) and "expression" in op.attrs


def fused_quantize_types(op: Op) -> tuple[Type, ...]:
    """(x float[..., K], others float[..., K] or [K]) -> dtype[..., K], f32[..., scales], residual outputs"""
    made = parsed(op)
    if not op.args:
        raise OpError("it has no operands")
    check_operands(op.args, 0, made)
    return quantized_types(op, made, op["x"].tensor.shape)


def quantized_types(op: Op, made: FusedExpression, shape: tuple[Size, ...]) -> tuple[Type, ...]:
    """The codes and scales of a fused expression, and its residual outputs; raises OpError if `keep` is wrong."""
    defined = {name for name, _ in made.definitions}
    kept: tuple[str, ...] = op.attrs["keep"]  # type: ignore[assignment]  # checked by the declaration
    for name in kept:
        if name not in defined:
            raise OpError(f"keep has '{name}', which its expression does not define")
    return (*stored_types(op, op.format(), shape), *(TensorType(ir_dtype(made.dtype(name)), shape) for name in kept))


def fused_linear_types(op: Op) -> tuple[Type, ...]:
    """Like `quant.linear`, then the fused expression: float[..., N / parts], or its codes and scales"""
    check_layout(op)
    *rows, columns = linear_shape(op)
    made, parts = parsed(op), parts_of(op)
    if not isinstance(columns, int) or columns % parts:
        raise OpError(f"{columns} columns cannot be split into {parts} equal parts", "w")
    shape: tuple[Size, ...] = (*rows, columns // parts)
    if wrong := [name for name in made.operands if name[0] == "y" and int(name[1:]) >= parts]:
        raise OpError(f"its expression reads {wrong[0]}, but the accumulator has {parts} parts")
    if made.across:
        raise OpError("its expression needs whole rows, but an output tile has only part of a row")
    check_operands(op.rest, len(op.args) - len(op.rest), made, shape)
    if "format" in op.attrs:
        return stored_types(op, op.format(), shape)
    return (TensorType(ir_dtype(made.dtype()), shape),)


def parts_of(op: Op) -> int:
    """The attribute `parts`, which must be checked already."""
    return op.attrs["parts"]  # type: ignore[return-value]  # checked by the declaration


def parsed(op: Op) -> FusedExpression:
    """The fused expression of an operation; raises OpError if it is malformed or has indices."""
    try:
        made = parse(str(op.attrs["expression"]))
    except ParseError as error:
        raise OpError(str(error)) from None
    if made.indices or made.loads:
        raise OpError("its expression has indices, which only kernel.pointwise supports")
    return made


def check_operands(
    args: tuple[Any, ...], first: int, made: FusedExpression, shape: tuple[Size, ...] | None = None
) -> None:
    """Checks the operands of a fused expression, from argument `first` on; raises OpError.

    Args:
        args: The operands x0, x1, ….
        first: The index of the first of them among the arguments.
        made: The expression.
        shape: The shape of its result, by default of the first operand.
    """
    for place, arg in enumerate(args):
        if not isinstance(arg, Value) or not arg.tensor.dtype.is_float or arg.tensor.dtype.bits not in (16, 32):
            raise OpError("an operand of an expression must be a tensor in bf16, f16, or f32", first + place)
        shape = arg.tensor.shape if shape is None else shape
        if arg.tensor.shape not in (shape, shape[-1:]):
            need = f"{list(map(str, shape))} or {list(map(str, shape[-1:]))}"
            raise OpError(f"operand x{place} is {arg.tensor}, but this expression needs {need}", first + place)
    read = [name for name in made.operands if name[0] == "x"]
    if read != [f"x{place}" for place in range(len(args))]:
        raise OpError(f"its expression reads {', '.join(read) or 'no operands'}, but it has {len(args)} operands")


def fused_quantize(
    *operands: torch.Tensor, expression: str, keep: Sequence[str], format: Format
) -> tuple[torch.Tensor, ...]:
    """Torch definition of `kernel.fused_quantize`."""
    result, *kept = parse(expression).run({f"x{place}": x for place, x in enumerate(operands)}, keep)
    return (*numerics.quantize(result, format), *kept)


def fused_linear(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None = None,
    *others: torch.Tensor, expression: str, parts: int, x_format: Format, w_format: Format,
    format: Format | None = None, multiply: Callable[..., torch.Tensor] = numerics.scaled_linear,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Torch definition of `kernel.fused_linear`; `multiply` replaces `numerics.scaled_linear`."""
    sums = multiply(x, x_scale, w, w_scale, bias, x_format=x_format, w_format=w_format, out_dtype=torch.float32)
    named = {f"y{place}": y for place, y in enumerate(sums.chunk(parts, -1))}
    (result,) = parse(expression).run(named | {f"x{place}": x for place, x in enumerate(others)})
    return (result,) if format is None else numerics.quantize(result, format)


ACTIVATION_AND_WEIGHT: dict[str, tuple[AttributeCheck, str]] = {"w_format": FORMAT, "x_format": FORMAT}
"""The formats of a matmul's operands."""

implement("quant.quantize", "kernel.quantize")
implement("quant.quantize_static", "kernel.quantize_static")
implement("quant.linear", "kernel.scaled_linear")
declare(
    OpDef(
        "kernel.fused_quantize",
        "Evaluates a fused expression row by row and quantizes the result without storing it first.",
        ("x", "*"),
        {"expression": TEXT, "format": FORMAT, "keep": NAMES},
        types=fused_quantize_types,
        meaning=fused_quantize,
        role=Role.QUANTIZE,
    )
)
declare(
    OpDef(
        "kernel.fused_linear",
        "`kernel.scaled_linear` in FP32 with a fused epilogue and, if a format is given, quantization.",
        (*LINEAR, "*"),
        {"expression": TEXT, "parts": PARTS, **ACTIVATION_AND_WEIGHT},
        {"format": FORMAT},
        types=fused_linear_types,
        meaning=fused_linear,
        role=Role.QUANTIZED_MATMUL,
    )
)
