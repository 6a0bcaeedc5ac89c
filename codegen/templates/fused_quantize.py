"""Quantization of rows computed by a fused expression from other tensors, in one kernel.

block [1, b]     b in 32 … 512       any K, or up to LONGEST_ROW if the expression has a reduction
block [1, -1]                        K up to LONGEST_ROW
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import triton
from torch import Tensor

from codegen.fused_expressions import triton_function
from codegen.kernels.fused_quantize import fused_quantize
from codegen.launching.launch import KernelCall
from codegen.support import TILE_COLUMNS
from codegen.templates.peers import PROGRAMS
from codegen.templates.quantize import LONGEST_ROW
from codegen.templates.rounding import rounding
from codegen.templates.template import KernelOp, Template, ceil_div, first_broken
from qcompiler import numerics
from qcompiler.numerics import ALL

MOST_OPERANDS = 6
MOST_RESIDUALS = 2

FEW_ROWS = 512
"""Rows up to which the latency of memory limits the kernel."""

MULTIPROCESSORS, WARPS_AT_ONCE = 132, 16
"""Of an H100 or H200, and the warps of one that wait for memory and for each other without slowing each other down."""


class FusedQuantizeProblem(NamedTuple):
    """A fused expression on rows, and their quantization.

    Attributes:
        m: Rows.
        k: Columns.
        block: Rows and columns that share a scale.
        whole_rows: The expression needs whole rows.
        operands: Number of its operands.
        operand_bytes: Bytes per element of the widest operand; a sum of terms is in FP32.
        residuals: Number of residual outputs.
    """

    m: int
    k: int
    block: tuple[int, int] = (1, 128)
    whole_rows: bool = False
    operands: int = 1
    operand_bytes: int = 2
    residuals: int = 0


@dataclass(frozen=True)
class FusedQuantizeConfig:
    """The tile of the kernel.

    Attributes:
        block_m: Rows, a power of two.
        block_k: Columns, a power of two, a multiple of `group`.
        group: Columns that share a scale; `block_k` for whole rows.
        warps: Warps that share the tile.
        vector: Consecutive columns per thread.
    """

    block_m: int
    block_k: int
    group: int
    warps: int
    vector: int
    variant: ClassVar[str] = "fused"


class Terms(NamedTuple):
    """Quantized terms, whose sum is an operand.

    Attributes:
        codes: An 8-bit format `[terms, ..., k]`, contiguous.
        scales: FP32 `[terms, ..., blocks]`, contiguous.
        group: Columns that share a scale, a power of two, or `ALL`.
    """

    codes: Tensor
    scales: Tensor
    group: int


class RankSum(NamedTuple):
    """An operand that is summed over ranks.

    Attributes:
        place: Index of the operand.
        memories: See `codegen.templates.peers.PeersOperands`; so are the others.
    """

    place: int
    memories: Tensor
    steps: Tensor
    rank: int
    patience: int


class FusedQuantizeOperands(NamedTuple):
    """The tensors of a fused expression and its quantization.

    Attributes:
        expression: A fused expression over x0, x1, …, and y0 if there are terms.
        keep: Names of the definitions that are residual outputs.
        operands: In a floating dtype, `[m, k]` with contiguous rows or a contiguous vector `[k]`.
        residuals: Residual outputs `[..., k]`, contiguous; overwritten.
        q: An 8-bit format `[..., k]`, contiguous; overwritten.
        scale: FP32 of `numerics.scale_shape`, any strides; overwritten.
        profile: A name of `numerics.PROFILES`.
        terms: The terms of y0; None if the expression does not read it.
        rank_sum: The operand that is summed over ranks; None for none.
    """

    expression: str
    keep: tuple[str, ...]
    operands: Sequence[Tensor]
    residuals: Sequence[Tensor]
    q: Tensor
    scale: Tensor
    profile: str = numerics.DEFAULT_PROFILE
    terms: Terms | None = None
    rank_sum: RankSum | None = None


def fused_quantize_configs(problem: FusedQuantizeProblem) -> Mapping[FusedQuantizeConfig, None]:
    """The configuration for a problem; it depends only on the sizes."""
    m, k, (_, block_k), residuals = problem.m, problem.k, problem.block, problem.residuals
    if problem.whole_rows or block_k == ALL:
        return {_row_config(m, k, block_k, problem.operand_bytes > 2 or residuals > 0): None}
    columns = 512
    if m > FEW_ROWS:
        # The widest block of which little lies outside the row.
        columns = next((size for size in (2048, 1024) if -k % size < k // 16), 512)
    columns = max(min(columns, 1 << max((k - 1).bit_length(), 4)), block_k)
    return {FusedQuantizeConfig(1, columns, block_k, max(columns // 1024, 1), 8 if residuals else 16): None}


def _row_config(m: int, k: int, block_k: int, heavy: bool) -> FusedQuantizeConfig:
    """Whole rows: 64 numbers per thread, 32 if there is much state per number; at least 16 if there are few rows."""
    columns = max(1 << max((k - 1).bit_length(), 4), block_k)
    if m <= FEW_ROWS:
        block_m, shares = 1, min(columns // 512, WARPS_AT_ONCE // ceil_div(m, MULTIPROCESSORS))
    else:
        block_m = max(1024 // columns, 1)
        shares = block_m * k // 1024 if heavy else block_m * columns // 2048
    warps = min(1 << max(shares.bit_length() - 1, 0), 8)
    # bfloat16 accesses are full width with 8 columns per thread, accesses to codes with 16; the columns that one step
    # of all threads covers should divide the row.
    vector = 8 if heavy or k % (512 * warps) else 16
    return FusedQuantizeConfig(block_m, columns, columns if block_k < 0 else block_k, warps, vector)


def why_not_fused_quantize(problem: FusedQuantizeProblem) -> str | None:
    """Why the kernel cannot run a problem, in one sentence without a final period, or None if it can."""
    rows, columns = problem.block
    operands, residuals = problem.operands, problem.residuals
    return first_broken(
        (
            (
                operands > MOST_OPERANDS or residuals > MOST_RESIDUALS,
                f"it has {operands} operands and {residuals} residual outputs, "
                f"at most {MOST_OPERANDS} and {MOST_RESIDUALS}",
            ),
            (rows != 1 or columns not in (ALL, *TILE_COLUMNS), f"it is quantized in {[rows, columns]} blocks"),
            (
                (problem.whole_rows or columns == ALL) and problem.k > LONGEST_ROW,
                f"a program cannot hold rows of {problem.k} columns",
            ),
        )
    )


class FusedQuantize(Template[FusedQuantizeConfig, FusedQuantizeProblem, FusedQuantizeOperands]):
    """The kernel template; each problem has one configuration, so there is nothing to compare."""

    variant = FusedQuantizeConfig.variant
    overlaps = True

    def why_not(self, config: FusedQuantizeConfig, problem: FusedQuantizeProblem) -> str | None:
        """See `Template`."""
        return why_not_fused_quantize(problem)

    def calls(self, config: FusedQuantizeConfig, operands: FusedQuantizeOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        expression, keep, given, residuals, q, scale, profile, terms, rank_sum = operands
        k = q.shape[-1]
        m, none = q.numel() // k, [None] * (MOST_OPERANDS - len(given))
        strides = [None if x.dim() == 1 else x.stride(0) for x in given] + none
        constants = {
            "K": k, "EXPRESSION": triton_function(expression, keep), **rounding(profile, q.dtype),
            "BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "GROUP": config.group, "VECTOR": config.vector,
            "AHEAD": m <= FEW_ROWS, **_term_constants(terms, k), **_rank_constants(rank_sum),
        }  # fmt: skip
        exchanged = (None, None) if rank_sum is None else (rank_sum.memories, rank_sum.steps)
        rank, patience = (0, 0) if rank_sum is None else (rank_sum.rank, rank_sum.patience)
        arguments = (
            *given, *none, *((None, None) if terms is None else terms[:2]), *exchanged,
            *residuals, *[None] * (MOST_RESIDUALS - len(residuals)), q, scale, m, rank, patience, *strides,
            scale.stride(-2) if scale.dim() > 1 else 1, scale.stride(-1),
        )  # fmt: skip
        options = {"num_warps": config.warps, "enable_fp_fusion": False}
        programs = ceil_div(m, config.block_m) * ceil_div(k, config.block_k)
        return (KernelCall(fused_quantize, programs, arguments, constants, options),)


def _term_constants(terms: Terms | None, k: int) -> dict[str, int]:
    """The kernel's constants for terms with `k` columns."""
    if terms is None:
        return {"TERMS": 0, "TERM_GROUP": 1}
    group: int = triton.next_power_of_2(k) if terms.group == ALL else terms.group
    return {"TERMS": terms.codes.shape[0], "TERM_GROUP": group}


def _rank_constants(found: RankSum | None) -> dict[str, int]:
    """The kernel's constants for an operand that is summed over ranks."""
    if found is None:
        return {"SUMMED": -1, "RANKS": 1, "PROGRAMS": 0}
    return {"SUMMED": found.place, "RANKS": found.memories.numel(), "PROGRAMS": PROGRAMS}


FUSED_QUANTIZE = KernelOp[FusedQuantizeConfig, FusedQuantizeProblem, FusedQuantizeOperands]("fused quantization")
FUSED_QUANTIZE.add(FusedQuantize, fused_quantize_configs)
