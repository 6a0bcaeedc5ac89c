"""A quantized weight on its way between a compiled model and a file: codes and scales, never dequantized."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.ir import Format

UE8M0 = torch.float8_e8m0fnu
"""One byte, the exponent of a power of two; PyTorch's own type for it."""

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, UE8M0, torch.uint8)
"""How checkpoints store scales; bytes are the exponents of `UE8M0`."""


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight of the model in 8 bits.

    Attributes:
        codes: `[N, K]`, or `[E, N, K]` for the experts of a mixture.
        scale: FP32, one for each block, in the shape of `numerics.scale_shape`.
        block: Rows and columns of a block; -1 is the whole of an axis.
        x_block: The same for the activations that are multiplied with it; None where nothing says.
        x_scale: The activations' scale, where calibration has fixed one.
    """

    codes: Tensor
    scale: Tensor
    block: tuple[int, int]
    x_block: tuple[int, int] | None = None
    x_scale: Tensor | None = None

    @property
    def format(self) -> Format:
        """The format of codes and scales."""
        return numerics.format_of(self.block, self.codes.dtype)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that it stands for."""
        return numerics.dequantize(self.codes, self.scale, format=self.format, out_dtype=dtype)


@dataclass(frozen=True)
class StoredAs:
    """How a checkpoint stores one quantized weight.

    Attributes:
        scale: The name of its scale.
        block: Rows and columns of a block; -1 is the whole of an axis.
        x_scale: The name of the static scale of the activation; None where there is none.
        unread: The names of tensors that nothing reads: zero points, which are all zero, and scales of outputs.
    """

    scale: str
    block: tuple[int, int]
    x_scale: str | None = None
    unread: tuple[str, ...] = ()

    @property
    def beside(self) -> tuple[str, ...]:
        """The names of all tensors that belong to the weight and are not its codes."""
        return (self.scale, *((self.x_scale,) if self.x_scale is not None else ()), *self.unread)


def powers_of_two(scale: Tensor) -> bool:
    """Whether FP32 scales can be stored as `UE8M0` without a change of any."""
    return torch.equal(scale.to(UE8M0).to(torch.float32), scale)


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Whether two are equal in every bit of codes and scales."""
    return one.format == other.format and equal_bits(one.codes, other.codes) and equal_bits(one.scale, other.scale)


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes; NaN equals itself then."""
    if one.dtype is not other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
