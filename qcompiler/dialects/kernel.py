"""The `kernel` dialect: what code generation consumes. As `quant`, for formats of 8-bit codes with FP32 scales.

Only here does the `scale_layout` of a format count, the order of an activation's scales in memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qcompiler import numerics
from qcompiler.dialects.body import Body, parse
from qcompiler.dialects.quant import (
    LINEAR,
    linear_shape,
    linear_types,
    quantize,
    quantize_static,
    quantize_static_types,
    quantize_types,
    stored_types,
)
from qcompiler.errors import ParseError
from qcompiler.ir import Argument, DType, Format, Op, Role, Size, TensorType, Type, Value
from qcompiler.ir.op_table import DTYPE, TEXT, AttributeCheck, OpDef, OpError, declare
from qcompiler.numerics.dtypes import ir_dtype


def why_no_kernel(format: Format) -> str | None:
    """Why operations on a format stay in the `quant` dialect and run in plain torch; None for those of this dialect."""
    if format.block[1] == 1:
        return "its scales vary from channel to channel, along the sum, where no tensor core can apply them"
    return None if _is_legal(format) else f"kernels have 8-bit codes and one level of FP32 scales, and this is {format}"


def _is_legal(format: Argument) -> bool:
    return isinstance(format, Format) and format.element.bits == 8 and format.scale is DType.f32


FORMAT: tuple[AttributeCheck, str] = (_is_legal, "a format of 8-bit codes and FP32 scales such as #fp8_tile")
NAMES: tuple[AttributeCheck, str] = (
    lambda a: isinstance(a, tuple) and all(isinstance(name, str) for name in a),
    'a list of names such as ["h"]',
)
PARTS: tuple[AttributeCheck, str] = (lambda a: a in (1, 2) and not isinstance(a, bool), "1 or 2")


def scaled_linear_types(op: Op) -> tuple[Type, ...]:
    """As `quant.linear`; the producer of the activation's scales must write the layout that is read."""
    check_layout(op)
    return linear_types(op)


def check_layout(op: Op) -> None:
    """Holds the layout in which a matmul reads the activation's scales to the one in which they are written."""
    written, read = op["x_scale"].op.attrs.get("format"), op.format("x_format")
    if isinstance(written, Format) and written.scale_layout != read.scale_layout:
        raise OpError(f"{op['x_scale']} is written {written.scale_layout}, but read {read.scale_layout}", "x_scale")


def is_fused(op: Op) -> bool:
    """Whether an operation has a body."""
    return op.name.startswith("kernel.") and "body" in op.attrs


def fused_quantize_types(op: Op) -> tuple[Type, ...]:
    """(x float[..., K], others float[..., K] or [K]) -> dtype[..., K], f32[..., scales], those of `keep`"""
    made = _parsed(op)
    if not op.args:
        raise OpError("it has no operand")
    _check_operands(op.args, 0, made)
    shape = op["x"].tensor.shape
    defined = {name for name, _ in made.definitions}
    kept: tuple[str, ...] = op.attrs["keep"]  # type: ignore[assignment]  # the declaration's check has passed
    for name in kept:
        if name not in defined:
            raise OpError(f"its body defines no '{name}' that could be kept")
    return (*stored_types(op, op.format(), shape), *(TensorType(ir_dtype(made.dtype(name)), shape) for name in kept))


def fused_linear_types(op: Op) -> tuple[Type, ...]:
    """As `quant.linear`, then the body on the sums: float[..., N / parts], or codes and scales of that"""
    check_layout(op)
    *rows, columns = linear_shape(op)
    made, parts = _parsed(op), parts_of(op)
    if not isinstance(columns, int) or columns % parts:
        raise OpError(f"{columns} columns have no {parts} equal parts", "w")
    shape: tuple[Size, ...] = (*rows, columns // parts)
    if wrong := [name for name in made.operands if name[0] == "y" and int(name[1:]) >= parts]:
        raise OpError(f"its body reads {wrong[0]}, but the sum has {parts} parts")
    if made.across:
        raise OpError("its body needs whole rows, of which a tile of the product has a part")
    _check_operands(op.rest, len(op.args) - len(op.rest), made, shape)
    if "format" in op.attrs:
        return stored_types(op, op.format(), shape)
    return (TensorType(ir_dtype(made.dtype()), shape),)


def parts_of(op: Op) -> int:
    """The attribute `parts`, known to have been checked."""
    return op.attrs["parts"]  # type: ignore[return-value]  # the declaration's check has passed


def _parsed(op: Op) -> Body:
    try:
        return parse(str(op.attrs["body"]))
    except ParseError as error:
        raise OpError(str(error)) from None


def _check_operands(args: tuple[Any, ...], first: int, made: Body, shape: tuple[Size, ...] | None = None) -> None:
    """Holds the operands of a body, which begin at argument `first`, to a shape: that of the first, if not given."""
    for place, arg in enumerate(args):
        if not isinstance(arg, Value) or not arg.tensor.dtype.is_float or arg.tensor.dtype.bits not in (16, 32):
            raise OpError("an operand of a body is a tensor in bf16, f16 or f32", first + place)
        shape = arg.tensor.shape if shape is None else shape
        if arg.tensor.shape not in (shape, shape[-1:]):
            need = f"{list(map(str, shape))} or {list(map(str, shape[-1:]))}"
            raise OpError(f"operand x{place} is {arg.tensor}, but this body needs {need}", first + place)
    read = [name for name in made.operands if name[0] == "x"]
    if read != [f"x{place}" for place in range(len(args))]:
        raise OpError(f"its body reads {', '.join(read) or 'no operand'}, but it has {len(args)} of them")


def fused_quantize(*operands: torch.Tensor, body: str, keep: Sequence[str], format: Format) -> tuple[torch.Tensor, ...]:
    """The meaning of `kernel.fused_quantize`."""
    result, *kept = parse(body).run({f"x{place}": x for place, x in enumerate(operands)}, keep)
    return (*numerics.quantize(result, format), *kept)


def fused_linear(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None = None,
    *others: torch.Tensor, body: str, parts: int, x_format: Format, w_format: Format, format: Format | None = None,
    multiply: Callable[..., torch.Tensor] = numerics.scaled_linear,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The meaning of `kernel.fused_linear`; `multiply` is what to call for `numerics.scaled_linear`."""
    sums = multiply(x, x_scale, w, w_scale, bias, x_format=x_format, w_format=w_format, out_dtype=torch.float32)
    named = {f"y{place}": y for place, y in enumerate(sums.chunk(parts, -1))}
    (result,) = parse(body).run(named | {f"x{place}": x for place, x in enumerate(others)})
    return (result,) if format is None else numerics.quantize(result, format)


ACTIVATION_AND_WEIGHT: dict[str, tuple[AttributeCheck, str]] = {"w_format": FORMAT, "x_format": FORMAT}
"""The formats of a matmul's operands."""

declare(
    OpDef(
        "kernel.quantize",
        "`quant.quantize`, with the scales in a given order in memory.",
        ("x", "prescale?"),
        {"format": FORMAT},
        types=quantize_types,
        meaning=quantize,
        role=Role.QUANTIZE,
    )
)
declare(
    OpDef(
        "kernel.quantize_static",
        "`quant.quantize_static`.",
        ("x", "scale", "prescale?"),
        {"format": FORMAT},
        types=quantize_static_types,
        meaning=quantize_static,
        role=Role.QUANTIZE,
    )
)
declare(
    OpDef(
        "kernel.scaled_linear",
        "`quant.linear`, with the activation's scales in a given order in memory.",
        LINEAR,
        {"out_dtype": DTYPE, **ACTIVATION_AND_WEIGHT},
        types=scaled_linear_types,
        meaning=numerics.scaled_linear,
        role=Role.QUANTIZED_MATMUL,
    )
)
declare(
    OpDef(
        "kernel.fused_quantize",
        "Computes the rows of a tensor from those of others, and quantizes them without storing them first.",
        ("x", "*"),
        {"body": TEXT, "format": FORMAT, "keep": NAMES},
        types=fused_quantize_types,
        meaning=fused_quantize,
        role=Role.QUANTIZE,
    )
)
declare(
    OpDef(
        "kernel.fused_linear",
        "`kernel.scaled_linear` in FP32, a body on its tiles before they are stored, and, where told, quantization.",
        (*LINEAR, "*"),
        {"body": TEXT, "parts": PARTS, **ACTIVATION_AND_WEIGHT},
        {"format": FORMAT},
        types=fused_linear_types,
        meaning=fused_linear,
        role=Role.QUANTIZED_MATMUL,
    )
)
