"""Warp-specialized Gluon kernel for Hopper: the GEMM of `scaled_gemm` for many rows.

    out[m, n] = sum over blocks of 128 of K:  (a[m, block] . w[n, block]) * a_scale[m, block] * w_scale[n / 128, block]

The producer and the order of tiles come from `warp_pipeline`. Each of the consumers, warpgroups of 4 warps, owns
`WAVES` times 64 rows of the tile. A wave is four tensor core instructions of K = 32 into fresh registers, whose result
is scaled and added in FP32: the promotion that Hopper's 14-bit accumulation requires. Consumers take turns at the
tensor cores, except for two consumers of one wave each, and for narrow tiles of the activation, whose waves are shorter
(K = 32 or 64): both are faster without turns.
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

from codegen.kernels.gluon_versions import reinterpret
from codegen.kernels.warp_pipeline import blocks_of, give_turn, produce, splits_of, store, tile_of, wait_for_turn


@gluon.jit
def _consume(  # type: ignore[no-untyped-def]
    WHO: gl.constexpr, out, w_scale, bias, a_ring, w_ring, s_ring, out_ring, full, free, n, k,
    w_scale_stride_n, w_scale_stride_k, depth, height, width,
    CONSUMERS: gl.constexpr, WAVES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Multiplies, promotes and stores the rows of consumer number WHO in all tiles of this block of threads."""
    STAGES: gl.constexpr = w_ring.shape[0]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    BOXES: gl.constexpr = a_ring.shape[0] // STAGES
    ROWS: gl.constexpr = a_ring.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 32])
    LINES: gl.constexpr = gl.SliceLayout(1, SUMS)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    # Position of this consumer's waves: the box in a stage, and the row in the box.
    BOX: gl.constexpr = WHO * WAVES * 64 // ROWS
    ROW: gl.constexpr = WHO * WAVES * 64 % ROWS
    NEXT: gl.constexpr = (WHO + 1) % CONSUMERS
    # Narrow tiles of the activation: steps inside a stage, each with its own scale.
    SUBS: gl.constexpr = s_ring.shape[0] // a_ring.shape[0]
    DEPTH: gl.constexpr = 128 // SUBS
    BUFFERS: gl.constexpr = out_ring.shape[0] // CONSUMERS
    TURNS: gl.constexpr = CONSUMERS * WAVES > 2 and SUBS == 1
    scales = reinterpret(s_ring, gl.float32, [STAGES * BOXES * SUBS, ROWS], FLAT)
    tiles = height * width
    turn = 0
    if TURNS and WHO == CONSUMERS - 1:
        give_turn(NEXT)
    for tile in range(gl.program_id(0), tiles * splits_of(k, depth), gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile if depth is None else tile % tiles, height, width, GROUP)
        split, first_block, blocks = blocks_of(tile, tiles, k, depth)
        total0 = gl.zeros([64, BLOCK_N], gl.float32, SUMS)
        if WAVES == 2:
            total1 = gl.zeros([64, BLOCK_N], gl.float32, SUMS)
        part = gl.zeros([64, BLOCK_N], gl.float32, SUMS)
        w_scales = w_scale + (tile_n * BLOCK_N // 128).to(gl.int64) * w_scale_stride_n + first_block * w_scale_stride_k
        w_next = gl.load(w_scales)
        for block in range(blocks):
            stage = turn % STAGES
            place = stage * BOXES + BOX
            w_now = w_next
            w_next = gl.load(w_scales + gl.minimum(block + 1, blocks - 1) * w_scale_stride_k)  # one block ahead
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            for sub in gl.static_range(SUBS):
                left = a_ring.index(place).slice(sub * DEPTH, DEPTH, 1)
                right = w_ring.index(stage).slice(sub * DEPTH, DEPTH, 1).permute((1, 0))
                scale = scales.index(place * SUBS + sub)
                if TURNS:
                    wait_for_turn(WHO)
                part = warpgroup_mma(left.slice(ROW, 64), right, part, use_acc=False, is_async=True)
                if TURNS:
                    give_turn(NEXT)
                scale0 = scale.slice(ROW, 64).load(LINES)
                if WAVES == 2:
                    scale1 = scale.slice(ROW + 64, 64).load(LINES)
                part = warpgroup_mma_wait(0, deps=(part,))
                if WAVES == 1 and sub == SUBS - 1:
                    mbarrier.arrive(free.index(stage), count=1)
                total0 += part * (scale0 * w_now)[:, None]
                # The second wave must not start before this promotion is done, nor the next step's before the second
                # wave's promotion: registers suffice for one `part`, and waiting on a sum enforces the order.
                total0 = warpgroup_mma_wait(0, deps=(total0,))
                if WAVES == 2:
                    if TURNS:
                        wait_for_turn(WHO)
                    part = warpgroup_mma(left.slice(ROW + 64, 64), right, part, use_acc=False, is_async=True)
                    if TURNS:
                        give_turn(NEXT)
                    part = warpgroup_mma_wait(0, deps=(part,))
                    if sub == SUBS - 1:
                        mbarrier.arrive(free.index(stage), count=1)
                    total1 += part * (scale1 * w_now)[:, None]
                    total1 = warpgroup_mma_wait(0, deps=(total1,))
            turn += 1
        row = ((split * height + tile_m) * CONSUMERS + WHO) * WAVES * 64
        first, last = out_ring.index(WHO * BUFFERS), out_ring.index((WHO + 1) * BUFFERS - 1)
        store(out, first, total0, row, tile_n * BLOCK_N, bias, n, BUFFERS - 1)
        if WAVES == 2:
            store(out, last, total1, row + 64, tile_n * BLOCK_N, bias, n, BUFFERS - 1)
    tma.store_wait(0)
    if TURNS and WHO == 0:
        wait_for_turn(WHO)  # every turn that was passed is consumed


@gluon.jit(do_not_specialize=["m", "depth"])
def warp_gemm(  # type: ignore[no-untyped-def]
    a, w, out, a_scale, w_scale, bias, m, n, k, w_scale_stride_n, w_scale_stride_k, depth,
    CONSUMERS: gl.constexpr, WAVES: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, SPAN: gl.constexpr,
    SUBS: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """out[m, n] of a[m, k] and w[n, k], all three as tensor descriptors, on a grid of any size.

    Descriptor loads outside a tensor return zero; descriptor stores outside it are dropped.

    Args:
        a: float8e4nv descriptor; its block is [BLOCK_M, 128], or [64, 128] if BLOCK_M is not a power of two.
        w: float8e4nv descriptor, block [BLOCK_N, 128]; BLOCK_N divides 128: a tile has one weight scale a block.
        out: bfloat16, float16 or float32 descriptor, block [64, BLOCK_N].
        a_scale: float32 descriptor of the transposed scales [ceil(k SUBS / (128 SPAN)), m], block [1, a's rows].
        w_scale: float32 [ceil(n / 128), ceil(k / 128)], any strides.
        bias: [n] in any floating dtype, or None.
        depth: Blocks of K per split; the output holds the splits as rows of tiles, one split below the other. None if
            K is not split.
        CONSUMERS: Warpgroups that multiply, 1 to 3.
        WAVES: Units of 64 rows that each consumer owns; BLOCK_M is 64 CONSUMERS WAVES.
        STAGES: Blocks of K in shared memory at once.
        GROUP: Consecutive rows of tiles.
        SPAN: Blocks of K that share a scale of the activation.
        SUBS: Tiles of the activation in a block of K, each with a scale; 1, 2 or 4, and then SPAN is 1.
        BUFFERS: Output buffers of 64 rows for each consumer; one, or WAVES.
    """
    BLOCK_M: gl.constexpr = CONSUMERS * WAVES * 64
    BLOCK_N: gl.constexpr = w.block_shape[0]
    ROWS: gl.constexpr = a.block_shape[0]
    BOXES: gl.constexpr = BLOCK_M // ROWS
    gl.static_assert(128 % BLOCK_N == 0 and BLOCK_M % ROWS == 0)
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES * BOXES, ROWS, 128], a.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, BLOCK_N, 128], w.layout)
    s_ring = gl.allocate_shared_memory(gl.float32, [STAGES * BOXES * SUBS, 1, ROWS], a_scale.layout)
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
                (_consume, (gl.constexpr(0), out, w_scale, bias, a_ring, w_ring, s_ring, out_ring, full, free, n, k,
                            w_scale_stride_n, w_scale_stride_k, depth, height, width, CONSUMERS, WAVES, GROUP)),
                (_consume, (gl.constexpr(1), out, w_scale, bias, a_ring, w_ring, s_ring, out_ring, full, free, n, k,
                            w_scale_stride_n, w_scale_stride_k, depth, height, width, CONSUMERS, WAVES, GROUP)),
                (_consume, (gl.constexpr(2), out, w_scale, bias, a_ring, w_ring, s_ring, out_ring, full, free, n, k,
                            w_scale_stride_n, w_scale_stride_k, depth, height, width, CONSUMERS, WAVES, GROUP)),
                (produce, (a, w, a_scale, a_ring, w_ring, s_ring, full, free, k, height, width, GROUP, SPAN, depth)),
            ],
            [4, 4, 1], [160, 160, 32],
        )  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), out, w_scale, bias, a_ring, w_ring, s_ring, out_ring, full, free, n, k,
                            w_scale_stride_n, w_scale_stride_k, depth, height, width, CONSUMERS, WAVES, GROUP)),
                (_consume, (gl.constexpr(1), out, w_scale, bias, a_ring, w_ring, s_ring, out_ring, full, free, n, k,
                            w_scale_stride_n, w_scale_stride_k, depth, height, width, CONSUMERS, WAVES, GROUP)),
                (produce, (a, w, a_scale, a_ring, w_ring, s_ring, full, free, k, height, width, GROUP, SPAN, depth)),
            ],
            [4, 1], [232, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), out, w_scale, bias, a_ring, w_ring, s_ring, out_ring, full, free, n, k,
                            w_scale_stride_n, w_scale_stride_k, depth, height, width, CONSUMERS, WAVES, GROUP)),
                (produce, (a, w, a_scale, a_ring, w_ring, s_ring, full, free, k, height, width, GROUP, SPAN, depth)),
            ],
            [1], [40],
        )  # fmt: skip
