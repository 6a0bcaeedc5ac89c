"""Gluon kernel for Hopper: the GEMM of `scaled_gemm` for few rows, where weights dominate memory traffic.

    partial[split, m, n] = sum over the blocks of one split of K of what `scaled_gemm` sums
    out[m, n]            = sum over splits of partial[split, m, n]   (+ bias[n])

The tensor cores work on at least 64 rows, so the weights are the left operand and the few rows the right one: a tile is
128 output channels times 16 to 128 rows. K is split until there are tiles for all multiprocessors, and a second kernel
adds partial sums in a fixed order, so every run gives the same bits.

A block of threads keeps `STAGES` blocks of K in flight through the copy engine and refills a stage as soon as it has
been multiplied; several blocks of threads share a multiprocessor and hide each other's latency.
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

from codegen.kernels.gluon_versions import async_load, barrier, reinterpret
from codegen.kernels.overlap import inputs_ready, let_next_start

SCALE_BOX = 32
"""Minimum scales per stage, because the copy engine writes to multiples of 128 bytes."""


@gluon.jit
def fill_weight(  # type: ignore[no-untyped-def]
    w, a_ring, w_ring, s_ring, full, step, block, column, there
):
    """Starts to fill the stage of a step, if the step exists: announces all of its bytes, and loads the weight."""
    STAGES: gl.constexpr = w_ring.shape[0]
    BLOCK_M: gl.constexpr = a_ring.shape[1]
    SCALES: gl.constexpr = 0 if s_ring is None else s_ring.shape[0] // STAGES * s_ring.shape[2]
    stage = step % STAGES
    bar = full.index(stage)
    mbarrier.expect(bar, (BLOCK_M + 128) * 128 + SCALES * 4, pred=there)
    async_load(w, [column, block * 128], bar, w_ring.index(stage), pred=there)


@gluon.jit
def fill_activation(  # type: ignore[no-untyped-def]
    a, a_scale, a_ring, s_ring, full, step, block, row, there, SPAN: gl.constexpr
):
    """Loads the activation of a step, and its scales, unless `a_scale` and `s_ring` are None."""
    STAGES: gl.constexpr = a_ring.shape[0]
    SUBS: gl.constexpr = 0 if s_ring is None else s_ring.shape[0] // STAGES
    stage = step % STAGES
    bar = full.index(stage)
    async_load(a, [row, block * 128], bar, a_ring.index(stage), pred=there)
    for sub in gl.static_range(SUBS):
        line = (block * SUBS + sub) // SPAN
        async_load(a_scale, [line, row], bar, s_ring.index(stage * SUBS + sub), pred=there)


@gluon.jit(do_not_specialize=["m", "depth"])
def narrow_gemm(  # type: ignore[no-untyped-def]
    a, w, out, a_scale, w_scale, bias, m, n, k, w_scale_stride_n, w_scale_stride_k, depth,
    STAGES: gl.constexpr, SPAN: gl.constexpr, SUBS: gl.constexpr,
):  # fmt: skip
    """out[m, n], or partial[splits, m, n] of it, of the descriptors a[m, k] and w[n, k].

    The grid has one program for each tile and each split of K. Descriptor loads outside a tensor return zero.

    Args:
        a: float8e4nv descriptor, block [BLOCK_M, 128] of 16 to 128 rows; 128 need 8 warps.
        w: float8e4nv descriptor, block [128, 128].
        out: Pointer to contiguous [m, n], or, for partial sums, to float32 [splits, m, n].
        a_scale: float32 descriptor of the transposed scales [ceil(k SUBS / (128 SPAN)), m], block [1, BLOCK_M], but
            at least SCALE_BOX columns.
        w_scale: float32 [ceil(n / 128), ceil(k / 128)], any strides.
        bias: [n] in any floating dtype, or None; None for partial sums.
        depth: Blocks of K of a split; no split is empty.
        STAGES: Blocks of K in flight or in use at once.
        SPAN: Blocks of K that share a scale of the activation.
        SUBS: Tiles of the activation in a block of K, each with a scale; 1, 2 or 4, and then SPAN is 1.
    """
    BLOCK_M: gl.constexpr = a.block_shape[0]
    WARPS: gl.constexpr = gl.num_warps()
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_M, 32]
    )
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES, BLOCK_M, 128], a.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, 128, 128], w.layout)
    SCALES: gl.constexpr = a_scale.block_shape[1]
    s_ring = gl.allocate_shared_memory(gl.float32, [STAGES * SUBS, 1, SCALES], a_scale.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for each in gl.static_range(STAGES):
        mbarrier.init(full.index(each), count=1)
    fence_async_shared()
    scales = reinterpret(s_ring, gl.float32, [STAGES * SUBS, SCALES], FLAT)
    DEPTH: gl.constexpr = 128 // SUBS

    height, width = gl.cdiv(m, BLOCK_M), gl.cdiv(n, 128)
    program = gl.program_id(0)
    split = program // (height * width)
    row = program // width % height * BLOCK_M
    tile_n = program % width
    first = split * depth
    steps = gl.minimum(depth, gl.cdiv(k, 128) - first)
    for each in gl.static_range(STAGES):
        fill_weight(w, a_ring, w_ring, s_ring, full, each, first + each, tile_n * 128, each < steps)
    let_next_start()
    w_scales = w_scale + tile_n.to(gl.int64) * w_scale_stride_n + first * w_scale_stride_k
    w_next = gl.load(w_scales)
    inputs_ready()
    for each in gl.static_range(STAGES):
        fill_activation(a, a_scale, a_ring, s_ring, full, each, first + each, row, each < steps, SPAN)
    total = gl.zeros([128, BLOCK_M], gl.float32, SUMS)
    part = gl.zeros([128, BLOCK_M], gl.float32, SUMS)
    for step in range(steps):
        stage = step % STAGES
        w_now = w_next
        w_next = gl.load(w_scales + gl.minimum(step + 1, steps - 1) * w_scale_stride_k)  # one block ahead
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        for sub in gl.static_range(SUBS):
            left = w_ring.index(stage).slice(sub * DEPTH, DEPTH, 1)
            right = a_ring.index(stage).slice(sub * DEPTH, DEPTH, 1).permute((1, 0))
            part = warpgroup_mma(left, right, part, use_acc=False, is_async=True)
            scale = scales.index(stage * SUBS + sub).slice(0, BLOCK_M).load(gl.SliceLayout(0, SUMS)) * w_now
            part = warpgroup_mma_wait(0, deps=(part,))
            if sub == SUBS - 1:
                barrier()  # all warps have read the stage
                later, there = step + STAGES, step + STAGES < steps
                fill_weight(w, a_ring, w_ring, s_ring, full, later, first + later, tile_n * 128, there)
                fill_activation(a, a_scale, a_ring, s_ring, full, later, first + later, row, there, SPAN)
            total += part * scale[None, :]

    columns = tile_n * 128 + gl.arange(0, 128, gl.SliceLayout(1, SUMS))
    rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, SUMS))
    if bias is not None:
        total += gl.load(bias + columns, mask=columns < n, other=0.0).to(gl.float32)[:, None]
    places = out + (split.to(gl.int64) * m + rows)[None, :] * n + columns[:, None]
    gl.store(places, total.to(out.dtype.element_ty), mask=(rows < m)[None, :] & (columns < n)[:, None])


@triton.jit(do_not_specialize=["m", "rows", "splits"])
def sum_splits(  # type: ignore[no-untyped-def]
    partial, out, bias, m, rows, n, splits, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[m, n] = sum over splits of partial[splits, rows, n], first m rows only  (+ bias[n]), in a fixed order.

    Args:
        partial: float32, contiguous.
        out: Any floating dtype, contiguous.
        bias: [n] in any floating dtype, or None.
        splits: Number of splits.
        SPLITS: The next power of two.
        BLOCK: Output elements per program.
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = m.to(tl.int64) * n
    every = tl.arange(0, SPLITS)[:, None]
    there = (every < splits) & (places < size)[None, :]
    apart = rows.to(tl.int64) * n
    let_next_start()
    inputs_ready()
    total = tl.sum(tl.load(partial + every * apart + places[None, :], mask=there, other=0.0), axis=0)
    if bias is not None:
        total += tl.load(bias + places % n, mask=places < size, other=0.0).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=places < size)
