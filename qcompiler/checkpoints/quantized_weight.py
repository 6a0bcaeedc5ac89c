"""A quantized weight in transit between a compiled model and a file: codes and scales."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.ir import Format
from qcompiler.ir.formats import Block

UE8M0 = torch.float8_e8m0fnu
"""PyTorch's dtype for one byte with the exponent of a power of two."""

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, UE8M0, torch.uint8)
"""Dtypes of scales in checkpoints; bytes are exponents of `UE8M0`."""


LAST_FINITE = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}
"""FP8 dtype -> the bits of its largest number."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A model weight in 8 bits.

    Attributes:
        codes: `[N, K]`, or `[E, N, K]` for the experts of an MoE layer.
        scale: FP32, one per block, in the shape of `numerics.scale_shape`.
        format: The format of codes and scales.
        x_format: The format of the activations; None if not specified.
        x_scale: Static activation scale from calibration, if any.
        prescale: FP32 `[K]`, factors of the input channels that the activation is multiplied by before it is quantized;
            the codes quantize the weight divided by them. None without.
    """

    codes: Tensor
    scale: Tensor
    format: Format
    x_format: Format | None = None
    x_scale: Tensor | None = None
    prescale: Tensor | None = None

    @property
    def block(self) -> Block:
        """Rows and columns that share a scale."""
        return self.format.block

    @property
    def blocked_axes(self) -> list[tuple[int, int]]:
        """Size and block size of each axis that is divided into blocks."""
        if min(self.block) < 1 or self.block[0] == 1:
            return []
        return list(zip(self.codes.shape[-2:], self.block, strict=True))

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized weight."""
        return numerics.dequantize(self.codes, self.scale, format=self.format, out_dtype=dtype)


@dataclass(frozen=True)
class StoredAs:
    """How a checkpoint stores one quantized weight.

    Attributes:
        scale: The name of the scale.
        format: The format of codes and scales; scales may have another dtype in the file, if the numbers are the same.
        x_scale: The name of the static activation scale, if the format declares one; `read` removes it if the files
            do not have it.
        unread: Names of unused tensors: all-zero zero points and output scales.
        prescale: The name of the factors of the input channels, if there are any.
    """

    scale: str
    format: Format
    x_scale: str | None = None
    unread: tuple[str, ...] = ()
    prescale: str | None = None

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of all tensors that belong to the weight, except its codes."""
        return (self.scale, *(name for name in (self.x_scale, self.prescale) if name is not None), *self.unread)


def not_finite(codes: Tensor) -> str | None:
    """The first FP8 code that is NaN or infinite, with its index; None if there is none, or the codes are integers."""
    if codes.dtype not in LAST_FINITE or codes.is_meta:
        return None
    wrong = codes.view(torch.uint8).bitwise_and(0x7F) > LAST_FINITE[codes.dtype]
    if not wrong.any():
        return None
    at = wrong.nonzero()[0].tolist()
    return f"{codes[tuple(at)].item():g} at {at}"


def powers_of_two(scale: Tensor) -> bool:
    """Whether all FP32 scales can be stored exactly as `UE8M0`."""
    return torch.equal(scale.to(UE8M0).to(torch.float32), scale)


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Whether two weights have bit-identical codes, scales and factors of the input channels."""
    both = [each for each in (one.prescale, other.prescale) if each is not None]
    return (
        len(both) != 1
        and (not both or equal_bits(*both))
        and one.format.decodes_like(other.format)
        and equal_bits(one.codes, other.codes)
        and equal_bits(one.scale, other.scale)
    )


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes, so that NaN equals itself."""
    if one.dtype is not other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
