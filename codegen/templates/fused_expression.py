"""A fused expression alone, on the sums of a matmul that ran before it."""

from collections.abc import Sequence

from torch import Tensor

from codegen.fused_expressions import triton_function
from codegen.kernels.pointwise import apply_expression
from codegen.launching.launch import KernelCall
from codegen.templates.hopper import ONE_WARPGROUP
from codegen.templates.template import ceil_div

MOST_OTHERS = 2
"""Maximum operands of a fused expression besides the sums."""

EXACT = {**ONE_WARPGROUP, "enable_fp_fusion": False}
"""Options of kernels with a fused expression, which rounds only where it says so."""

ROWS, COLUMNS = 4, 512
"""The tile of a program."""


def expression_call(expression: str, sums: Sequence[Tensor], others: Sequence[Tensor], out: Tensor) -> KernelCall:
    """The call of the kernel.

    Args:
        expression: The fused expression over the sums and the others, without a reduction.
        sums: `[m, n]` in any floating dtype, one or two, with contiguous rows.
        others: Up to two tensors `[m, n]` with contiguous rows, or `[n]`.
        out: `[m, n]`, contiguous; overwritten.
    """
    m, n = out.shape
    operands = (*padded(others), *padded(sums))
    constants = {"EXPRESSION": triton_function(expression), "BLOCK_M": ROWS, "BLOCK_N": COLUMNS}
    arguments = (out, *operands, m, n, *map(row_stride, operands))
    return KernelCall(apply_expression, ceil_div(m, ROWS) * ceil_div(n, COLUMNS), arguments, constants, EXACT)


def padded(operands: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Up to two operands, padded with None."""
    first, second, *_ = (*operands, None, None)
    return first, second


def row_stride(operand: Tensor | None) -> int:
    """Elements between two rows of an operand; 0 for a vector."""
    return 0 if operand is None or operand.dim() == 1 else operand.stride(0)
