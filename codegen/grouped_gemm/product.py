"""Grouped matmul operators: `grouped_linear` (contiguous groups) and `grouped_linear_masked` (fixed capacity).

    grouped_linear          out[t]    = x[t] @ w[g].T      for offsets[g - 1] <= t < offsets[g], else 0
    grouped_linear_masked   out[g, t] = x[g, t] @ w[g].T   for t < counts[g]; the other rows are not specified

Both use scales of [1, 128] tiles and [128, 128] blocks on a GPU; the host does not wait for the group sizes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from codegen.launching.launch import FLOATS, on
from codegen.launching.replay import empty, replayed
from codegen.quantize.plain import scale_like
from codegen.support import WEIGHT_BLOCK
from codegen.targets.hopper import HOPPER, check_device
from codegen.templates.grouped import MOST_GROUPS, GroupedOperands, GroupedProblem
from codegen.templates.hopper import has_scale_columns
from qcompiler import numerics
from qcompiler.dialects.grouped import check_grouped, grouped_linear
from qcompiler.errors import CodegenError

X_BLOCK = (1, 128)
"""Activation tiles that the kernels support; weights have blocks of `WEIGHT_BLOCK`."""

E4M3 = torch.float8_e4m3fn


def grouped_linear_reference(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, offsets: Tensor,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`qcompiler.dialects.grouped.grouped_linear`, with its keyword arguments in order."""
    return grouped_linear(
        x_q,
        x_s,
        w_q,
        w_s,
        offsets,
        x_format=numerics.format_of(x_block, x_q.dtype),
        w_format=numerics.format_of(w_block, w_q.dtype),
        out_dtype=out_dtype,
    )


def grouped_linear_fake(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, offsets: Tensor,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The shape and dtype of a grouped linear; the same errors."""
    check_grouped(x_q, w_q, offsets, x_block, w_block)
    return x_q.new_empty((x_q.shape[0], w_q.shape[1]), dtype=out_dtype)


def grouped_linear_on_gpu(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, offsets: Tensor,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`grouped_linear` on a CUDA device; raises CodegenError for operands that the kernels do not support."""
    what, operands = ("grouped_linear", *x_block, *w_block, out_dtype), (x_q, x_s, w_q, w_s, offsets)
    return replayed(_grouped_linear, what, operands, *operands, x_block, w_block, out_dtype)


def _grouped_linear(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, offsets: Tensor,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_grouped(x_q, w_q, offsets, x_block, w_block)
    rows, (groups, n, _) = x_q.shape[0], w_q.shape
    out = empty((rows, n), out_dtype, x_q.device)
    _run(x_q, x_s, w_q, w_s, offsets, (x_block, w_block), out, None, rows / max(groups, 1))
    return out


def grouped_linear_masked_reference(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, counts: Tensor,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype, expected: int | None = None,
) -> Tensor:  # fmt: skip
    """The first counts[g] rows of each group times its weight; the other rows are zero."""
    out = grouped_linear_masked_fake(x_q, x_s, w_q, w_s, counts, x_block, w_block, out_dtype).zero_()
    for group, count in enumerate(counts.clamp(0, x_q.shape[1]).tolist()):
        out[group, :count] = numerics.scaled_linear(
            x_q[group, :count], x_s[group, :count], w_q[group], w_s[group],
            x_format=numerics.format_of(x_block, x_q.dtype), w_format=numerics.format_of(w_block, w_q.dtype),
            out_dtype=out_dtype,
        )  # fmt: skip
    return out


def grouped_linear_masked_fake(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, counts: Tensor,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype, expected: int | None = None,
) -> Tensor:  # fmt: skip
    """The shape and dtype of a masked grouped linear; raises CodegenError for operands that do not match."""
    _check_masked(x_q, w_q, counts, x_block, w_block)
    return x_q.new_empty((*x_q.shape[:2], w_q.shape[1]), dtype=out_dtype)


def grouped_linear_masked_on_gpu(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, counts: Tensor,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype, expected: int | None = None,
) -> Tensor:  # fmt: skip
    """`grouped_linear_masked` on a CUDA device, tuned for `expected` rows per group (default: the full capacity).

    Rows after a group's count are not written, and do not affect any row that is written.
    """
    what, operands = ("grouped_linear_masked", *x_block, *w_block, out_dtype, expected), (x_q, x_s, w_q, w_s, counts)
    return replayed(_grouped_linear_masked, what, operands, *operands, x_block, w_block, out_dtype, expected)


def _grouped_linear_masked(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, counts: Tensor,
    x_block: Sequence[int], w_block: Sequence[int], out_dtype: torch.dtype, expected: int | None,
) -> Tensor:  # fmt: skip
    _check_masked(x_q, w_q, counts, x_block, w_block)
    out = empty((*x_q.shape[:2], w_q.shape[1]), out_dtype, x_q.device)
    capacity = x_q.shape[1]
    mean = capacity if expected is None else min(max(expected, 0), capacity)
    flat = x_s.flatten(0, 1) if x_s.dim() == 3 else x_s
    _run(x_q.flatten(0, 1), flat, w_q, w_s, counts, (x_block, w_block), out.flatten(0, 1), capacity, mean)
    return out


def _check_masked(x_q: Tensor, w_q: Tensor, counts: Tensor, x_block: Sequence[int], w_block: Sequence[int]) -> None:
    """Raises QCompilerError unless the operands form a masked matmul; does not check their scales."""
    if x_q.dim() != 3 or x_q.shape[:1] != w_q.shape[:1]:
        got, need = f"x {list(x_q.shape)} and w {list(w_q.shape)}", "x [E, capacity, K] and w [E, N, K]"
        raise CodegenError("the operands of a masked grouped linear do not fit", got=got, need=need)
    check_grouped(x_q.flatten(0, 1), w_q, counts, x_block, w_block)


def _run(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, offsets: Tensor, blocks: tuple[Sequence[int], Sequence[int]],
    out: Tensor, capacity: int | None, mean: float,
) -> None:  # fmt: skip
    """Fills `out`, whose rows are in the given order, on the device of the operands."""
    check_device(x_q.device)
    _check(x_q, x_s, w_q, w_s, offsets, blocks, out)
    if out.numel() == 0:
        return
    if x_q.shape[1] == 0:
        out.zero_()
        return
    rows = x_q if x_q.is_contiguous() and x_q.data_ptr() % 16 == 0 else x_q.clone(memory_format=torch.contiguous_format)
    scales = x_s if has_scale_columns(x_s) else scale_like(rows, X_BLOCK[1], "col_major").copy_(x_s)
    config = HOPPER.grouped_gemm.choose(GroupedProblem(mean, w_q.shape[0], out.element_size()))
    with on(x_q.device):
        operands = GroupedOperands(rows, w_q, out, scales, w_s, offsets.contiguous(), capacity)
        HOPPER.grouped_gemm.launch(config, operands)


def _check(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, offsets: Tensor, blocks: tuple[Sequence[int], Sequence[int]],
    out: Tensor,
) -> None:  # fmt: skip
    """Raises CodegenError, with the actual and expected value, for operands that the kernels do not support."""
    (groups, n, k), row = w_q.shape, out.shape[1] * out.element_size()
    # Comparisons run one after another, because this runs in every call; the message is built only on failure.
    fits = (
        (tuple(blocks[0]), tuple(blocks[1])) == (X_BLOCK, WEIGHT_BLOCK)
        and x_q.dtype is w_q.dtype is E4M3
        and x_s.dtype is w_s.dtype is torch.float32
        and out.dtype in FLOATS
        and list(x_s.shape) == numerics.scale_shape(x_q.shape, X_BLOCK)
        and list(w_s.shape) == numerics.scale_shape(w_q.shape, WEIGHT_BLOCK)
        and w_q.is_contiguous() and w_s.is_contiguous() and w_q.data_ptr() % 16 == 0
        and k % 16 == 0 and row % 16 == 0 and groups <= MOST_GROUPS
        and max(x_q.shape[0], groups * n, k) < 2**31
        and x_q.device == x_s.device == w_q.device == w_s.device == offsets.device
    )  # fmt: skip
    if fits:
        return
    facts = (
        ("blocks of the activation", tuple(blocks[0]), X_BLOCK),
        ("blocks of the weights", tuple(blocks[1]), WEIGHT_BLOCK),
        ("format of the operands", {x_q.dtype, w_q.dtype}, {E4M3}),
        ("dtype of the scales", {x_s.dtype, w_s.dtype}, {torch.float32}),
        ("shape of the activation scales", list(x_s.shape), numerics.scale_shape(x_q.shape, X_BLOCK)),
        ("shape of the weight scales", list(w_s.shape), numerics.scale_shape(w_q.shape, WEIGHT_BLOCK)),
        ("layout of the weights (contiguous)", w_q.is_contiguous() and w_s.is_contiguous(), True),
        ("start of the weights (bytes beyond a multiple of 16)", w_q.data_ptr() % 16, 0),
        (f"depth of {k} (beyond a multiple of 16)", k % 16, 0),
        (f"output row of {row} bytes (beyond a multiple of 16)", row % 16, 0),
        (f"number of groups (beyond {MOST_GROUPS})", max(groups - MOST_GROUPS, 0), 0),
        ("device of the operands", {t.device for t in (x_s, w_q, w_s, offsets)}, {x_q.device}),
    )
    for what, got, need in facts:
        if got != need:
            raise CodegenError(f"no GPU kernel runs this grouped linear: {what}", got=got, need=need)
    if out.dtype not in FLOATS:
        raise CodegenError("the grouped kernels cannot write this dtype", got=out.dtype, need=list(FLOATS))
    raise CodegenError("a grouped linear has a size beyond 32 bits", got=f"{x_q.shape[0]} rows, {groups} x {n} x {k}")
