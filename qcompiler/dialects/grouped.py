"""Grouped GEMM in `quant` and `kernel`: each group of rows has its own weight, as in mixture of experts.

%x_q, %x_s = quant.quantize(%x) {format = #fp8_tile} : f8e4m3fn[s0, 256], f32[s0, 2]
%w_q, %w_s = quant.quantize(%w) {format = #fp8_block} : f8e4m3fn[8, 512, 256], f32[8, 4, 2]
%y = quant.grouped_linear(%x_q, %x_s, %w_q, %w_s, %offsets) {out_dtype = bf16, …} : bf16[s0, 512]

The offsets, i32[8], are the offsets of `aten._grouped_mm`: entry g is the end row (exclusive) of group g, which starts
at entry g - 1, or 0. Rows after the last group are zero. A group may be empty; offsets must not decrease.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.dialects.kernel import implement
from qcompiler.dialects.quant import LINEAR_ATTRIBUTES, check_stored, out_dtype_of
from qcompiler.errors import QCompilerError
from qcompiler.ir import ALL, DType, Format, Op, Role, TensorType, Type
from qcompiler.ir.formats import FP8_BLOCK, FP8_TILE
from qcompiler.ir.op_table import OpDef, OpError, declare

OPERANDS = ("x", "x_scale", "w", "w_scale", "offsets")
ROWS_OF_BLOCKS = "blocks of 1 row for x, and not of all rows for w"


def grouped_linear_types(op: Op) -> tuple[Type, ...]:
    """(x f8[T, K], x_scale, w f8[E, N, K], w_scale, offsets i32[E]) -> out_dtype[T, N]"""
    x, w, offsets = op["x"].tensor, op["w"].tensor, op["offsets"].tensor
    check_stored(op, "x", "x_")
    check_stored(op, "w", "w_")
    if len(x.shape) != 2:
        raise OpError(f"the activation is {x}, but a grouped linear needs 2 dimensions", "x")
    if len(w.shape) != 3 or x.shape[1] != w.shape[2]:
        raise OpError(f"the weights are {w}, but the activation {x} needs [groups, N, {x.shape[1]}]", "w")
    if _spans_groups(op.format("x_format").block, op.format("w_format").block):
        raise OpError(f"its scales would span groups; it needs {ROWS_OF_BLOCKS}")
    if offsets != TensorType(DType.i32, w.shape[:1]):
        raise OpError(f"the offsets are {offsets}, but the weights {w} need i32[{w.shape[0]}]", "offsets")
    return (TensorType(out_dtype_of(op), (x.shape[0], w.shape[1])),)


def grouped_linear(
    x_q: Tensor,
    x_s: Tensor,
    w_q: Tensor,
    w_s: Tensor,
    offsets: Tensor,
    *,
    x_format: Format = FP8_TILE,
    w_format: Format = FP8_BLOCK,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`numerics.scaled_linear` of each group of rows with its own weight; zeros after the last group.

    Args:
        x_q: `[T, K]`, rows sorted by group.
        x_s: The scales of `x_q`, one or more per row.
        w_q: `[E, N, K]`.
        w_s: The scales of `w_q`, with separate rows for each group.
        offsets: int32 `[E]`, ascending: the end row of each group, exclusive. Read on the host.
        x_format: The format of `x_q`, with blocks of one row.
        w_format: The format of `w_q`.
        out_dtype: The dtype of the result, `[T, N]`.

    Raises:
        QCompilerError: The operands do not match.
    """
    check_grouped(x_q, w_q, offsets, x_format.block, w_format.block)
    out = x_q.new_zeros((x_q.shape[0], w_q.shape[1]), dtype=out_dtype)
    start = 0
    for group, end in enumerate(offsets.clamp(0, x_q.shape[0]).tolist()):
        if start < end:
            out[start:end] = numerics.scaled_linear(
                x_q[start:end], x_s[start:end], w_q[group], w_s[group],
                x_format=x_format, w_format=w_format, out_dtype=out_dtype,
            )  # fmt: skip
        start = end
    return out


def check_grouped(x_q: Tensor, w_q: Tensor, offsets: Tensor, x_block: Sequence[int], w_block: Sequence[int]) -> None:
    """Raises QCompilerError unless the operands form a grouped GEMM; does not check the scales."""
    if x_q.dim() != 2 or w_q.dim() != 3 or x_q.shape[-1] != w_q.shape[2]:
        raise QCompilerError(
            "the operands of a grouped linear do not match",
            got=f"x {list(x_q.shape)} and w {list(w_q.shape)}",
            need="x [T, K] and w [E, N, K]",
        )
    if offsets.shape != w_q.shape[:1] or offsets.dtype != torch.int32:
        raise QCompilerError(
            "the offsets must be one int32 number per group",
            got=f"{offsets.dtype} {list(offsets.shape)}",
            need=f"torch.int32 [{w_q.shape[0]}]",
        )
    if _spans_groups(x_block, w_block):
        got = f"x_block {list(x_block)} and w_block {list(w_block)}"
        raise QCompilerError("the scales of a grouped linear would span groups", got=got, need=ROWS_OF_BLOCKS)


def _spans_groups(x_block: Sequence[int], w_block: Sequence[int]) -> bool:
    return x_block[0] != 1 or w_block[0] == ALL


declare(
    OpDef(
        "quant.grouped_linear",
        "`quant.linear` of each group of rows with its own weight; zeros after the last group.",
        OPERANDS,
        LINEAR_ATTRIBUTES,
        types=grouped_linear_types,
        meaning=grouped_linear,
        role=Role.QUANTIZED_MATMUL,
    )
)
implement("quant.grouped_linear", "kernel.grouped_linear")
