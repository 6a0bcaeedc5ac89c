"""Triton kernel: a fused expression on the rows of a few tensors, without quantization or row reductions."""

import triton
import triton.language as tl


@triton.jit
def _tile(x, stride, rows, columns, inside):  # type: ignore[no-untyped-def]
    """A tile of an operand; of a vector, whose stride is 0, the same in every row."""
    return tl.load(x + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["m"])
def apply_expression(  # type: ignore[no-untyped-def]
    out, x0, x1, y0, y1, m, n, x0_stride, x1_stride, y0_stride, y1_stride,
    EXPRESSION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[m, n] of the expression on operands of that shape, or vectors [n]. One program computes one tile.

    Args:
        out: bfloat16, float16 or float32, contiguous.
        x0: In any floating dtype, rows `x0_stride` elements apart, columns contiguous; a vector has a stride of 0.
            None if the expression has no such operand. The same holds for the others.
        EXPRESSION: A function of `codegen.fused_expressions`.
        BLOCK_M: Rows of a tile.
        BLOCK_N: Columns of a tile.
    """
    width = tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0)
    rows = (tile // width).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile % width * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    (result,) = EXPRESSION(
        x0=None if x0 is None else _tile(x0, x0_stride, rows, columns, inside),
        x1=None if x1 is None else _tile(x1, x1_stride, rows, columns, inside),
        y0=None if y0 is None else _tile(y0, y0_stride, rows, columns, inside),
        y1=None if y1 is None else _tile(y1, y1_stride, rows, columns, inside),
    )  # fmt: skip
    tl.store(out + rows[:, None] * n + columns[None, :], result.to(out.dtype.element_ty), mask=inside)
