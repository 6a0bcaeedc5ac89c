"""A body alone, on the sums of a matmul that ran before it."""

from collections.abc import Sequence

from torch import Tensor

from codegen.bodies import triton_function
from codegen.kernels.pointwise import apply_body
from codegen.launching.launch import KernelCall
from codegen.templates.hopper import ONE_WARPGROUP
from codegen.templates.template import ceil_div

MOST_OTHERS = 2
"""Operands of a body beside the sums that the kernels have room for."""

EXACT = {**ONE_WARPGROUP, "enable_fp_fusion": False}
"""Options of kernels that run a body, which rounds where it says so and nowhere else."""

ROWS, COLUMNS = 4, 512
"""The tile of a program."""


def body_call(body: str, sums: Sequence[Tensor], others: Sequence[Tensor], out: Tensor) -> KernelCall:
    """The call of the kernel.

    Args:
        body: Of the sums and the others, without a reduction.
        sums: `[m, n]` in any floating dtype, one or two, their rows contiguous.
        others: Up to two tensors `[m, n]` whose rows are contiguous, or `[n]`.
        out: `[m, n]`, contiguous; overwritten.
    """
    m, n = out.shape
    operands = (*padded(others), *padded(sums))
    constants = {"BODY": triton_function(body), "BLOCK_M": ROWS, "BLOCK_N": COLUMNS}
    arguments = (out, *operands, m, n, *map(row_stride, operands))
    return KernelCall(apply_body, ceil_div(m, ROWS) * ceil_div(n, COLUMNS), arguments, constants, EXACT)


def padded(operands: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Up to two operands, and None for those that are not there."""
    first, second, *_ = (*operands, None, None)
    return first, second


def row_stride(operand: Tensor | None) -> int:
    """Elements between two rows of an operand; 0 for a vector."""
    return 0 if operand is None or operand.dim() == 1 else operand.stride(0)
