"""Quantizes tensors to codes and scales, and dequantizes them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompiler.errors import QCompilerError
from qcompiler.ir.formats import ALL, FP8_TENSOR, FP8_TILE, Format, scale_shape
from qcompiler.numerics.blocks import describe, into_blocks, out_of_blocks, spread
from qcompiler.numerics.codes import decode, encode, encode_asymmetric, packed
from qcompiler.numerics.dtypes import torch_dtype
from qcompiler.numerics.scales import asymmetric_scale_of, in_full, scale_of, tensor_scale_of

MOST_AT_ONCE = 2**26
"""Maximum elements quantized at once; larger batches are quantized matrix by matrix to save memory."""


def quantize(x: Tensor, format: Format = FP8_TILE, prescale: Tensor | None = None) -> tuple[Tensor, ...]:
    """Quantizes blocks of the last two dimensions with one scale per block, computed from the block.

    Args:
        x: Floating point, `[..., M, K]`; leading dimensions are a batch, and a 1-D tensor is one row. M may be 0, and
            M and K need not be multiples of the block: edge blocks are padded with zeros.
        format: The format of codes and scales; its scale layout is ignored.
        prescale: `[K]`, floating point: factors of the channels, multiplied in FP32 before quantization.

    Returns:
        The codes, in the shape of `x`, or packed into bytes along K if below 8 bits; the scales in the shape of
        `scale_shape`; and the FP32 tensor scale, or the INT8 zero points, if the format has them. All are contiguous.
        NaN and infinities become NaN codes or a NaN scale; see the table in the docstring of `numerics`.

    Raises:
        QCompilerError: `x` is a scalar or not floating point, K cannot be packed, or the prescale does not have one
            number for each channel.
    """
    if type(x) is Tensor and x.dim() > 2 and format.block[0] != ALL and x.numel() > MOST_AT_ONCE:
        return _quantize_one_by_one(x, format, prescale)
    wide = _prescaled(x, format, prescale)
    return _quantize(wide, format, _tensor_scale(wide, format))


def _tensor_scale(x: Tensor, format: Format) -> Tensor | None:
    """The tensor scale of FP32 numbers, computed from the finite ones."""
    if not format.tensor_scale:
        return None
    if x.numel() == 0:
        return tensor_scale_of(x.new_zeros(()), format)
    return tensor_scale_of(x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().amax(), format)


def _quantize(x: Tensor, format: Format, tensor_scale: Tensor | None) -> tuple[Tensor, ...]:
    """`quantize` of FP32 numbers with a given tensor scale."""
    blocks = into_blocks(x, format.block)
    if not format.symmetric:
        low, high = blocks.amin((-3, -1), keepdim=True), blocks.amax((-3, -1), keepdim=True)
        scale, zero_point = asymmetric_scale_of(low.clamp_max(0.0), high.clamp_min(0.0), format)
        codes = out_of_blocks(encode_asymmetric(blocks, scale, zero_point, format), x)
        shape = scale_shape(x.shape, format.block)
        return packed(codes, format), scale.reshape(shape), zero_point.to(torch.int8).reshape(shape)
    marked = format.block[0] != 1 and format.has_nan
    sizes = blocks.abs()
    if marked:
        # In place and without a mask: compare and select takes ten times as long on a CPU.
        sizes = sizes.nan_to_num_(nan=0.0, posinf=0.0)
    scale = scale_of(sizes.amax((-3, -1), keepdim=True), format, tensor_scale)
    codes = out_of_blocks(encode(blocks, in_full(scale, tensor_scale), format, marked), x)
    found = packed(codes, format), scale.reshape(scale_shape(x.shape, format.block))
    return found if tensor_scale is None else (*found, tensor_scale)


def _quantize_one_by_one(x: Tensor, format: Format, prescale: Tensor | None) -> tuple[Tensor, ...]:
    """`quantize`, matrix by matrix, so only one matrix is in FP32 at a time."""
    kinds = [kind.stored for kind in format.types(x.shape)]
    codes, scale, *rest = [torch.empty(k.shape, dtype=torch_dtype(k.dtype), device=x.device) for k in kinds]  # type: ignore[arg-type]  # sizes are integers here
    for tensor_scale in rest if format.tensor_scale else ():
        each = [_tensor_scale(_prescaled(matrix, format, prescale), format) for matrix in x]
        tensor_scale.copy_(torch.stack([one for one in each if one is not None]).amax())
    for index, matrix in enumerate(x):
        level = rest[0] if format.tensor_scale else None
        codes[index], scale[index], *own = _quantize(_prescaled(matrix, format, prescale), format, level)
        if not format.symmetric:
            rest[0][index] = own[0]
    return codes, scale, *rest


def quantize_static(x: Tensor, scale: Tensor, format: Format = FP8_TENSOR, prescale: Tensor | None = None) -> Tensor:
    """Quantizes with given scales; finite numbers outside their range saturate.

    Args:
        x: As in `quantize`.
        scale: Positive, with the dtype and shape of the format's scales.
        format: As in `quantize`, without a tensor scale; only the division of its profile is used.
        prescale: As in `quantize`.

    Returns:
        The codes, as in `quantize`.

    Raises:
        QCompilerError: As in `quantize`, the format has zero points, or the scale does not have one entry for each
            block.
    """
    if not format.symmetric:
        raise QCompilerError("a static scale has no zero points", got=format, need="a symmetric format")
    wide = _prescaled(x, format, prescale)
    check_scale(x, x.shape, scale, format)
    blocks = into_blocks(wide, format.block)
    codes = encode(blocks, spread(in_full(scale, None), x), format, format.has_nan)
    return packed(out_of_blocks(codes, x), format)


def dequantize(
    q: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    format: Format = FP8_TILE,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Subtracts the zero points, if any, multiplies each block by its scale in FP32, and rounds once to `out_dtype`.

    Args:
        q: Codes from `quantize`, for `[..., M, K]` or `[K]`.
        scale: With the dtype and shape of the format's scales; any strides.
        tensor_scale: FP32, one number, if the format has a tensor scale.
        zero_point: INT8, in the shape of the scale, if the format is not symmetric.
        format: The format of the codes and scales.
        out_dtype: The dtype of the result, which has the shape of the original tensor.

    Raises:
        QCompilerError: `q` is not in the format, or the scale does not have one entry for each block.
    """
    if q.dtype != torch_dtype(format.element):
        raise QCompilerError("the codes do not match the format", got=describe(q), need=format)
    values = decode(q, format)
    check_scale(q, values.shape, scale, format, tensor_scale, zero_point)
    full, blocks = spread(in_full(scale, tensor_scale), values), into_blocks(values, format.block)
    # In place: on a CPU, allocating memory costs more than the arithmetic.
    if zero_point is not None:
        blocks.sub_(spread(zero_point, values))
    return out_of_blocks(blocks.mul_(full), values).to(out_dtype)


def _prescaled(x: Tensor, format: Format, prescale: Tensor | None) -> Tensor:
    """`x * prescale` in FP32; raises QCompilerError if `x` cannot be quantized."""
    if x.dim() == 0 or not x.is_floating_point():
        raise QCompilerError("cannot quantize this tensor", got=describe(x), need="floating point, 1 dimension or more")
    if why := format.why_not(x.shape):
        raise QCompilerError("cannot quantize this tensor", got=describe(x), where=why)
    wide = x.to(torch.float32)
    if prescale is None:
        return wide
    if prescale.shape != x.shape[-1:] or not prescale.is_floating_point():
        raise QCompilerError(
            f"the prescale does not have one number for each channel of {describe(x)}",
            got=describe(prescale),
            need=f"float[{x.shape[-1]}]",
        )
    return wide * prescale.to(torch.float32)


def check_scale(
    described: Tensor,
    shape: Sequence[int],
    scale: Tensor,
    format: Format,
    tensor_scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> None:
    """Checks the scales and zero points of a tensor of the given shape against the format; raises QCompilerError."""
    need = scale_shape(shape, format.block) if shape else []
    if not need or list(scale.shape) != need:
        rows, columns = format.block
        problem = f"the scale does not have one entry for each [{rows}, {columns}] block of {describe(described)}"
        raise QCompilerError(problem, got=describe(scale), need=need)
    if (zero_point is None) != format.symmetric or (zero_point is not None and list(zero_point.shape) != need):
        got = "no zero points" if zero_point is None else f"zero points {describe(zero_point)}"
        raise QCompilerError("the zero points do not match the format", got=got, need=format)
    if (tensor_scale is not None) != format.tensor_scale:
        got = "no tensor scale" if tensor_scale is None else "a tensor scale"
        raise QCompilerError("the scales do not match the format", got=got, need=format)
