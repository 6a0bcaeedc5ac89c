"""Gluon kernel for Hopper: the GEMM of `row_gemm` for few rows, where weights dominate memory traffic.

    partial[split, m, n] = the sum over one split of K of a[m] . w[n]
    out[m, n]            = sum over splits of partial[split, m, n] * a_scale[m] * w_scale[n]   (+ bias[n])

Tiles, splits and copies work as in `narrow_gemm`: the weights are the left operand. Partial sums of INT8 are exact
integers; FP8 sums are promoted every 128 of K with `PROMOTE`. A second kernel adds them in a fixed order.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from codegen.kernels.gluon_versions import barrier
from codegen.kernels.narrow_gemm import fill_activation, fill_weight
from codegen.kernels.overlap import inputs_ready, let_next_start


@gluon.jit(do_not_specialize=["m", "a_scale_stride", "w_scale_stride", "depth"])
def narrow_row_gemm(  # type: ignore[no-untyped-def]
    a, w, out, a_scale, w_scale, bias, m, n, k, a_scale_stride, w_scale_stride, depth,
    STAGES: gl.constexpr, PROMOTE: gl.constexpr,
):  # fmt: skip
    """out[m, n], or partial[splits, m, n] of it, of the descriptors a[m, k] and w[n, k].

    The grid has one program for each tile and each split of K. Descriptor loads outside a tensor return zero.

    Args:
        a: float8e4nv or int8 descriptor, block [BLOCK_M, 128] of 16 to 64 rows.
        w: Descriptor of the same dtype, block [128, 128].
        out: Pointer to contiguous [m, n], or, for partial sums, to float32 or, of INT8, int32 [splits, m, n].
        a_scale: float32, row m's at m times the stride; None for partial sums.
        w_scale: float32, row n's at n times the stride; None for partial sums.
        bias: [n] in any floating dtype, or None; None for partial sums.
        depth: Blocks of K of a split; no split is empty.
        STAGES: Blocks of K in flight or in use at once.
        PROMOTE: Add each step in FP32 registers; for FP8.
    """
    BLOCK_M: gl.constexpr = a.block_shape[0]
    KIND: gl.constexpr = gl.int32 if a.dtype == gl.int8 else gl.float32
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BLOCK_M, 32]
    )
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES, BLOCK_M, 128], a.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, 128, 128], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for each in gl.static_range(STAGES):
        mbarrier.init(full.index(each), count=1)
    fence_async_shared()

    height, width = gl.cdiv(m, BLOCK_M), gl.cdiv(n, 128)
    program = gl.program_id(0)
    split = program // (height * width)
    row = program // width % height * BLOCK_M
    column = program % width * 128
    first = split * depth
    steps = gl.minimum(depth, gl.cdiv(k, 128) - first)
    for each in gl.static_range(STAGES):
        fill_weight(w, a_ring, w_ring, None, full, each, first + each, column, each < steps)
    let_next_start()
    inputs_ready()
    for each in gl.static_range(STAGES):
        fill_activation(a, None, a_ring, None, full, each, first + each, row, each < steps, 1)
    total = gl.zeros([128, BLOCK_M], KIND, SUMS)
    part = gl.zeros([128, BLOCK_M], KIND, SUMS)
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        right = a_ring.index(stage).permute((1, 0))
        if PROMOTE:
            part = warpgroup_mma(w_ring.index(stage), right, part, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
        else:
            total = warpgroup_mma(w_ring.index(stage), right, total, is_async=True)
            total = warpgroup_mma_wait(0, deps=(total,))
        barrier()  # all warps have read the stage
        later, there = step + STAGES, step + STAGES < steps
        fill_weight(w, a_ring, w_ring, None, full, later, first + later, column, there)
        fill_activation(a, None, a_ring, None, full, later, first + later, row, there, 1)
        if PROMOTE:
            total += part

    columns = column + gl.arange(0, 128, gl.SliceLayout(1, SUMS))
    rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, SUMS))
    if a_scale is not None:
        left = gl.load(w_scale + columns.to(gl.int64) * w_scale_stride, mask=columns < n, other=0.0)
        right = gl.load(a_scale + rows.to(gl.int64) * a_scale_stride, mask=rows < m, other=0.0)
        total = total.to(gl.float32) * (left[:, None] * right[None, :])
    if bias is not None:
        total += gl.load(bias + columns, mask=columns < n, other=0.0).to(gl.float32)[:, None]
    places = out + (split.to(gl.int64) * m + rows)[None, :] * n + columns[:, None]
    gl.store(places, total.to(out.dtype.element_ty), mask=(rows < m)[None, :] & (columns < n)[:, None])


@triton.jit(do_not_specialize=["m", "splits", "a_scale_stride", "w_scale_stride"])
def sum_row_splits(  # type: ignore[no-untyped-def]
    partial, out, a_scale, w_scale, bias, m, n, splits, a_scale_stride, w_scale_stride,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum over splits of partial[splits, m, n] * a_scale[m] * w_scale[n]  (+ bias[n]), in a fixed order.

    Args:
        partial: float32 or int32, contiguous.
        out: Any floating dtype, contiguous.
        a_scale: float32, row m's at m times the stride.
        w_scale: float32, row n's at n times the stride.
        bias: [n] in any floating dtype, or None.
        splits: Number of splits.
        SPLITS: The next power of two.
        BLOCK: Output elements per program.
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = m.to(tl.int64) * n
    every = tl.arange(0, SPLITS)[:, None]
    there = (every < splits) & (places < size)[None, :]
    let_next_start()
    inputs_ready()
    total = tl.sum(tl.load(partial + every * size + places[None, :], mask=there, other=0), axis=0)
    rows, columns = places // n, places % n
    left = tl.load(a_scale + rows * a_scale_stride, mask=places < size, other=0.0)
    right = tl.load(w_scale + columns * w_scale_stride, mask=places < size, other=0.0)
    result = total.to(tl.float32) * (left * right)
    if bias is not None:
        result += tl.load(bias + columns, mask=places < size, other=0.0).to(tl.float32)
    tl.store(out + places, result.to(out.dtype.element_ty), mask=places < size)
