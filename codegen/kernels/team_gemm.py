"""Warp-specialized Gluon kernel for Hopper: the GEMM of `scaled_gemm` for few rows, with K divided inside a tile.

    out[m, n] = sum over blocks of 128 of K:  (a[m, block] . w[n, block]) * a_scale[m, block] * w_scale[n / 128, block]

A small tile is bound by latency: one warpgroup waits for its operands, for the tensor cores, and for its own promotion,
one after the other. Here a team of two or three consumers works on the same tile: they take alternate blocks of K, all
from one ring of stages, so that while one waits, the others work. At the end of a tile, the others' sums go through
shared memory to the first consumer, which adds them in a fixed order and stores the result: no second kernel as for
splits of K, and the same bits on every run. The producer and the order of tiles come from `warp_pipeline`.

Each stage belongs to one consumer. If it changed hands, a consumer could wait for a later phase of the stage's barrier
while an earlier one, which it never waited for, is not complete, and take the one for the other. So the number of
stages is a multiple of the team, and K is extended with blocks outside the tensors, which load as zeros.
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
from codegen.kernels.warp_pipeline import produce, store, tile_of


@gluon.jit
def _consume(  # type: ignore[no-untyped-def]
    WHO: gl.constexpr, TEAM: gl.constexpr, out, w_scale, bias, a_ring, w_ring, s_ring, out_buffer, sums, full, free,
    given, taken, n, k, w_scale_stride_n, w_scale_stride_k, height, width, GROUP: gl.constexpr,
):  # fmt: skip
    """Multiplies and promotes every TEAM-th block of K, from number WHO, of all tiles of this block of threads."""
    STAGES: gl.constexpr = w_ring.shape[0]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 32])
    LINES: gl.constexpr = gl.SliceLayout(1, SUMS)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    scales = reinterpret(s_ring, gl.float32, [STAGES, 64], FLAT)
    last = gl.cdiv(k, 128) - 1
    turn, parity = WHO, 0
    for tile in range(gl.program_id(0), height * width, gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, height, width, GROUP)
        total = gl.zeros([64, BLOCK_N], gl.float32, SUMS)
        part = gl.zeros([64, BLOCK_N], gl.float32, SUMS)
        w_scales = w_scale + (tile_n * BLOCK_N // 128).to(gl.int64) * w_scale_stride_n
        w_next = gl.load(w_scales + gl.minimum(WHO, last) * w_scale_stride_k)
        for block in range(WHO, gl.cdiv(k, 128 * TEAM) * TEAM, TEAM):
            stage = turn % STAGES
            w_now = w_next
            w_next = gl.load(w_scales + gl.minimum(block + TEAM, last) * w_scale_stride_k)  # one step ahead
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            right = w_ring.index(stage).permute((1, 0))
            part = warpgroup_mma(a_ring.index(stage), right, part, use_acc=False, is_async=True)
            scale = scales.index(stage).load(LINES)
            part = warpgroup_mma_wait(0, deps=(part,))
            mbarrier.arrive(free.index(stage), count=1)
            total += part * (scale * w_now)[:, None]
            # The next block must not start before this promotion is done: registers suffice for one `part`.
            total = warpgroup_mma_wait(0, deps=(total,))
            turn += TEAM
        if WHO > 0:
            mbarrier.wait(taken.index(WHO - 1), parity ^ 1)
            sums.index(WHO - 1).store(total)
            mbarrier.arrive(given.index(WHO - 1), count=1)
        else:
            for other in gl.static_range(TEAM - 1):
                mbarrier.wait(given.index(other), parity)
                total += sums.index(other).load(SUMS)
                mbarrier.arrive(taken.index(other), count=1)
            store(out, out_buffer, total, tile_m * 64, tile_n * BLOCK_N, bias, n)
        parity ^= 1
    if WHO == 0:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["m"])
def team_gemm(  # type: ignore[no-untyped-def]
    a, w, out, a_scale, w_scale, bias, m, n, k, w_scale_stride_n, w_scale_stride_k,
    TEAM: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, SPAN: gl.constexpr,
):  # fmt: skip
    """out[m, n] of a[m, k] and w[n, k], all three as tensor descriptors, on a grid of any size.

    Descriptor loads outside a tensor return zero; descriptor stores outside it are dropped.

    Args:
        a: float8e4nv descriptor, block [64, 128].
        w: float8e4nv descriptor, block [BLOCK_N, 128]; BLOCK_N divides 128: a tile has one weight scale a block.
        out: bfloat16, float16 or float32 descriptor, block [64, BLOCK_N].
        a_scale: float32 descriptor of the transposed scales [ceil(k / (128 SPAN)), m], block [1, 64].
        w_scale: float32 [ceil(n / 128), ceil(k / 128)], any strides.
        bias: [n] in any floating dtype, or None.
        TEAM: Warpgroups that take alternate blocks of K, 2 or 3.
        STAGES: Blocks of K in shared memory at once, a multiple of TEAM.
        GROUP: Consecutive rows of tiles.
        SPAN: Blocks of K that share a scale of the activation.
    """
    BLOCK_N: gl.constexpr = w.block_shape[0]
    # Eight rows of a warp's sums fall into different banks.
    BANKS: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=BLOCK_N // 8, order=[1, 0])
    gl.static_assert(128 % BLOCK_N == 0 and a.block_shape[0] == 64 and STAGES % TEAM == 0)
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES, 64, 128], a.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, BLOCK_N, 128], w.layout)
    s_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], a_scale.layout)
    out_buffer = gl.allocate_shared_memory(out.dtype, [64, BLOCK_N], out.layout)
    sums = gl.allocate_shared_memory(gl.float32, [TEAM - 1, 64, BLOCK_N], BANKS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [TEAM - 1, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [TEAM - 1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    for other in gl.static_range(TEAM - 1):
        mbarrier.init(given.index(other), count=1)
        mbarrier.init(taken.index(other), count=1)
    fence_async_shared()
    height, width = gl.cdiv(m, 64), gl.cdiv(n, BLOCK_N)
    whole = gl.cdiv(k, 128 * TEAM) * 128 * TEAM
    # Argument tuples must be written in the call: in a variable, their constants would become tensors.
    if TEAM == 3:
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), TEAM, out, w_scale, bias, a_ring, w_ring, s_ring, out_buffer, sums, full,
                            free, given, taken, n, k, w_scale_stride_n, w_scale_stride_k, height, width, GROUP)),
                (_consume, (gl.constexpr(1), TEAM, out, w_scale, bias, a_ring, w_ring, s_ring, out_buffer, sums, full,
                            free, given, taken, n, k, w_scale_stride_n, w_scale_stride_k, height, width, GROUP)),
                (_consume, (gl.constexpr(2), TEAM, out, w_scale, bias, a_ring, w_ring, s_ring, out_buffer, sums, full,
                            free, given, taken, n, k, w_scale_stride_n, w_scale_stride_k, height, width, GROUP)),
                (produce, (a, w, a_scale, a_ring, w_ring, s_ring, full, free, whole, height, width, GROUP, SPAN)),
            ],
            [4, 4, 1], [152, 152, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), TEAM, out, w_scale, bias, a_ring, w_ring, s_ring, out_buffer, sums, full,
                            free, given, taken, n, k, w_scale_stride_n, w_scale_stride_k, height, width, GROUP)),
                (_consume, (gl.constexpr(1), TEAM, out, w_scale, bias, a_ring, w_ring, s_ring, out_buffer, sums, full,
                            free, given, taken, n, k, w_scale_stride_n, w_scale_stride_k, height, width, GROUP)),
                (produce, (a, w, a_scale, a_ring, w_ring, s_ring, full, free, whole, height, width, GROUP, SPAN)),
            ],
            [4, 1], [232, 40],
        )  # fmt: skip
