"""Encodes FP32 blocks as codes of a format, and decodes them."""

import torch
from torch import Tensor

from qcompiler.ir.formats import Format, profile
from qcompiler.ir.types import DType
from qcompiler.numerics.dtypes import torch_dtype

PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""Tensor types outside tracing."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of FP4 codes 0 to 7; the fourth bit is the sign."""

FOUR_BITS = {
    DType.f4e2m1fn: (*E2M1, *(-magnitude for magnitude in E2M1)),
    DType.i4: (0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1),
}
"""The values of the 16 4-bit codes."""


def encode(blocks: Tensor, scale: Tensor, format: Format, marked: bool) -> Tensor:
    """Encodes FP32 blocks as unpacked codes in the same shape.

    Args:
        blocks: FP32, split into blocks.
        scale: FP32, broadcasts to `blocks`.
        format: The format of the codes.
        marked: Whether infinities become NaN.
    """
    scaled = blocks * scale.reciprocal() if profile(format.profile).division == "reciprocal" else blocks / scale
    if marked:
        scaled.addcmul_(blocks, scale.new_zeros(()))  # infinity times zero is NaN
    if format.scale is DType.f8e4m3fn:
        scaled.masked_fill_(scale == 0, 0.0)  # only E4M3 scales can be zero
    scaled.clamp_(-format.max, format.max)
    if format.has_nan:
        return scaled.to(torch_dtype(format.element))
    scaled.nan_to_num_(nan=0.0)
    if format.element is DType.f4e2m1fn:
        return _e2m1(scaled)
    return scaled.round_().to(torch.int8)


def encode_asymmetric(blocks: Tensor, scale: Tensor, zero_point: Tensor, format: Format) -> Tensor:
    """Encodes FP32 blocks as unpacked integer codes, `round(x / scale) + zero_point`; the codes of NaN are 0.

    Args:
        blocks: FP32, split into blocks.
        scale: FP32, broadcasts to `blocks`.
        zero_point: FP32, as `scale`: the code of zero.
        format: The format of the codes.
    """
    scaled = blocks * scale.reciprocal() if profile(format.profile).division == "reciprocal" else blocks / scale
    return scaled.round_().add_(zero_point).clamp_(*format.code_range).nan_to_num_(nan=0.0).to(torch.int8)


def _e2m1(scaled: Tensor) -> Tensor:
    """FP4 codes of magnitudes up to 6, rounded to nearest even; torch has no such cast."""
    size = scaled.abs()
    fine, medium, coarse = (size * 2).round_(), size.round().add_(2), (size * 0.5).round_().add_(4)
    codes = torch.where(size < 2, fine, torch.where(size < 4, medium, coarse)).to(torch.int8)
    return codes.add_(scaled.signbit().to(torch.int8) * 8)


def packed(codes: Tensor, format: Format) -> Tensor:
    """Packs 4-bit codes, two per byte along the last dimension, low bits first; 8-bit codes are unchanged."""
    if format.element.bits == 8:
        return codes
    pairs: Tensor = codes.view(torch.uint8).bitwise_and(0xF).unflatten(-1, (-1, 2))
    return pairs[..., 1].bitwise_left_shift(4).bitwise_or_(pairs[..., 0])


def decode(codes: Tensor, format: Format) -> Tensor:
    """The exact FP32 values of stored codes; packed codes give twice as many columns."""
    if format.element.bits == 8:
        return _decode_8_bits(codes)
    values = torch.tensor(FOUR_BITS[format.element], dtype=torch.float32, device=codes.device)
    pairs = torch.stack((codes.bitwise_and(0xF), codes.bitwise_right_shift(4)), -1)
    found: Tensor = values[pairs.flatten(-2).to(torch.int64)]
    return found


def _decode_8_bits(q: Tensor) -> Tensor:
    traced = type(q) not in PLAIN  # a trace must contain a cast
    if traced or q.device.type != "cpu" or q.dtype != torch.float8_e4m3fn:
        return q.to(torch.float32)
    # 4x faster than torch's cast: the shifted bits are a bfloat16 whose exponent is too small by 127 - 7, which is also
    # correct for subnormals. Only NaN, magnitude 127, wraps at + 1.
    code = q.view(torch.int8)
    nan = code.bitwise_and(0x7F).add_(1).bitwise_right_shift_(7)
    bits = code.to(torch.int16).mul_(16).bitwise_and_(0x07F0 - 0x8000).bitwise_or_(nan)
    return bits.view(torch.bfloat16).to(torch.float32).mul_(2.0**120)
