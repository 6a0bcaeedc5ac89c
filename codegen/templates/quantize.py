"""Quantization on a GPU: a template for each granularity, with scales computed from the tensor or given.

[1, b]   b in 32 … 512    quantize_tiles                                       quantize_known
[1, -1]                   quantize_tokens                                      quantize_known
[-1, -1]                  partial_amax, scale_of_tensor, quantize_known        quantize_known
                          ^ scales computed from the tensor                    ^ scales given
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from codegen.kernels.quantize import quantize_tiles, quantize_tokens
from codegen.kernels.quantize_known import partial_amax, quantize_known, scale_of_tensor
from codegen.launching.launch import KernelCall
from codegen.launching.replay import empty
from codegen.support import TILE_COLUMNS
from codegen.templates.rounding import rounding
from codegen.templates.template import KernelOp, Template, ceil_div
from qcompiler import numerics
from qcompiler.numerics import ALL

AMAX_PROGRAMS = 1024
"""Maximum programs that share a tensor for its amax: about as many as an H200 runs at once."""

LONGEST_ROW = 16384
"""Columns of a row that a program can hold in registers."""


class QuantizeProblem(NamedTuple):
    """Quantization of a matrix.

    Attributes:
        m: Rows.
        k: Columns.
        block: Rows and columns that share a scale: 1 row or `ALL`.
        known: The scales are given.
    """

    m: int
    k: int
    block: tuple[int, int]
    known: bool = False


@dataclass(frozen=True)
class QuantizeConfig:
    """The tile of a quantization kernel.

    Attributes:
        block_m: Rows, a power of two.
        block_k: Columns, a power of two.
        warps: Warps that share the tile.
        variant: The name of a template.
    """

    block_m: int
    block_k: int
    warps: int
    variant: str = "tiles"


class QuantizeOperands(NamedTuple):
    """The tensors of a quantization.

    Attributes:
        x: bfloat16, float16 or float32 `[m, k]` with contiguous rows.
        q: An 8-bit format `[..., k]`, contiguous; overwritten.
        scale: FP32 of `numerics.scale_shape`, any strides; overwritten, unless it is given.
        block: Rows and columns that share a scale.
        profile: A name of `numerics.PROFILES`.
        prescale: `[k]`, contiguous, or None.
    """

    x: Tensor
    q: Tensor
    scale: Tensor
    block: Sequence[int]
    profile: str = numerics.DEFAULT_PROFILE
    prescale: Tensor | None = None


def quantize_configs(problem: QuantizeProblem) -> Mapping[QuantizeConfig, None]:
    """The configuration for a problem; it depends only on the sizes."""
    m, k, (rows, columns) = problem.m, problem.k, problem.block
    if problem.known:
        return {tensor_config(m, "known") if columns == ALL else quantize_config(m, columns, "known"): None}
    if columns != ALL:
        return {quantize_config(m, columns): None}
    return {tensor_config(m) if rows == ALL else token_config(m, k): None}


def quantize_config(m: int, block_k: int, variant: str = "tiles") -> QuantizeConfig:
    """The tile for quantizing `m` rows in blocks of `block_k`: many small ones while the device is not full."""
    elements = 4096 if m > 512 else 1024
    return QuantizeConfig(max(elements // block_k, 1), block_k, 4 if m > 512 else 1, variant)


def token_config(m: int, k: int) -> QuantizeConfig:
    """The tile for quantizing `m` rows of `k` columns with a scale each: whole rows, at most 32 elements per thread.

    A row longer than `LONGEST_ROW` is processed in steps. Few rows get more warps each, because then memory latency
    is the bottleneck.
    """
    block_k = min(1 << max((k - 1).bit_length(), 4), LONGEST_ROW) if k <= LONGEST_ROW else LONGEST_ROW // 2
    if m <= 512:
        return QuantizeConfig(1, block_k, min(max(block_k // 512, 1), 16), "tokens")
    block_m = max(4096 // block_k, 1)
    return QuantizeConfig(block_m, block_k, min(max(block_m * block_k // 1024, 4), 16), "tokens")


def tensor_config(m: int, variant: str = "tensor") -> QuantizeConfig:
    """The tile for a tensor of `m` rows with one scale."""
    return QuantizeConfig(8, 512, 4, variant) if m > 512 else QuantizeConfig(1, 1024, 1, variant)


class QuantizeTemplate(Template[QuantizeConfig, QuantizeProblem, QuantizeOperands]):
    """The common part of the granularities: each problem has one configuration, so there is nothing to compare."""

    def why_not(self, config: QuantizeConfig, problem: QuantizeProblem) -> str | None:
        """See `Template`."""
        return why_not_quantize(problem.block)


def why_not_quantize(block: Sequence[int]) -> str | None:
    """Why no kernel quantizes in such blocks, in one sentence without a final period, or None if one does."""
    if tuple(block) == (ALL, ALL) or (block[0] == 1 and block[1] in (ALL, *TILE_COLUMNS)):
        return None
    return f"it is quantized in {list(block)} blocks"


class QuantizeTiles(QuantizeTemplate):
    """A scale for `block_k` columns of a row."""

    variant = "tiles"
    overlaps = True

    def calls(self, config: QuantizeConfig, operands: QuantizeOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        x, q, scale, _, profile, prescale = operands
        constants = {**rounding(profile, q.dtype), "BLOCK_M": config.block_m, "BLOCK_K": config.block_k}
        arguments = (x, q, scale, prescale, *x.shape, x.stride(0), *_strides(scale))
        return (KernelCall(quantize_tiles, _tiles(config, x), arguments, constants, {"num_warps": config.warps}),)


class QuantizeTokens(QuantizeTemplate):
    """A scale for each row."""

    variant = "tokens"
    overlaps = True

    def calls(self, config: QuantizeConfig, operands: QuantizeOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        x, q, scale, _, profile, prescale = operands
        (m, k), rule = x.shape, rounding(profile, q.dtype)
        constants = {**rule, "BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "ONE_STEP": k <= LONGEST_ROW}
        arguments, programs = (
            (x, q, scale, prescale, m, k, x.stride(0), _strides(scale)[0]),
            ceil_div(m, config.block_m),
        )
        return (KernelCall(quantize_tokens, programs, arguments, constants, {"num_warps": config.warps}),)


class QuantizeKnown(QuantizeTemplate):
    """Scales that are given."""

    variant = "known"

    def calls(self, config: QuantizeConfig, operands: QuantizeOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        x, q, scale, block, profile, prescale = operands
        (m, k), rule = x.shape, rounding(profile, q.dtype)
        # Scales whose leading dimensions are not evenly spaced are copied; there are few of them.
        scales = scale.reshape(m if block[0] == 1 else 1, scale.shape[-1])
        strides = (scales.stride(0), 0 if block[1] == ALL else scales.stride(1))
        constants = {
            "TOP": rule["TOP"], "RECIPROCAL": rule["RECIPROCAL"], "BLOCK_M": config.block_m, "BLOCK_K": config.block_k,
            "ONE_SCALE": block[0] == ALL,
        }  # fmt: skip
        arguments = (x, q, scales, prescale, m, k, x.stride(0), *strides)
        return (KernelCall(quantize_known, _tiles(config, x), arguments, constants, {"num_warps": config.warps}),)


class QuantizeTensor(QuantizeKnown):
    """One scale for the tensor: the amax in parts, the scale, and quantization with it.

    An empty tensor still has a scale, which the second call computes.
    """

    variant = "tensor"

    def calls(self, config: QuantizeConfig, operands: QuantizeOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        x, q, scale, _, profile, prescale = operands
        rule = rounding(profile, q.dtype)
        programs = max(min(_tiles(config, x), AMAX_PROGRAMS), 1)
        partial = empty((programs,), torch.float32, x.device)
        finite = {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "FINITE": q.dtype != torch.int8}
        arguments, options = (x, partial, prescale, *x.shape, x.stride(0)), {"num_warps": config.warps}
        amax = KernelCall(partial_amax, programs, arguments, finite, options)
        made = {name: rule[name] for name in ("AMAX_FLOOR", "TOP", "UE8M0")} | {"BLOCK": AMAX_PROGRAMS}
        one = KernelCall(scale_of_tensor, 1, (partial, scale, programs), made, {"num_warps": 4})
        return (amax, one, *(super().calls(config, operands) if q.numel() else ()))


def _tiles(config: QuantizeConfig, x: Tensor) -> int:
    return ceil_div(x.shape[0], config.block_m) * ceil_div(x.shape[1], config.block_k)


def _strides(scale: Tensor) -> tuple[int, int]:
    """Elements between the scales of two rows, and of two blocks of a row; a vector is one row."""
    return scale.stride(-2) if scale.dim() > 1 else 1, scale.stride(-1)


QUANTIZE = KernelOp[QuantizeConfig, QuantizeProblem, QuantizeOperands]("quantization")

# Portable kernels with one configuration for a problem, so they run on every GPU without measurements.
for _template in (QuantizeTiles, QuantizeTokens, QuantizeTensor, QuantizeKnown):
    QUANTIZE.add(_template, quantize_configs)
