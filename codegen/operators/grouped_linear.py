"""The operators `grouped_linear` (contiguous groups) and `grouped_linear_masked` (fixed capacity).

    grouped_linear          out[t]    = x[t] @ w[g].T      for offsets[g - 1] <= t < offsets[g], else 0
    grouped_linear_masked   out[g, t] = x[g, t] @ w[g].T   for t < counts[g]; the other rows are not specified

Both use scales of [1, 128] tiles and [128, 128] blocks on a GPU; the host does not wait for the group sizes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codegen.launching.launch import FLOATS, on
from codegen.launching.replay import empty, replayed
from codegen.operators.operator import Operator, declare
from codegen.operators.quantize import scale_like
from codegen.support import WEIGHT_BLOCK
from codegen.targets.cuda import gpu_at
from codegen.templates.grouped import GROUPED_GEMM, MOST_GROUPS, GroupedOperands, GroupedProblem
from codegen.templates.hopper import has_scale_columns
from qcompiler import numerics
from qcompiler.dialects.grouped import check_grouped, grouped_linear
from qcompiler.errors import CodegenError

X_BLOCK = (1, 128)
"""Activation tiles that the kernels support; weights have blocks of `WEIGHT_BLOCK`."""

E4M3 = torch.float8_e4m3fn


class GroupedLinear(NamedTuple):
    """The arguments of both operators; the fifth are the offsets, or the counts."""

    x_q: Tensor
    x_s: Tensor
    w_q: Tensor
    w_s: Tensor
    offsets: Tensor
    x_block: Sequence[int]
    w_block: Sequence[int]
    out_dtype: torch.dtype
    expected: int | None = None

    @property
    def formats(self) -> dict[str, Any]:
        """The attributes of `kernel.grouped_linear`."""
        x_format = numerics.format_of(self.x_block, self.x_q.dtype)
        w_format = numerics.format_of(self.w_block, self.w_q.dtype)
        return {"x_format": x_format, "w_format": w_format, "out_dtype": self.out_dtype}


def _on_cpu(*arguments: Any) -> Tensor:
    given = GroupedLinear(*arguments)
    return grouped_linear(*given[:5], **given.formats)


def _fake(*arguments: Any) -> Tensor:
    x_q, _, w_q, _, offsets, x_block, w_block, out_dtype, _ = GroupedLinear(*arguments)
    check_grouped(x_q, w_q, offsets, x_block, w_block)
    return x_q.new_empty((x_q.shape[0], w_q.shape[1]), dtype=out_dtype)


def _on_gpu(*arguments: Any) -> Tensor:
    *operands, x_block, w_block, out_dtype = arguments
    return replayed(_grouped_linear, ("grouped_linear", *x_block, *w_block, out_dtype), operands, *arguments)


def _grouped_linear(*arguments: Any) -> Tensor:
    given = GroupedLinear(*arguments)
    x_q, _, w_q, _, offsets, x_block, w_block, out_dtype, _ = given
    check_grouped(x_q, w_q, offsets, x_block, w_block)
    rows, (groups, n, _) = x_q.shape[0], w_q.shape
    out = empty((rows, n), out_dtype, x_q.device)
    _run(given, out, None, rows / max(groups, 1))
    return out


def _masked_on_cpu(*arguments: Any) -> Tensor:
    """The first counts[g] rows of each group times its weight; the other rows are zero."""
    given = GroupedLinear(*arguments)
    x_q, x_s, w_q, w_s, counts, *_ = given
    out = _masked_fake(*arguments).zero_()
    for group, count in enumerate(counts.clamp(0, x_q.shape[1]).tolist()):
        operands = (x_q[group, :count], x_s[group, :count], w_q[group], w_s[group])
        out[group, :count] = numerics.scaled_linear(*operands, **given.formats)
    return out


def _masked_fake(*arguments: Any) -> Tensor:
    given = GroupedLinear(*arguments)
    _check_masked(given)
    return given.x_q.new_empty((*given.x_q.shape[:2], given.w_q.shape[1]), dtype=given.out_dtype)


def _masked_on_gpu(*arguments: Any) -> Tensor:
    """Is tuned for `expected` rows per group (default: the full capacity).

    Rows after a group's count are not written, and do not affect any row that is written.
    """
    given = GroupedLinear(*arguments)
    what = ("grouped_linear_masked", *given.x_block, *given.w_block, given.out_dtype, given.expected)
    return replayed(_grouped_linear_masked, what, given[:5], *given)


def _grouped_linear_masked(*arguments: Any) -> Tensor:
    given = GroupedLinear(*arguments)
    x_q, x_s, w_q, _, _, _, _, out_dtype, expected = given
    _check_masked(given)
    out = empty((*x_q.shape[:2], w_q.shape[1]), out_dtype, x_q.device)
    capacity = x_q.shape[1]
    mean = capacity if expected is None else min(max(expected, 0), capacity)
    flat = x_s.flatten(0, 1) if x_s.dim() == 3 else x_s
    _run(given._replace(x_q=x_q.flatten(0, 1), x_s=flat), out.flatten(0, 1), capacity, mean)
    return out


def _check_masked(given: GroupedLinear) -> None:
    """Raises QCompilerError unless the operands form a masked matmul; does not check their scales."""
    x_q, w_q = given.x_q, given.w_q
    if x_q.dim() != 3 or x_q.shape[:1] != w_q.shape[:1]:
        got, need = f"x {list(x_q.shape)} and w {list(w_q.shape)}", "x [E, capacity, K] and w [E, N, K]"
        raise CodegenError("the operands of a masked grouped linear do not fit", got=got, need=need)
    check_grouped(x_q.flatten(0, 1), w_q, given.offsets, given.x_block, given.w_block)


def _run(given: GroupedLinear, out: Tensor, capacity: int | None, mean: float) -> None:
    """Fills `out`, whose rows are in the given order, on the device of the operands."""
    x_q, x_s, w_q, w_s, offsets, *_ = given
    gpu = gpu_at(x_q.device)
    _check(given, out, gpu.limits.copy_alignment)
    if out.numel() == 0:
        return
    if x_q.shape[1] == 0:
        out.zero_()
        return
    aligned = x_q.is_contiguous() and x_q.data_ptr() % gpu.limits.copy_alignment == 0
    rows = x_q if aligned else x_q.clone(memory_format=torch.contiguous_format)
    scales = x_s if has_scale_columns(x_s) else scale_like(rows, X_BLOCK[1], "col_major").copy_(x_s)
    family = GROUPED_GEMM.family(gpu)
    config = family.choose(GroupedProblem(mean, w_q.shape[0], out.element_size()))
    with on(x_q.device):
        family.launch(config, GroupedOperands(rows, w_q, out, scales, w_s, offsets.contiguous(), capacity))


def _check(given: GroupedLinear, out: Tensor, unit: int) -> None:
    """Raises CodegenError, with the actual and expected value, for operands that the kernels do not support.

    Args:
        given: The arguments.
        out: The result, as a matrix.
        unit: Starts and rows of what the copy engine reads are multiples of this number of bytes.
    """
    x_q, x_s, w_q, w_s, offsets, *blocks, _, _ = given
    (groups, n, k), row = w_q.shape, out.shape[1] * out.element_size()
    # Comparisons run one after another, because this runs in every call; the message is built only on failure.
    fits = (
        (tuple(blocks[0]), tuple(blocks[1])) == (X_BLOCK, WEIGHT_BLOCK)
        and x_q.dtype is w_q.dtype is E4M3
        and x_s.dtype is w_s.dtype is torch.float32
        and out.dtype in FLOATS
        and list(x_s.shape) == numerics.scale_shape(x_q.shape, X_BLOCK)
        and list(w_s.shape) == numerics.scale_shape(w_q.shape, WEIGHT_BLOCK)
        and w_q.is_contiguous()
        and w_s.is_contiguous()
        and w_q.data_ptr() % unit == 0
        and k % unit == 0
        and row % unit == 0
        and groups <= MOST_GROUPS
        and max(x_q.shape[0], groups * n, k) < 2**31
        and x_q.device == x_s.device == w_q.device == w_s.device == offsets.device
    )
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
        (f"start of the weights (bytes beyond a multiple of {unit})", w_q.data_ptr() % unit, 0),
        (f"depth of {k} (beyond a multiple of {unit})", k % unit, 0),
        (f"output row of {row} bytes (beyond a multiple of {unit})", row % unit, 0),
        (f"number of groups (beyond {MOST_GROUPS})", max(groups - MOST_GROUPS, 0), 0),
        ("device of the operands", {t.device for t in (x_s, w_q, w_s, offsets)}, {x_q.device}),
    )
    for what, got, need in facts:
        if got != need:
            raise CodegenError(f"no GPU kernel runs this grouped linear: {what}", got=got, need=need)
    if out.dtype not in FLOATS:
        raise CodegenError("the grouped kernels cannot write this dtype", got=out.dtype, need=list(FLOATS))
    raise CodegenError("a grouped linear has a size beyond 32 bits", got=f"{x_q.shape[0]} rows, {groups} x {n} x {k}")


GROUPED_LINEAR_SCHEMA = (
    "grouped_linear(Tensor x_q, Tensor x_s, Tensor w_q, Tensor w_s, Tensor offsets, int[] x_block, int[] w_block, "
    "ScalarType out_dtype) -> Tensor"
)
declare(Operator(GROUPED_LINEAR_SCHEMA, _on_cpu, _on_gpu, _fake))
GROUPED_LINEAR_MASKED_SCHEMA = (
    "grouped_linear_masked(Tensor x_q, Tensor x_s, Tensor w_q, Tensor w_s, Tensor counts, int[] x_block, "
    "int[] w_block, ScalarType out_dtype, int? expected=None) -> Tensor"
)
declare(Operator(GROUPED_LINEAR_MASKED_SCHEMA, _masked_on_cpu, _masked_on_gpu, _masked_fake))
