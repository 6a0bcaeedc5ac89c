"""The scaled matmul on a GPU: its problems, its configurations, and its operands."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from codegen.templates.limits import MULTIPROCESSORS
from codegen.templates.template import Family, KernelOp, ceil_div
from qcompiler.numerics import ALL

Kind = Literal["tiles", "rows_f8", "rows_i8"]
"""The family of kernels for a GEMM: scales inside the sum, or at its end for a given element type."""


@dataclass(frozen=True)
class GemmProblem:
    """`out[m, n] = x[m, k] @ w[n, k].T`, both in 8 bits with scales, on one device.

    Attributes:
        m: Rows of x, 1 or more.
        n: Rows of w.
        k: Depth.
        sms: Multiprocessors of the device.
        out_bytes: Bytes per element of the result.
        aligned: x and w start at multiples of 16 bytes.
        kind: Where scales are applied and how sums are accumulated.
        x_block: For `"tiles"`, columns of x that share a scale, or `ALL`.
        scale_columns: For one block of K, the scales of x are contiguous and start at a multiple of 16 bytes.
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
        """The depth of K after which sums must be scaled or promoted; None if the tensor cores keep them."""
        if self.kind == "rows_i8":
            return None
        return 128 if self.kind == "rows_f8" or self.x_block == ALL else min(self.x_block, 128)

    @property
    def stage_scales(self) -> int:
        """Scales per row of x that a Gluon kernel holds in shared memory for 128 of K."""
        return 0 if self.kind != "tiles" else 128 // (self.step or 128)


@dataclass(frozen=True)
class GemmConfig:
    """One compiled kernel: a variant, its tile, and how it is pipelined.

    Attributes:
        block_m: Rows of the output tile.
        block_n: Columns of the output tile.
        block_k: Depth of a step.
        warps: Warps that multiply; each warpgroup of 4 needs 64 rows, or, for a narrow tile, 64 columns.
        stages: Steps of K in shared memory at once.
        group: Consecutive rows of tiles in launch order.
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
        """Rows of x per copy of a Gluon kernel, a power of two."""
        return self.block_m if self.block_m & (self.block_m - 1) == 0 else 64

    def __str__(self) -> str:
        return (
            f"{self.variant} {self.block_m}x{self.block_n}x{self.block_k}, "
            f"{self.warps} warps, {self.stages} stages, groups of {self.group}"
        )


class GemmOperands(NamedTuple):
    """The tensors of a matmul. A template assumes that it supports them: see `GemmTemplate.why_not`.

    Attributes:
        x: float8_e4m3fn or int8 `[m, k]`, contiguous, m and k at least 1.
        w: The same dtype, `[n, k]`, contiguous.
        out: bfloat16, float16 or float32 `[m, n]`, contiguous; overwritten.
        x_scale: FP32 `[m, ceil(k / x_block)]`, any strides; for Gluon kernels see `has_scale_columns`. Without an
            `x_block`: `[m, 1]`, or one number for the tensor.
        w_scale: FP32 `[ceil(n / 128), ceil(k / 128)]`, any strides; without an `x_block` `[n, 1]` or one number.
        bias: `[n]`, contiguous, or None.
        x_block: Columns of x that share a scale, or `ALL`; None for scales at the end of the sum.
        promote: Whether sums without an `x_block` are added in FP32 registers every 128 of K; default: only for FP8.
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
    """Measured times on one device, in nanoseconds.

    Attributes:
        alone: For one step of K of a tile that is alone on its multiprocessor, bound by latency.
        busy: For one step of K of each of many tiles that share a multiprocessor, bound by the tensor cores or by
            memory.
        tail: For the work of a multiprocessor per tile besides its steps.
        bandwidth: Bytes of weights read from memory per nanosecond.
        sum: For the kernel that adds the splits of K.
    """

    alone: int
    busy: int
    tail: int
    bandwidth: int
    sum: int = 0


GEMM = KernelOp[GemmConfig, GemmProblem, GemmOperands]("GEMM")
"""The scaled matmul. Paces are chosen to minimize the loss of the choices on the shapes of `benchmarks/heuristic.py`;
`benchmarks/results/h200-gemm-tried.md` and `h100-gemm-tried.md` list the rejected configurations."""

GemmFamily = Family[GemmConfig, GemmProblem, GemmOperands]
"""Its templates on one target."""

Measured = Mapping[tuple[Kind, int | None], Mapping[GemmConfig, Pace]]
"""Kind and step of problems -> the configurations of a template, and their paces."""


def by_kind(measured: Measured) -> Callable[[GemmProblem], Mapping[GemmConfig, Pace]]:
    """Looks up the configurations for a problem."""
    return lambda problem: measured.get((problem.kind, problem.step), {})


def tiles_of(config: GemmConfig, m: int, n: int) -> int:
    """How many tiles the output has."""
    return ceil_div(m, config.block_m) * ceil_div(n, config.block_n)


def bucket(m: int) -> int:
    """The number of rows used for `m` when a configuration is chosen and remembered.

    The next power of two; at least 16, the rows of the smallest tile.
    """
    return 1 << max(4, (m - 1).bit_length())
