"""The scaled matmul on a GPU: its problems, its configurations, and its operands."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from codegen.templates.hopper import MULTIPROCESSORS
from codegen.templates.template import ceil_div
from qcompiler.numerics import ALL

Kind = Literal["tiles", "rows_f8", "rows_i8"]
"""Which family of kernels runs a product: scales inside the sum, or at its end, and then of which element type."""


@dataclass(frozen=True)
class GemmProblem:
    """`out[m, n] = x[m, k] @ w[n, k].T`, both in 8 bits with scales, on one device.

    Attributes:
        m: Rows of x, 1 or more.
        n: Rows of w.
        k: Depth.
        sms: Multiprocessors of the device.
        out_bytes: Bytes of an element of the result.
        aligned: x and w start at multiples of 16 bytes.
        kind: What the scales are and how sums are made.
        x_block: For `"tiles"`, columns of x that share a scale, or `ALL`.
        scale_columns: The scales of x for one block of K follow each other, from a multiple of 16 bytes on.
    """

    m: int
    n: int
    k: int
    sms: int = MULTIPROCESSORS
    out_bytes: int = 2
    aligned: bool = True
    kind: Kind = "tiles"
    x_block: int = 128
    scale_columns: bool = True

    @property
    def step(self) -> int | None:
        """The depth of K after which sums must be scaled or promoted; None where the tensor cores keep them."""
        if self.kind == "rows_i8":
            return None
        return 128 if self.kind == "rows_f8" or self.x_block == ALL else min(self.x_block, 128)

    @property
    def stage_scales(self) -> int:
        """Scales of each row of x that a Gluon kernel has in shared memory for 128 of K."""
        return 0 if self.kind != "tiles" else 128 // (self.step or 128)


@dataclass(frozen=True)
class GemmConfig:
    """One compiled kernel: a variant, its tile, and how it is pipelined.

    Attributes:
        block_m: Rows of the output tile.
        block_n: Columns of the output tile.
        block_k: Depth of a step.
        warps: Warps that multiply; each group of 4 is one warpgroup and needs 64 rows, or, of a narrow tile, columns.
        stages: Steps of K that are in shared memory at one time.
        group: Rows of tiles that follow each other in launch order.
        variant: The name of a template.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int
    variant: str

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.warps // 4

    @property
    def box(self) -> int:
        """Rows of x that one copy of a Gluon kernel brings, a power of two."""
        return self.block_m if self.block_m & (self.block_m - 1) == 0 else 64

    def __str__(self) -> str:
        return (
            f"{self.variant} {self.block_m}x{self.block_n}x{self.block_k}, "
            f"{self.warps} warps, {self.stages} stages, groups of {self.group}"
        )


class GemmOperands(NamedTuple):
    """The tensors of a matmul. A template assumes that it can run them: see `GemmTemplate.why_not`.

    Attributes:
        x: float8_e4m3fn or int8 `[m, k]`, contiguous, m and k at least 1.
        w: The same dtype, `[n, k]`, contiguous.
        out: bfloat16, float16 or float32 `[m, n]`, contiguous; overwritten.
        x_scale: FP32 `[m, ceil(k / x_block)]`, any strides; for Gluon kernels see `has_scale_columns`. Without an
            `x_block`: `[m, 1]`, or one number for the tensor.
        w_scale: FP32 `[ceil(n / 128), ceil(k / 128)]`, any strides; without an `x_block` `[n, 1]` or one number.
        bias: `[n]`, contiguous, or None.
        x_block: Columns of x that share a scale, or `ALL`; None for scales at the end of the sum.
        promote: Whether sums without an `x_block` are added in FP32 registers every 128 of K; by default for FP8 only.
    """

    x: Tensor
    w: Tensor
    out: Tensor
    x_scale: Tensor
    w_scale: Tensor
    bias: Tensor | None = None
    x_block: int | None = 128
    promote: bool | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """m, n, and k."""
        m, k = self.x.shape
        return m, self.w.shape[0], k

    @property
    def promoted(self) -> bool:
        """Whether sums with scales at their end are promoted."""
        return self.x.dtype != torch.int8 if self.promote is None else self.promote

    @property
    def scale_strides(self) -> tuple[int, int]:
        """Elements between the scales of two rows of x, and of w, for scales at the end of the sum."""
        a, b = (0 if scale.numel() == 1 else scale.stride(0) for scale in (self.x_scale, self.w_scale))
        return a, b


class Pace(NamedTuple):
    """Nanoseconds that one device was measured to take.

    Attributes:
        alone: For one step of K of a tile that is alone on its multiprocessor, where waiting sets the pace.
        busy: For one step of K of each of many tiles that share a multiprocessor, where the tensor cores or the memory
            set the pace.
        tail: For what a multiprocessor does once a tile, beside its steps.
        bandwidth: Bytes of weights that come from memory in a nanosecond.
        sum: For the kernel that adds the splits of K.
    """

    alone: int
    busy: int
    tail: int
    bandwidth: int
    sum: int = 0


def tiles_of(config: GemmConfig, m: int, n: int) -> int:
    """How many tiles the output has."""
    return ceil_div(m, config.block_m) * ceil_div(n, config.block_n)


def bucket(m: int) -> int:
    """The number of rows that stands for `m` when a configuration is chosen and remembered.

    The next power of two; 16 at least, the rows of the least tile.
    """
    return 1 << max(4, (m - 1).bit_length())
