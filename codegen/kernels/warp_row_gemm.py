"""Warp-specialized Gluon kernel for Hopper: the GEMM of `row_gemm` for many rows.

    out[m, n] = (a[m] . w[n]) * a_scale[m] * w_scale[n]   (+ bias[n])

a and w are both FP8 or both INT8; a scale of stride 0 applies to the whole tensor. The producer, the order of tiles and
the turns come from `warp_pipeline`. Each of the consumers owns `WAVES` times 64 rows of the tile.

With `PROMOTE`, for FP8, four tensor core instructions of K = 32 write to fresh registers, and are added in FP32 while
another consumer's instructions run. Without it, the tensor cores keep the sums (exactly for INT8), and instructions of
the next step are always queued.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from codegen.kernels.overlap import inputs_ready
from codegen.kernels.warp_pipeline import give_turn, produce, store, tile_of, wait_for_turn


@gluon.jit
def _consume(  # type: ignore[no-untyped-def]
    WHO: gl.constexpr, out, a_scale, w_scale, bias, a_ring, w_ring, out_ring, full, free, m, n, k,
    a_scale_stride, w_scale_stride, height, width,
    CONSUMERS: gl.constexpr, WAVES: gl.constexpr, GROUP: gl.constexpr, PROMOTE: gl.constexpr,
):  # fmt: skip
    """Multiplies, scales and stores the rows of consumer number WHO in all tiles of this block of threads."""
    STAGES: gl.constexpr = w_ring.shape[0]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    BOXES: gl.constexpr = a_ring.shape[0] // STAGES
    ROWS: gl.constexpr = a_ring.shape[1]
    KIND: gl.constexpr = gl.int32 if a_ring.dtype == gl.int8 else gl.float32
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 32])
    # Position of this consumer's waves: the box in a stage, and the row in the box.
    BOX: gl.constexpr = WHO * WAVES * 64 // ROWS
    ROW: gl.constexpr = WHO * WAVES * 64 % ROWS
    NEXT: gl.constexpr = (WHO + 1) % CONSUMERS
    TURNS: gl.constexpr = PROMOTE and CONSUMERS * WAVES > 2
    BUFFERS: gl.constexpr = out_ring.shape[0] // CONSUMERS
    LINES: gl.constexpr = gl.SliceLayout(1, SUMS)
    SPREAD: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    blocks = gl.cdiv(k, 128)
    turn = 0
    inputs_ready()
    if TURNS and WHO == CONSUMERS - 1:
        give_turn(NEXT)
    for tile in range(gl.program_id(0), height * width, gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, height, width, GROUP)
        # Scales and bias are loaded while the tile is multiplied; each thread holds one or two columns' values.
        row, column = (tile_m * CONSUMERS + WHO) * WAVES * 64, tile_n * BLOCK_N
        columns = column + gl.arange(0, BLOCK_N, SPREAD)
        w_scales = gl.load(w_scale + columns.to(gl.int64) * w_scale_stride, mask=columns < n, other=0.0)
        if bias is not None:
            biases = gl.load(bias + columns, mask=columns < n, other=0.0).to(gl.float32)
        rows = row + gl.arange(0, 64, LINES)
        scale0 = gl.load(a_scale + rows.to(gl.int64) * a_scale_stride, mask=rows < m, other=0.0)
        if WAVES == 2:
            scale1 = gl.load(a_scale + (rows + 64).to(gl.int64) * a_scale_stride, mask=rows + 64 < m, other=0.0)
        total0 = gl.zeros([64, BLOCK_N], KIND, SUMS)
        if WAVES == 2:
            total1 = gl.zeros([64, BLOCK_N], KIND, SUMS)
        if PROMOTE:
            part = gl.zeros([64, BLOCK_N], KIND, SUMS)
        for block in range(blocks):
            stage = turn % STAGES
            place = stage * BOXES + BOX
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            left0 = a_ring.index(place).slice(ROW, 64)
            right = w_ring.index(stage).permute((1, 0))
            if PROMOTE:
                if TURNS:
                    wait_for_turn(WHO)
                part = warpgroup_mma(left0, right, part, use_acc=False, is_async=True)
                if TURNS:
                    give_turn(NEXT)
                part = warpgroup_mma_wait(0, deps=(part,))
                if WAVES == 1:
                    mbarrier.arrive(free.index(stage), count=1)
                total0 += part
                # Registers suffice for one `part`: waiting on a sum keeps the next wave after this promotion.
                total0 = warpgroup_mma_wait(0, deps=(total0,))
                if WAVES == 2:
                    wait_for_turn(WHO)
                    part = warpgroup_mma(
                        a_ring.index(place).slice(ROW + 64, 64), right, part, use_acc=False, is_async=True
                    )
                    give_turn(NEXT)
                    part = warpgroup_mma_wait(0, deps=(part,))
                    mbarrier.arrive(free.index(stage), count=1)
                    total1 += part
                    total1 = warpgroup_mma_wait(0, deps=(total1,))
            else:
                total0 = warpgroup_mma(left0, right, total0, is_async=True)
                if WAVES == 2:
                    total1 = warpgroup_mma(a_ring.index(place).slice(ROW + 64, 64), right, total1, is_async=True)
                    total0, total1 = warpgroup_mma_wait(2, deps=(total0, total1))
                else:
                    total0 = warpgroup_mma_wait(1, deps=(total0,))
                if block > 0:  # the previous step is done
                    mbarrier.arrive(free.index((turn + STAGES - 1) % STAGES), count=1)
            turn += 1
        if not PROMOTE:
            if WAVES == 2:
                total0, total1 = warpgroup_mma_wait(0, deps=(total0, total1))
            else:
                total0 = warpgroup_mma_wait(0, deps=(total0,))
            mbarrier.arrive(free.index((turn + STAGES - 1) % STAGES), count=1)
        # Combine the scales first, because their product stays in range.
        w_line = gl.convert_layout(w_scales, gl.SliceLayout(0, SUMS))[None, :]
        result0 = total0.to(gl.float32) * (scale0[:, None] * w_line)
        if bias is not None:
            b_line = gl.convert_layout(biases, gl.SliceLayout(0, SUMS))[None, :]
            result0 += b_line
        store(out, out_ring.index(WHO * BUFFERS), result0, row, column, None, n, BUFFERS - 1)
        if WAVES == 2:
            result1 = total1.to(gl.float32) * (scale1[:, None] * w_line)
            if bias is not None:
                result1 += b_line
            store(out, out_ring.index((WHO + 1) * BUFFERS - 1), result1, row + 64, column, None, n, BUFFERS - 1)
    tma.store_wait(0)
    if TURNS and WHO == 0:
        wait_for_turn(WHO)  # every turn that was passed is consumed


@gluon.jit(do_not_specialize=["m", "a_scale_stride"])
def warp_row_gemm(  # type: ignore[no-untyped-def]
    a, w, out, a_scale, w_scale, bias, m, n, k, a_scale_stride, w_scale_stride,
    CONSUMERS: gl.constexpr, WAVES: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, PROMOTE: gl.constexpr,
    BUFFERS: gl.constexpr,
):  # fmt: skip
    """out[m, n] of a[m, k] and w[n, k], all three as tensor descriptors, on a grid of any size.

    Descriptor loads outside a tensor return zero; descriptor stores outside it are dropped.

    Args:
        a: float8e4nv or int8 descriptor; its block is [BLOCK_M, 128], or [64, 128] if BLOCK_M is not a power of two.
        w: Descriptor of the same dtype, block [BLOCK_N, 128].
        out: bfloat16, float16 or float32 descriptor, block [64, BLOCK_N].
        a_scale: float32, row m's at m times the stride.
        w_scale: float32, row n's at n times the stride.
        bias: [n] in any floating dtype, or None.
        CONSUMERS: Warpgroups that multiply, 2 or 3.
        WAVES: Units of 64 rows that each consumer owns; BLOCK_M is 64 CONSUMERS WAVES.
        STAGES: Blocks of K in shared memory at once.
        GROUP: Consecutive rows of tiles.
        PROMOTE: Add each step in FP32 registers; for FP8.
        BUFFERS: Output buffers of 64 rows for each consumer; one, or WAVES.
    """
    BLOCK_M: gl.constexpr = CONSUMERS * WAVES * 64
    BLOCK_N: gl.constexpr = w.block_shape[0]
    ROWS: gl.constexpr = a.block_shape[0]
    BOXES: gl.constexpr = BLOCK_M // ROWS
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES * BOXES, ROWS, 128], a.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, BLOCK_N, 128], w.layout)
    out_ring = gl.allocate_shared_memory(out.dtype, [CONSUMERS * BUFFERS, 64, BLOCK_N], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=CONSUMERS)
    fence_async_shared()
    height, width = gl.cdiv(m, BLOCK_M), gl.cdiv(n, BLOCK_N)
    # Argument tuples must be written in the call: in a variable, their constants would become tensors.
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), out, a_scale, w_scale, bias, a_ring, w_ring, out_ring, full, free, m, n, k,
                            a_scale_stride, w_scale_stride, height, width, CONSUMERS, WAVES, GROUP, PROMOTE)),
                (_consume, (gl.constexpr(1), out, a_scale, w_scale, bias, a_ring, w_ring, out_ring, full, free, m, n, k,
                            a_scale_stride, w_scale_stride, height, width, CONSUMERS, WAVES, GROUP, PROMOTE)),
                (_consume, (gl.constexpr(2), out, a_scale, w_scale, bias, a_ring, w_ring, out_ring, full, free, m, n, k,
                            a_scale_stride, w_scale_stride, height, width, CONSUMERS, WAVES, GROUP, PROMOTE)),
                (produce, (a, w, None, a_ring, w_ring, None, full, free, k, height, width, GROUP, 1)),
            ],
            [4, 4, 1], [160, 160, 32],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), out, a_scale, w_scale, bias, a_ring, w_ring, out_ring, full, free, m, n, k,
                            a_scale_stride, w_scale_stride, height, width, CONSUMERS, WAVES, GROUP, PROMOTE)),
                (_consume, (gl.constexpr(1), out, a_scale, w_scale, bias, a_ring, w_ring, out_ring, full, free, m, n, k,
                            a_scale_stride, w_scale_stride, height, width, CONSUMERS, WAVES, GROUP, PROMOTE)),
                (produce, (a, w, None, a_ring, w_ring, None, full, free, k, height, width, GROUP, 1)),
            ],
            [4, 1], [232, 40],
        )  # fmt: skip
