"""The `kernel` dialect: what code generation consumes. As `quant`, with the order of the scales in memory settled.

`scale_layout` is "row_major" (the scales of one row of blocks stand together) or "col_major" (the scales of one column
of blocks do, which is the order that a matrix kernel reads them in). It says nothing about shapes and values.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qcompiler import numerics
from qcompiler.body import Body, parse
from qcompiler.dialects.aten import ir_dtype
from qcompiler.dialects.quant import (
    FORMAT,
    PROFILE,
    block_of,
    dtype_of,
    linear_shape,
    linear_types,
    quantize,
    quantize_static,
    quantize_static_types,
    quantize_types,
    scale_shape,
)
from qcompiler.errors import ParseError
from qcompiler.ir import DType, Op, Role, Size, TensorType, Type, Value
from qcompiler.ir.op_table import BLOCK, DTYPE, TEXT, AttributeCheck, OpDef, OpError, declare, one_of

SCALE_LAYOUT = one_of("row_major", "col_major")
NAMES: tuple[AttributeCheck, str] = (
    lambda a: isinstance(a, tuple) and all(isinstance(name, str) for name in a),
    'a list of names such as ["h"]',
)
PARTS: tuple[AttributeCheck, str] = (lambda a: a in (1, 2) and not isinstance(a, bool), "1 or 2")

QUANTIZED = ("block", "dtype", "profile", "scale_layout")
"""The attributes of what is quantized on the way out."""


def scaled_linear_types(op: Op) -> tuple[Type, ...]:
    """As `quant.linear`; the producer of the activation's scales must write the layout that is read."""
    check_layout(op)
    return linear_types(op)


def check_layout(op: Op) -> None:
    """Holds the activation's scales to the layout in which their producer, if it has one, writes them."""
    scale, read = op["x_scale"], op.attrs["x_scale_layout"]
    if (written := scale.op.attrs.get("scale_layout", read)) != read:
        raise OpError(f"{scale} is written {written}, but read {read}", "x_scale")


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
    return (*_quantized(op, shape), *(TensorType(ir_dtype(made.dtype(name)), shape) for name in kept))


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
    given = [name for name in QUANTIZED if name in op.attrs]
    if given and len(given) < len(QUANTIZED):
        raise OpError(f"attributes {', '.join(QUANTIZED)} are given together, or none of them")
    return _quantized(op, shape) if given else (TensorType(ir_dtype(made.dtype()), shape),)


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
        if not isinstance(arg, Value) or not arg.tensor.dtype.is_float or arg.tensor.dtype.bytes not in (2, 4):
            raise OpError("an operand of a body is a tensor in bf16, f16 or f32", first + place)
        shape = arg.tensor.shape if shape is None else shape
        if arg.tensor.shape not in (shape, shape[-1:]):
            need = f"{list(map(str, shape))} or {list(map(str, shape[-1:]))}"
            raise OpError(f"operand x{place} is {arg.tensor}, but this body needs {need}", first + place)
    read = [name for name in made.operands if name[0] == "x"]
    if read != [f"x{place}" for place in range(len(args))]:
        raise OpError(f"its body reads {', '.join(read) or 'no operand'}, but it has {len(args)} of them")


def _quantized(op: Op, shape: tuple[Size, ...]) -> tuple[Type, Type]:
    scale = TensorType(DType.f32, scale_shape(shape, block_of(op, "block")))
    return TensorType(dtype_of(op, "dtype"), shape), scale


def _quantize(*operands: Any, scale_layout: str, **keywords: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(*operands, **keywords)


def _scaled_linear(*operands: Any, x_scale_layout: str, **keywords: Any) -> torch.Tensor:
    return numerics.scaled_linear(*operands, **keywords)


def fused_quantize(
    *operands: torch.Tensor, body: str, keep: Sequence[str], scale_layout: str, **options: Any
) -> tuple[torch.Tensor, ...]:
    """The meaning of `kernel.fused_quantize`."""
    result, *kept = parse(body).run({f"x{place}": x for place, x in enumerate(operands)}, keep)
    return (*numerics.quantize(result, **options), *kept)


def fused_linear(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None = None,
    *others: torch.Tensor, body: str, parts: int, x_block: Sequence[int], w_block: Sequence[int],
    x_scale_layout: str, scale_layout: str | None = None,
    multiply: Callable[..., torch.Tensor] = numerics.scaled_linear, **options: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The meaning of `kernel.fused_linear`; `multiply` is what to call for `numerics.scaled_linear`."""
    sums = multiply(x, x_scale, w, w_scale, bias, x_block=x_block, w_block=w_block, out_dtype=torch.float32)
    named = {f"y{place}": y for place, y in enumerate(sums.chunk(parts, -1))}
    (result,) = parse(body).run(named | {f"x{place}": x for place, x in enumerate(others)})
    return numerics.quantize(result, **options) if options else (result,)


declare(
    OpDef(
        "kernel.quantize",
        "`quant.quantize`, with the scales in a given order in memory.",
        ("x", "prescale?"),
        {"block": BLOCK, "dtype": FORMAT, "profile": PROFILE, "scale_layout": SCALE_LAYOUT},
        types=quantize_types,
        meaning=_quantize,
        role=Role.QUANTIZE,
    )
)
declare(
    OpDef(
        "kernel.quantize_static",
        "`quant.quantize_static`.",
        ("x", "scale", "prescale?"),
        {"block": BLOCK, "dtype": FORMAT, "profile": PROFILE},
        types=quantize_static_types,
        meaning=quantize_static,
        role=Role.QUANTIZE,
    )
)
declare(
    OpDef(
        "kernel.scaled_linear",
        "`quant.linear`, with the activation's scales in a given order in memory.",
        ("x", "x_scale", "w", "w_scale", "bias?"),
        {"out_dtype": DTYPE, "w_block": BLOCK, "x_block": BLOCK, "x_scale_layout": SCALE_LAYOUT},
        types=scaled_linear_types,
        meaning=_scaled_linear,
        role=Role.QUANTIZED_MATMUL,
    )
)
declare(
    OpDef(
        "kernel.fused_quantize",
        "Computes the rows of a tensor from those of others, and quantizes them without storing them first.",
        ("x", "*"),
        {
            "block": BLOCK,
            "body": TEXT,
            "dtype": FORMAT,
            "keep": NAMES,
            "profile": PROFILE,
            "scale_layout": SCALE_LAYOUT,
        },
        types=fused_quantize_types,
        meaning=fused_quantize,
        role=Role.QUANTIZE,
    )
)
declare(
    OpDef(
        "kernel.fused_linear",
        "`kernel.scaled_linear` in FP32, a body on its tiles before they are stored, and, where told, quantization.",
        ("x", "x_scale", "w", "w_scale", "bias?", "*"),
        {"body": TEXT, "parts": PARTS, "w_block": BLOCK, "x_block": BLOCK, "x_scale_layout": SCALE_LAYOUT},
        {"block": BLOCK, "dtype": FORMAT, "profile": PROFILE, "scale_layout": SCALE_LAYOUT},
        types=fused_linear_types,
        meaning=fused_linear,
        role=Role.QUANTIZED_MATMUL,
    )
)
