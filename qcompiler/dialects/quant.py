"""The `quant` dialect, produced by passes: codes and scales are values, their format is an attribute.

%x_q, %x_s = quant.quantize(%x) {format = #fp8_tile} : f8e4m3fn[s0, 256], f32[s0, 2]
%x_q, %x_s = quant.quantize(%x, %prescale) {format = #int8_row} : i8[s0, 256], f32[s0, 1]
%w_q, %w_s, %w_t = quant.quantize(%w) {format = #nvfp4} : f4e2m1fn[512, 256], f8e4m3fn[512, 16], f32[]
%w_q, %w_s, %w_z = quant.quantize(%w) {format = #format<i8, block = [1, -1], symmetric = false>}
%x_q = quant.quantize_static(%x, %x_s) {format = #int8_tensor} : i8[s0, 256]
%x_dq = quant.dequantize(%x_q, %x_s) {format = #fp8_tile, out_dtype = f32} : f32[s0, 256]
%w = quant.dequantize(%w_q, %w_s) {format = #fp8_tensor, out_dtype = bf16, x_scale = 0.02} : bf16[512, 256]
%y = quant.linear(%x_q, %x_s, %w_q, %w_s, %bias) {out_dtype = bf16, w_format = #fp8_block, x_format = #fp8_tile} : …

`x_scale` on the dequantize of a stored weight is the static scale that the checkpoint has for the activation that is
multiplied with the weight. It does not change the result; the pass for static activation scales reads it.
"""

import math

import torch

from qcompiler import numerics
from qcompiler.errors import QCompilerError
from qcompiler.ir import DType, Format, Op, Role, Size, TensorType, Type, Value
from qcompiler.ir.op_table import DTYPE, AttributeCheck, OpDef, OpError, declare

FORMAT: tuple[AttributeCheck, str] = (lambda a: isinstance(a, Format), "a format such as #fp8_tile")
LEVELS = ("tensor_scale", "zero_point")
"""What a tensor may have beside codes and scales: see `Format.level`."""

POSITIVE: tuple[AttributeCheck, str] = (
    lambda a: isinstance(a, float) and math.isfinite(a) and a > 0,
    "a positive finite number such as 0.02",
)


def x_scale_of(weight: Value) -> float | None:
    """The static activation scale that a checkpoint has for a stored weight; None if there is none."""
    scale = weight.op.attrs.get("x_scale") if weight.op.name == "quant.dequantize" else None
    return scale if isinstance(scale, float) else None


def is_static(op: Op) -> bool:
    """Whether an operation quantizes with a given scale."""
    return op.role is Role.QUANTIZE and op.get("scale") is not None


def out_dtype_of(op: Op) -> DType:
    """The attribute `out_dtype`, which must be checked already."""
    return op.attrs["out_dtype"]  # type: ignore[return-value]  # checked by the declaration


def stored_types(op: Op, format: Format, shape: tuple[Size, ...]) -> tuple[TensorType, ...]:
    """The types of codes and scales of a tensor; raises OpError if the format cannot store it."""
    try:
        return format.types(shape)
    except QCompilerError as error:
        raise OpError(str(error), 0) from None


def check_stored(op: Op, data: str, prefix: str = "") -> None:
    """Checks operand `data` and its scales against their format; raises OpError.

    Args:
        op: The operation.
        data: The name of the codes operand.
        prefix: Prefix of the names of the scales, the tensor scale, the zero points and the format: "x_" or "w_".
    """
    format, codes = op.format(f"{prefix}format"), op[data].tensor
    if codes.dtype is not format.element:
        raise OpError(f"the codes are {codes}, but {prefix}format {format} needs {format.element}", data)
    _, *kinds = stored_types(op, format, codes.shape)
    present = dict(zip(("scale", format.level), kinds, strict=False))
    for name in ("scale", *LEVELS):
        want = present.get(name)
        operand = f"{prefix}{name}"
        given = op.get(operand)
        if (given and given.type) != want:
            got = given.type if given else "missing"
            what = name.replace("_", " ")
            at = operand if given else data
            raise OpError(f"the {what} is {got}, but {prefix}format {format} over {codes} needs {want or 'none'}", at)


def quantize_types(op: Op) -> tuple[Type, ...]:
    """(x float[..., M, K], prescale float[K]?) -> codes[..., M, K], scale[..., ceil(M / rows), ceil(K / columns)]"""
    _check_source(op)
    return stored_types(op, op.format(), op["x"].tensor.shape)


def quantize_static_types(op: Op) -> tuple[Type, ...]:
    """(x float[..., M, K], scale, prescale float[K]?) -> codes[..., M, K]"""
    _check_source(op)
    x, format = op["x"].tensor, op.format()
    if format.level is not None:
        raise OpError(f"{format} has a {format.level.replace('_', ' ')}, so its scales cannot be static")
    codes, want = stored_types(op, format, x.shape)
    if op["scale"].type != want:
        raise OpError(f"the scale is {op['scale'].type}, but format {format} over {x} needs {want}", "scale")
    return (codes,)


def _check_source(op: Op) -> None:
    """Checks the types of `x` and the prescale."""
    x, factors = op["x"].tensor, op.get("prescale")
    if not x.dtype.is_float or x.dtype.bits <= 8 or not x.shape:
        raise OpError(f"only a floating-point tensor with at least 1 dimension can be quantized, not {x}", "x")
    if factors is not None and not (factors.tensor.dtype.is_float and factors.tensor.shape == x.shape[-1:]):
        raise OpError(f"the prescale is {factors.type}, but {x} needs one number for each channel", "prescale")


def dequantize_types(op: Op) -> tuple[Type, ...]:
    """(data codes[..., M, K], scale, tensor_scale f32[]?, zero_point i8?) -> out_dtype[..., M, K]"""
    check_stored(op, "data")
    return (TensorType(out_dtype_of(op), op["data"].tensor.shape),)


def linear_types(op: Op) -> tuple[Type, ...]:
    """(x codes[..., K], x_scale, w codes[N, K], w_scale, bias [N]?, levels of x and w?) -> out_dtype[..., N]"""
    return (TensorType(out_dtype_of(op), linear_shape(op)),)


def linear_shape(op: Op) -> tuple[Size, ...]:
    """Checks the operands of a quantized matmul and returns the shape of its result."""
    x, w, bias = op["x"].tensor, op["w"].tensor, op.get("bias")
    check_stored(op, "x", "x_")
    check_stored(op, "w", "w_")
    if len(w.shape) != 2 or x.shape[-1] != w.shape[1]:
        raise OpError(f"the weight is {w}, but the activation {x} needs [N, {x.shape[-1]}]", "w")
    if bias is not None and bias.tensor.shape != w.shape[:1]:
        raise OpError(f"the bias is {bias.type}, but the weight {w} needs {w.shape[0]} elements", "bias")
    return (*x.shape[:-1], w.shape[0])


def quantize(x: torch.Tensor, prescale: torch.Tensor | None = None, *, format: Format) -> tuple[torch.Tensor, ...]:
    """Torch definition of `quant.quantize`."""
    return numerics.quantize(x, format, prescale)


def quantize_static(
    x: torch.Tensor, scale: torch.Tensor, prescale: torch.Tensor | None = None, *, format: Format
) -> torch.Tensor:
    """Torch definition of `quant.quantize_static`."""
    return numerics.quantize_static(x, scale, format, prescale)


def dequantize(
    data: torch.Tensor,
    scale: torch.Tensor,
    tensor_scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    *,
    format: Format,
    out_dtype: torch.dtype,
    x_scale: float | None = None,
) -> torch.Tensor:
    """Torch definition of `quant.dequantize`; only passes read `x_scale`."""
    return numerics.dequantize(data, scale, tensor_scale, zero_point, format=format, out_dtype=out_dtype)


LINEAR = ("x", "x_scale", "w", "w_scale", "bias?")
LINEAR_ATTRIBUTES: dict[str, tuple[AttributeCheck, str]] = {"out_dtype": DTYPE, "w_format": FORMAT, "x_format": FORMAT}

declare(
    OpDef(
        "quant.quantize",
        "Quantizes each block with a scale computed from the block, as defined in `qcompiler.numerics`.",
        ("x", "prescale?"),
        {"format": FORMAT},
        types=quantize_types,
        meaning=quantize,
        role=Role.QUANTIZE,
    )
)
declare(
    OpDef(
        "quant.quantize_static",
        "Quantizes each block with a given scale.",
        ("x", "scale", "prescale?"),
        {"format": FORMAT},
        types=quantize_static_types,
        meaning=quantize_static,
        role=Role.QUANTIZE,
    )
)
declare(
    OpDef(
        "quant.dequantize",
        "Subtracts zero points, if the format has them, and multiplies each block by its scale, in FP32.",
        ("data", "scale", *(f"{level}?" for level in LEVELS)),
        {"format": FORMAT, "out_dtype": DTYPE},
        {"x_scale": POSITIVE},
        types=dequantize_types,
        meaning=dequantize,
        role=Role.DEQUANTIZE,
    )
)
declare(
    OpDef(
        "quant.linear",
        "Dequantizes both operands, multiplies, accumulates, and adds the bias in FP32, and rounds once.",
        (*LINEAR, *(f"{side}_{level}?" for level in LEVELS for side in "xw")),
        LINEAR_ATTRIBUTES,
        types=linear_types,
        meaning=numerics.scaled_linear,
        role=Role.QUANTIZED_MATMUL,
    )
)
