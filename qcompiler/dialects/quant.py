"""The `quant` dialect: what the passes yield. Data and scale are two values; granularity is always an attribute.

%x_q, %x_s = quant.quantize(%x) {block = [1, 128], dtype = f8e4m3fn, ...} : f8e4m3fn[s0, 256], f32[s0, 2]
%x_dq = quant.dequantize(%x_q, %x_s) {block = [1, 128], out_dtype = f32} : f32[s0, 256]
%y = quant.linear(%x_q, %x_s, %w_q, %w_s, %bias) {out_dtype = bf16, x_block = [1, 128], ...} : bf16[s0, 512]
"""

from qcompiler import numerics
from qcompiler.ir import DType, Op, Size, TensorType, Type, Value, ceildiv
from qcompiler.ir.op_table import BLOCK, DTYPE, AttributeCheck, OpDef, OpError, declare, one_of

PROFILE = one_of(*numerics.PROFILES)
EIGHT_BITS = (DType.f8e4m3fn, DType.f8e5m2)
"""What a tensor can be quantized to."""
FORMAT: tuple[AttributeCheck, str] = (lambda a: a in EIGHT_BITS, "f8e4m3fn or f8e5m2")


def scale_shape(shape: tuple[Size, ...], block: tuple[int, int]) -> tuple[Size, ...]:
    """The shape of the scales of `shape` in blocks over its last two dimensions; a vector counts as one row."""
    if not shape:
        raise OpError("a tensor without dimensions has no blocks", 0)
    if len(shape) == 1:
        return (ceildiv(shape[0], block[1]),)
    return (*shape[:-2], ceildiv(shape[-2], block[0]), ceildiv(shape[-1], block[1]))


def block_of(op: Op, name: str) -> tuple[int, int]:
    """A block attribute, known to have been checked."""
    return op.attrs[name]  # type: ignore[return-value]  # the declaration's check has passed


def dtype_of(op: Op, name: str) -> DType:
    """A dtype attribute, known to have been checked."""
    return op.attrs[name]  # type: ignore[return-value]  # the declaration's check has passed


def check_scale(op: Op, data: int, block_name: str) -> None:
    """Holds the scale behind operand `data` to the shape that the block needs; OpError otherwise."""
    quantized, scale = op.tensor(data).tensor, op.tensor(data + 1).tensor
    if quantized.dtype not in EIGHT_BITS:
        raise OpError(f"it is {quantized}, which is not quantized", data)
    block = block_of(op, block_name)
    want = TensorType(DType.f32, scale_shape(quantized.shape, block))
    if scale != want:
        raise OpError(f"the scale is {scale}, but {block_name} {list(block)} over {quantized} needs {want}", data + 1)


def quantize_types(op: Op) -> tuple[Type, ...]:
    """(x float[..., M, K]) -> dtype[..., M, K], f32[..., ceil(M / bm), ceil(K / bk)]"""
    x = op.tensor(0).tensor
    if not x.dtype.is_float or x.dtype.bytes == 1 or not x.shape:
        raise OpError(f"only a floating-point tensor with a dimension can be quantized, not {x}", 0)
    return TensorType(dtype_of(op, "dtype"), x.shape), TensorType(
        DType.f32, scale_shape(x.shape, block_of(op, "block"))
    )


def dequantize_types(op: Op) -> tuple[Type, ...]:
    """(data f8[..., M, K], scale f32[...]) -> out_dtype[..., M, K]"""
    check_scale(op, 0, "block")
    return (TensorType(dtype_of(op, "out_dtype"), op.tensor(0).tensor.shape),)


def linear_types(op: Op) -> tuple[Type, ...]:
    """(x f8[..., K], x_scale, w f8[N, K], w_scale, bias [N]?) -> out_dtype[..., N]"""
    x, w = op.tensor(0).tensor, op.tensor(2).tensor
    check_scale(op, 0, "x_block")
    check_scale(op, 2, "w_block")
    if len(w.shape) != 2 or x.shape[-1] != w.shape[1]:
        raise OpError(f"the weight is {w}, but the activation {x} needs [N, {x.shape[-1]}]", 2)
    bias = op.args[4] if len(op.args) > 4 else None
    if isinstance(bias, Value) and bias.tensor.shape != w.shape[:1]:
        raise OpError(f"the bias is {bias.type}, but the weight {w} needs {w.shape[0]} of them", 4)
    return (TensorType(dtype_of(op, "out_dtype"), (*x.shape[:-1], w.shape[0])),)


declare(
    OpDef(
        "quant.quantize",
        "Divides each block by a scale of its own and rounds to an 8-bit format, as `qcompiler.numerics` says.",
        ("x",),
        {"block": BLOCK, "dtype": FORMAT, "profile": PROFILE},
        types=quantize_types,
        meaning=numerics.quantize,
    )
)
declare(
    OpDef(
        "quant.dequantize",
        "Multiplies each block by its scale, in FP32.",
        ("data", "scale"),
        {"block": BLOCK, "out_dtype": DTYPE},
        types=dequantize_types,
        meaning=numerics.dequantize,
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
    )
)
