"""The `quant` dialect: what the passes yield. Data and scale are two values; granularity is always an attribute.

%x_q, %x_s = quant.quantize(%x) {block = [1, 128], dtype = f8e4m3fn, ...} : f8e4m3fn[s0, 256], f32[s0, 2]
%x_q, %x_s = quant.quantize(%x, %prescale) {block = [1, -1], dtype = i8, ...} : i8[s0, 256], f32[s0, 1]
%x_q = quant.quantize_static(%x, %x_s) {block = [-1, -1], dtype = i8, ...} : i8[s0, 256]
%x_dq = quant.dequantize(%x_q, %x_s) {block = [1, 128], out_dtype = f32} : f32[s0, 256]
%w = quant.dequantize(%w_q, %w_s) {block = [-1, -1], out_dtype = bf16, x_scale = 0.02} : bf16[512, 256]
%y = quant.linear(%x_q, %x_s, %w_q, %w_s, %bias) {out_dtype = bf16, x_block = [1, 128], ...} : bf16[s0, 512]

A -1 in a block is the whole of its axis: [1, -1] is a token, or an output channel of a weight; [-1, -1] is the tensor.

`x_scale` on the dequantize of a stored weight is the static scale of the activation that the weight is multiplied with,
as its checkpoint has it. It does not change the numbers: a pass that quantizes activations with static scales reads it.
"""

import math
from typing import Any

import torch

from qcompiler import numerics
from qcompiler.ir import DType, Op, Role, Size, TensorType, Type, Value, ceildiv
from qcompiler.ir.op_table import BLOCK, DTYPE, AttributeCheck, OpDef, OpError, declare, one_of

PROFILE = one_of(*numerics.PROFILES)
EIGHT_BITS = (DType.f8e4m3fn, DType.f8e5m2, DType.i8)
"""What a tensor can be quantized to."""
FORMAT: tuple[AttributeCheck, str] = (lambda a: a in EIGHT_BITS, "f8e4m3fn, f8e5m2 or i8")
POSITIVE: tuple[AttributeCheck, str] = (
    lambda a: isinstance(a, float) and math.isfinite(a) and a > 0, "a positive finite number such as 0.02"
)  # fmt: skip


def scale_shape(shape: tuple[Size, ...], block: tuple[int, int]) -> tuple[Size, ...]:
    """`numerics.scale_shape` for sizes that may be symbolic."""
    if not shape:
        raise OpError("a tensor without dimensions has no blocks", 0)
    rows, columns = block
    across: Size = 1 if columns == numerics.ALL else ceildiv(shape[-1], columns)
    if len(shape) == 1:
        return (across,)
    return (1, across) if rows == numerics.ALL else (*shape[:-2], ceildiv(shape[-2], rows), across)


def block_of(op: Op, name: str) -> tuple[int, int]:
    """A block attribute, known to have been checked."""
    return op.attrs[name]  # type: ignore[return-value]  # the declaration's check has passed


def dtype_of(op: Op, name: str) -> DType:
    """A dtype attribute, known to have been checked."""
    return op.attrs[name]  # type: ignore[return-value]  # the declaration's check has passed


def x_scale_of(weight: Value) -> float | None:
    """The static scale that a checkpoint has for the activation beside a stored weight; None if there is none."""
    scale = weight.op.attrs.get("x_scale") if weight.op.name == "quant.dequantize" else None
    return scale if isinstance(scale, float) else None


def is_static(op: Op) -> bool:
    """Whether an operation quantizes by a scale that is given."""
    return op.role is Role.QUANTIZE and op.get("scale") is not None


def check_scale(op: Op, data: str, scale_name: str, block_name: str) -> None:
    """Holds the scale of operand `data` to the shape that the block needs; OpError otherwise."""
    quantized, scale = op[data].tensor, op[scale_name].tensor
    if quantized.dtype not in EIGHT_BITS:
        raise OpError(f"it is {quantized}, which is not quantized", data)
    block = block_of(op, block_name)
    want = TensorType(DType.f32, scale_shape(quantized.shape, block))
    if scale != want:
        raise OpError(f"the scale is {scale}, but {block_name} {list(block)} over {quantized} needs {want}", scale_name)


def quantize_types(op: Op) -> tuple[Type, ...]:
    """(x float[..., M, K], prescale float[K]?) -> dtype[..., M, K], f32[..., ceil(M / bm), ceil(K / bk)]"""
    x = _checked_source(op)
    scale = TensorType(DType.f32, scale_shape(x.shape, block_of(op, "block")))
    return TensorType(dtype_of(op, "dtype"), x.shape), scale


def quantize_static_types(op: Op) -> tuple[Type, ...]:
    """(x float[..., M, K], scale f32[...], prescale float[K]?) -> dtype[..., M, K]"""
    x, block = _checked_source(op), block_of(op, "block")
    want = TensorType(DType.f32, scale_shape(x.shape, block))
    if op["scale"].type != want:
        raise OpError(f"the scale is {op['scale'].type}, but block {list(block)} over {x} needs {want}", "scale")
    return (TensorType(dtype_of(op, "dtype"), x.shape),)


def _checked_source(op: Op) -> TensorType:
    """The type of what is quantized; OpError if it, or the prescale if there is one, has a wrong type."""
    x, factors = op["x"].tensor, op.get("prescale")
    if not x.dtype.is_float or x.dtype.bytes == 1 or not x.shape:
        raise OpError(f"only a floating-point tensor with a dimension can be quantized, not {x}", "x")
    if factors is not None and not (factors.tensor.dtype.is_float and factors.tensor.shape == x.shape[-1:]):
        raise OpError(f"the prescale is {factors.type}, but {x} needs one number for each channel", "prescale")
    return x


def dequantize_types(op: Op) -> tuple[Type, ...]:
    """(data f8[..., M, K], scale f32[...]) -> out_dtype[..., M, K]"""
    check_scale(op, "data", "scale", "block")
    return (TensorType(dtype_of(op, "out_dtype"), op["data"].tensor.shape),)


def linear_types(op: Op) -> tuple[Type, ...]:
    """(x f8[..., K], x_scale, w f8[N, K], w_scale, bias [N]?) -> out_dtype[..., N]"""
    return (TensorType(dtype_of(op, "out_dtype"), linear_shape(op)),)


def linear_shape(op: Op) -> tuple[Size, ...]:
    """The shape of the product; OpError if an operand, or the bias if there is one, does not fit."""
    x, w, bias = op["x"].tensor, op["w"].tensor, op.get("bias")
    check_scale(op, "x", "x_scale", "x_block")
    check_scale(op, "w", "w_scale", "w_block")
    if len(w.shape) != 2 or x.shape[-1] != w.shape[1]:
        raise OpError(f"the weight is {w}, but the activation {x} needs [N, {x.shape[-1]}]", "w")
    if bias is not None and bias.tensor.shape != w.shape[:1]:
        raise OpError(f"the bias is {bias.type}, but the weight {w} needs {w.shape[0]} of them", "bias")
    return (*x.shape[:-1], w.shape[0])


def quantize(
    x: torch.Tensor, prescale: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The meaning of `quant.quantize`."""
    return numerics.quantize(x, prescale=prescale, **options)


def quantize_static(
    x: torch.Tensor, scale: torch.Tensor, prescale: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """The meaning of `quant.quantize_static`."""
    return numerics.quantize_static(x, scale, prescale=prescale, **options)


def dequantize(
    data: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int],
    out_dtype: torch.dtype,
    x_scale: float | None = None,  # for the passes alone
) -> torch.Tensor:
    """The meaning of `quant.dequantize`."""
    return numerics.dequantize(data, scale, block, out_dtype)


declare(
    OpDef(
        "quant.quantize",
        "Divides each block by a scale of its own and rounds to an 8-bit format, as `qcompiler.numerics` says.",
        ("x", "prescale?"),
        {"block": BLOCK, "dtype": FORMAT, "profile": PROFILE},
        types=quantize_types,
        meaning=quantize,
        role=Role.QUANTIZE,
    )
)
declare(
    OpDef(
        "quant.quantize_static",
        "Divides each block by a scale that is given and rounds to an 8-bit format.",
        ("x", "scale", "prescale?"),
        {"block": BLOCK, "dtype": FORMAT, "profile": PROFILE},
        types=quantize_static_types,
        meaning=quantize_static,
        role=Role.QUANTIZE,
    )
)
declare(
    OpDef(
        "quant.dequantize",
        "Multiplies each block by its scale, in FP32.",
        ("data", "scale"),
        {"block": BLOCK, "out_dtype": DTYPE},
        {"x_scale": POSITIVE},
        types=dequantize_types,
        meaning=dequantize,
        role=Role.DEQUANTIZE,
    )
)
declare(
    OpDef(
        "quant.linear",
        "Both operands dequantized, multiplied and summed in FP32, plus the bias, rounded once.",
        ("x", "x_scale", "w", "w_scale", "bias?"),
        {"out_dtype": DTYPE, "w_block": BLOCK, "x_block": BLOCK},
        types=linear_types,
        meaning=numerics.scaled_linear,
        role=Role.QUANTIZED_MATMUL,
    )
)
