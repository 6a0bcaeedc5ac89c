"""The kernel of `kernel.gather_codes`: tiles of a few rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from codegen.kernels.gather_codes import gather_codes
from codegen.launching.launch import KernelCall
from codegen.templates.template import KernelOp, Template, ceil_div, next_power_of_2

WIDEST = 2048
"""Maximum columns of a tile."""

MANY = 1 << 22
"""Bytes from which large tiles are used: enough programs remain for all multiprocessors."""


class GatherCodesProblem(NamedTuple):
    """Rows to gather.

    Attributes:
        rows: Their number.
        k: Their columns.
    """

    rows: int
    k: int


@dataclass(frozen=True)
class GatherCodesConfig:
    """The tile of the kernel.

    Attributes:
        block_m: Rows, a power of two.
        block_k: Columns, a power of two.
        warps: Warps that share the tile.
    """

    block_m: int
    block_k: int
    warps: int
    variant: ClassVar[str] = "gather codes"


class GatherCodesOperands(NamedTuple):
    """The tensors of the operation.

    Attributes:
        data: An 8-bit format `[m, k]` with contiguous rows.
        scale: FP32 `[m, groups]`, any strides.
        rows: int32 or int64 `[n]`, contiguous.
        q: `[n, k]` in the same format, contiguous; overwritten.
        out_scale: FP32 `[n, groups]`, any strides; overwritten.
    """

    data: Tensor
    scale: Tensor
    rows: Tensor
    q: Tensor
    out_scale: Tensor


def gather_codes_configs(problem: GatherCodesProblem) -> Mapping[GatherCodesConfig, None]:
    """The configuration for a problem: up to 128 bytes per thread, or 16 while the device is not full."""
    block_k = min(1 << max((problem.k - 1).bit_length(), 4), WIDEST)
    elements = 8 * WIDEST if problem.rows * problem.k >= MANY else WIDEST
    return {GatherCodesConfig(min(max(elements // block_k, 1), 64), block_k, 4): None}


class GatherCodes(Template[GatherCodesConfig, GatherCodesProblem, GatherCodesOperands]):
    """The one variant."""

    variant = GatherCodesConfig.variant
    overlaps = True

    def calls(self, config: GatherCodesConfig, operands: GatherCodesOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        data, scale, rows, q, out_scale = operands
        (m, k), (n, groups) = data.shape, out_scale.shape
        bytes_ = (data.view(torch.int8), scale, rows, q.view(torch.int8), out_scale)
        arguments = (*bytes_, m, n, data.stride(0), *scale.stride(), *out_scale.stride())
        constants = {
            "K": k, "GROUPS": groups, "BLOCK_M": config.block_m, "BLOCK_K": config.block_k,
            "BLOCK_GROUPS": next_power_of_2(groups),
        }  # fmt: skip
        programs = ceil_div(n, config.block_m) * ceil_div(k, config.block_k)
        return (KernelCall(gather_codes, programs, arguments, constants, {"num_warps": config.warps}),)


GATHER_CODES = KernelOp[GatherCodesConfig, GatherCodesProblem, GatherCodesOperands]("gather of codes")
GATHER_CODES.add(GatherCodes, gather_codes_configs)
