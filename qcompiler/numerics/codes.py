"""Codes: from FP32 numbers in units of a scale to the elements of a format, and back."""

import torch
from torch import Tensor

from qcompiler.ir.formats import Format, profile
from qcompiler.ir.types import DType
from qcompiler.numerics.dtypes import torch_dtype

PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""Types of tensors that are not being traced."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of FP4 codes 0 to 7; the fourth bit is the sign."""

FOUR_BITS = {
    DType.f4e2m1fn: (*E2M1, *(-magnitude for magnitude in E2M1)),
    DType.i4: (0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1),
}
"""The numbers of the 16 codes of 4 bits."""


def encode(blocks: Tensor, scale: Tensor, format: Format, marked: bool) -> Tensor:
    """The codes of FP32 blocks, still in the shape of blocks and not packed; NaN for infinities if `marked`.

    Args:
        blocks: FP32, cut into blocks.
        scale: FP32, to be broadcast to `blocks`.
        format: What the codes are.
        marked: Whether an infinity becomes NaN.
    """
    scaled = blocks * scale.reciprocal() if profile(format.profile).division == "reciprocal" else blocks / scale
    if marked:
        scaled.addcmul_(blocks, scale.new_zeros(()))  # infinity times zero is NaN
    if format.scale is DType.f8e4m3fn:
        scaled.masked_fill_(scale == 0, 0.0)  # no other type of scale can be zero
    scaled.clamp_(-format.max, format.max)
    if format.has_nan:
        return scaled.to(torch_dtype(format.element))
    scaled.nan_to_num_(nan=0.0)
    if format.element is DType.f4e2m1fn:
        return _e2m1(scaled)
    return scaled.round_().to(torch.int8)


def _e2m1(scaled: Tensor) -> Tensor:
    """The FP4 codes of numbers of at most 6, rounded to nearest even: torch has no cast."""
    size = scaled.abs()
    fine, medium, coarse = (size * 2).round_(), size.round().add_(2), (size * 0.5).round_().add_(4)
    codes = torch.where(size < 2, fine, torch.where(size < 4, medium, coarse)).to(torch.int8)
    return codes.add_(scaled.signbit().to(torch.int8) * 8)


def packed(codes: Tensor, format: Format) -> Tensor:
    """The codes as they are stored: of 4 bits, two in a byte along the last dimension, the first in the low bits."""
    if format.element.bits == 8:
        return codes
    pairs: Tensor = codes.view(torch.uint8).bitwise_and(0xF).unflatten(-1, (-1, 2))
    return pairs[..., 1].bitwise_left_shift(4).bitwise_or_(pairs[..., 0])


def decode(codes: Tensor, format: Format) -> Tensor:
    """The exact FP32 values of stored codes; of packed ones, twice as many columns."""
    if format.element.bits == 8:
        return _decode_8_bits(codes)
    values = torch.tensor(FOUR_BITS[format.element], dtype=torch.float32, device=codes.device)
    pairs = torch.stack((codes.bitwise_and(0xF), codes.bitwise_right_shift(4)), -1)
    found: Tensor = values[pairs.flatten(-2).to(torch.int64)]
    return found


def _decode_8_bits(q: Tensor) -> Tensor:
    traced = type(q) not in PLAIN  # what is traced is to show a cast
    if traced or q.device.type != "cpu" or q.dtype != torch.float8_e4m3fn:
        return q.to(torch.float32)
    # A quarter of the time of torch's own cast: shifted, sign and fields are those of a bfloat16 whose exponent is
    # too small by 127 - 7; subnormals come out right as well. NaN, magnitude 127, is the only one to wrap at + 1.
    code = q.view(torch.int8)
    nan = code.bitwise_and(0x7F).add_(1).bitwise_right_shift_(7)
    bits = code.to(torch.int16).mul_(16).bitwise_and_(0x07F0 - 0x8000).bitwise_or_(nan)
    return bits.view(torch.bfloat16).to(torch.float32).mul_(2.0**120)
