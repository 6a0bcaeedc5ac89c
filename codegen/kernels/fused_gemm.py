"""Warp-specialized Gluon kernel for Hopper: the GEMM of `warp_gemm`, an epilogue, and quantization of its result.

    y[m, n]   = bf16(sum over blocks of 128 of K: (a[m, block] . w[n, block]) * scales, + bias[n])
    out[m, n] = expression(y[m, n], others[m, n])    or, for a weight of two stacked parts, of y[m, n] and y[m, N + n]

The producer warp and the consumers work as in `warp_gemm`. A consumer rounds its sums, as the epilogue does first, and
passes them through shared memory to the finishers: warps that run the epilogue, quantize, and store while the consumers
multiply the next tile. So the tensor cores never wait for an epilogue, and it costs the consumers no registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from codegen.kernels.encoding import amax_of_keys, codes, magnitude_keys, quotients, scale_of
from codegen.kernels.gluon_versions import async_load, computed_here, reinterpret
from codegen.kernels.overlap import inputs_ready, let_next_start
from codegen.kernels.warp_pipeline import give_turn, tile_of, wait_for_turn


@gluon.jit
def _produce(  # type: ignore[no-untyped-def]
    a, w, a_scale, a_ring, w_ring, s_ring, full, free, n, k, height, first, width,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Fills the ring, stage after stage, for all tiles of this block of threads.

    The first stages' weights are loaded while the previous kernel may still run, unless the tile is so large that the
    registers of this warp do not suffice; then the weights are not what takes the time.
    """
    PARTS: gl.constexpr = w_ring.shape[0] // STAGES
    BLOCK_M: gl.constexpr = a_ring.shape[1]
    ROWS: gl.constexpr = a.block_shape[0]
    SCALES: gl.constexpr = a_scale.block_shape[1]
    BYTES: gl.constexpr = (ROWS + PARTS * 128) * 128 + SCALES * 4
    EARLY: gl.constexpr = PARTS * BLOCK_M < 256
    tile = gl.program_id(0)
    _, tile_n = tile_of(tile, height, width, GROUP)
    tile_n += first
    if EARLY:
        early = gl.where(tile < height * width, gl.minimum(gl.cdiv(k, 128), STAGES), 0)
        for turn in range(early):
            mbarrier.expect(full.index(turn), BYTES)
            for part in gl.static_range(PARTS):
                place = turn * PARTS + part
                async_load(w, [part * n + tile_n * 128, turn * 128], full.index(turn), w_ring.index(place))
    let_next_start()
    inputs_ready()
    turn = 0
    for tile in range(gl.program_id(0), height * width, gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, height, width, GROUP)
        tile_n += first
        for block in range(gl.cdiv(k, 128)):
            stage = turn % STAGES
            mbarrier.wait(free.index(stage), (turn // STAGES) & 1 ^ 1)
            bar = full.index(stage)
            new = True
            if EARLY:
                new = turn >= early
            mbarrier.expect(bar, BYTES, pred=new)
            row = tile_m * BLOCK_M
            async_load(a_scale, [block, row], bar, s_ring.index(stage).slice(0, SCALES, 1))
            async_load(a, [row, block * 128], bar, a_ring.index(stage).slice(0, ROWS))
            for part in gl.static_range(PARTS):
                place = stage * PARTS + part
                async_load(w, [part * n + tile_n * 128, block * 128], bar, w_ring.index(place), pred=new)
            turn += 1


@gluon.jit
def _biased(total, bias, columns, n, WHOLE: gl.constexpr):  # type: ignore[no-untyped-def]
    """Sums plus the bias of their columns."""
    if bias is not None:
        added = gl.load(bias + columns) if WHOLE else gl.load(bias + columns, mask=columns < n, other=0.0)
        total += added.to(gl.float32)[None, :]
    return total


@gluon.jit
def _consume(  # type: ignore[no-untyped-def]
    WHO: gl.constexpr, w_scale, bias, a_ring, w_ring, s_ring, hand, full, free, ready, taken, n, k,
    w_scale_stride_n, w_scale_stride_k, height, first, width,
    WAVES: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Multiplies and promotes the units of consumer number WHO: 64 rows and one part of the weight each."""
    PARTS: gl.constexpr = w_ring.shape[0] // STAGES
    BLOCK_M: gl.constexpr = a_ring.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    LINES: gl.constexpr = gl.SliceLayout(1, SUMS)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    # The first and the last unit of this consumer, and the part and the row of each.
    FIRST: gl.constexpr = WHO * WAVES
    LAST: gl.constexpr = FIRST + WAVES - 1
    PART0: gl.constexpr = FIRST % PARTS
    PART1: gl.constexpr = LAST % PARTS
    ROW0: gl.constexpr = FIRST // PARTS * 64
    ROW1: gl.constexpr = LAST // PARTS * 64
    NEXT: gl.constexpr = 1 - WHO
    TURNS: gl.constexpr = WAVES == 2
    scales = reinterpret(s_ring, gl.float32, [STAGES, BLOCK_M], FLAT)
    blocks = gl.cdiv(k, 128)
    part_stride = 0
    if PARTS == 2:
        part_stride = (n // 128).to(gl.int64) * w_scale_stride_n
    stage = 0
    phase = 0
    even = 0
    if TURNS and WHO == 1:
        give_turn(NEXT)
    for tile in range(gl.program_id(0), height * width, gl.num_programs(0)):
        _, tile_n = tile_of(tile, height, width, GROUP)
        tile_n += first
        total0 = gl.zeros([64, 128], gl.float32, SUMS)
        if WAVES == 2:
            total1 = gl.zeros([64, 128], gl.float32, SUMS)
        part = gl.zeros([64, 128], gl.float32, SUMS)
        w_scales = w_scale + tile_n.to(gl.int64) * w_scale_stride_n
        next0 = gl.load(w_scales + PART0 * part_stride)
        next1 = next0
        if PART1 != PART0:
            next1 = gl.load(w_scales + PART1 * part_stride)
        for block in range(blocks):
            now0, now1 = next0, next1
            step = gl.minimum(block + 1, blocks - 1) * w_scale_stride_k  # one block ahead
            next0 = gl.load(w_scales + PART0 * part_stride + step)
            next1 = next0
            if PART1 != PART0:
                next1 = gl.load(w_scales + PART1 * part_stride + step)
            mbarrier.wait(full.index(stage), phase)
            if TURNS:
                wait_for_turn(WHO)
            left = a_ring.index(stage).slice(ROW0, 64)
            right = w_ring.index(stage * PARTS + PART0).permute((1, 0))
            part = warpgroup_mma(left, right, part, use_acc=False, is_async=True)
            if TURNS:
                give_turn(NEXT)
            scale0 = scales.index(stage).slice(ROW0, 64).load(LINES)
            scale1 = scale0
            if ROW1 != ROW0:
                scale1 = scales.index(stage).slice(ROW1, 64).load(LINES)
            part = warpgroup_mma_wait(0, deps=(part,))
            if WAVES == 1:
                mbarrier.arrive(free.index(stage), count=1)
            # An explicit multiply-add, because fusion is disabled in this kernel for the epilogue's sake.
            total0 = gl.fma(part, (scale0 * now0)[:, None], total0)
            # Registers suffice for one `part`: waiting on a sum enforces the order, as in `warp_gemm`.
            total0 = warpgroup_mma_wait(0, deps=(total0,))
            if WAVES == 2:
                wait_for_turn(WHO)
                left = a_ring.index(stage).slice(ROW1, 64)
                right = w_ring.index(stage * PARTS + PART1).permute((1, 0))
                part = warpgroup_mma(left, right, part, use_acc=False, is_async=True)
                give_turn(NEXT)
                part = warpgroup_mma_wait(0, deps=(part,))
                mbarrier.arrive(free.index(stage), count=1)
                total1 = gl.fma(part, (scale1 * now1)[:, None], total1)
                total1 = warpgroup_mma_wait(0, deps=(total1,))
            stage += 1
            phase ^= (stage == STAGES).to(gl.int32)
            stage = gl.where(stage == STAGES, 0, stage)
        columns = tile_n * 128 + gl.arange(0, 128, gl.SliceLayout(0, SUMS))
        total0 = _biased(total0, bias, PART0 * n + columns, PARTS * n, WHOLE)
        mbarrier.wait(taken.index(FIRST // PARTS), even ^ 1)
        hand.index(FIRST).store(total0.to(hand.dtype))
        if WAVES == 2:
            if ROW1 != ROW0:
                mbarrier.arrive(ready.index(FIRST // PARTS), count=1)
                mbarrier.wait(taken.index(LAST // PARTS), even ^ 1)
            total1 = _biased(total1, bias, PART1 * n + columns, PARTS * n, WHOLE)
            hand.index(LAST).store(total1.to(hand.dtype))
        mbarrier.arrive(ready.index(LAST // PARTS), count=1)
        even ^= 1
    if TURNS and WHO == 0:
        wait_for_turn(WHO)  # every turn that was passed is consumed


@gluon.jit
def _operand(x, stride, rows, columns, inside):  # type: ignore[no-untyped-def]
    """Elements of an epilogue operand; of a vector, whose stride is 0, the same in every row."""
    return gl.load(x + rows.to(gl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@gluon.jit
def _finish(  # type: ignore[no-untyped-def]
    hand, ready, taken, x0, x0_stride, x1, x1_stride, out, out_scale, m, n, scale_stride_m, scale_stride_k,
    height, first, width, EXPRESSION: gl.constexpr, PARTS: gl.constexpr, GROUP: gl.constexpr, WHOLE: gl.constexpr,
    AMAX_FLOOR: gl.constexpr, TOP: gl.constexpr, RECIPROCAL: gl.constexpr, UE8M0: gl.constexpr,
):  # fmt: skip
    """Runs the epilogue on the consumers' sums, a few rows at a time, and stores or quantizes the result."""
    UNITS: gl.constexpr = hand.shape[0]
    # A thread holds 16 or 8 columns of one row at a time, as many as its registers allow.
    LENGTH: gl.constexpr = 16 if x1 is None else 8
    LANES: gl.constexpr = gl.BlockedLayout([1, LENGTH], [LENGTH // 4, 128 // LENGTH], [4, 1], [1, 0])
    STEP: gl.constexpr = LENGTH  # rows at a time; the swizzle pattern in shared memory has 8 rows
    SLICES: gl.constexpr = 64 // STEP
    STEPS: gl.constexpr = UNITS // PARTS * SLICES
    taking = reinterpret(hand, hand.dtype, [UNITS * SLICES, STEP, 128], hand.layout)
    if x0 is not None:  # the sums come later than the producer's wait
        inputs_ready()
    own_line = gl.arange(0, STEP, gl.SliceLayout(1, LANES))
    lane = gl.arange(0, 128, gl.SliceLayout(0, LANES))
    even = 0
    for tile in range(gl.program_id(0), height * width, gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, height, width, GROUP)
        tile_n += first
        columns = tile_n * 128 + lane
        line = computed_here(own_line)
        begin = tile_m * (UNITS // PARTS * 64)
        there = (columns < n)[None, :]
        end = gl.minimum(begin + UNITS // PARTS * 64, m)
        # Loads from global memory are issued one step ahead.
        rows = begin + line
        inside = (rows < m)[:, None] & there
        if x0 is not None:
            later0 = _operand(x0, x0_stride, rows, columns, inside)
        if x1 is not None:
            later1 = _operand(x1, x1_stride, rows, columns, inside)
        for step in range(STEPS):
            group = step // SLICES
            rows = begin + step * STEP + line
            inside = (rows < m)[:, None] & there
            now0, now1 = None, None
            if x0 is not None:
                now0 = later0
                later0 = _operand(x0, x0_stride, rows + STEP, columns, (rows + STEP < end)[:, None] & there)
            if x1 is not None:
                now1 = later1
                later1 = _operand(x1, x1_stride, rows + STEP, columns, (rows + STEP < end)[:, None] & there)
            if step % SLICES == 0:
                mbarrier.wait(ready.index(group), even)
            place = group * PARTS * SLICES + step % SLICES
            y0 = taking.index(place).load(LANES)
            y1 = None
            if PARTS == 2:
                y1 = taking.index(place + SLICES).load(LANES)
            (result,) = EXPRESSION(x0=now0, x1=now1, y0=y0, y1=y1)
            if step % SLICES == SLICES - 1:
                mbarrier.arrive(taken.index(group), count=1)
            places = out + rows.to(gl.int64)[:, None] * n + columns[None, :]
            if out_scale is None:
                gl.store(places, result.to(out.dtype.element_ty), mask=inside)
            else:
                if not WHOLE:
                    result = gl.where(there, result, 0.0)
                s = scale_of(amax_of_keys(gl.max(magnitude_keys(result), axis=1)), AMAX_FLOOR, TOP, UE8M0)
                scaled = quotients(result, s[:, None], RECIPROCAL or UE8M0)
                gl.store(places, codes(scaled, TOP, out.dtype.element_ty), mask=inside)
                lines = out_scale + rows.to(gl.int64) * scale_stride_m + tile_n.to(gl.int64) * scale_stride_k
                gl.store(lines, s, mask=rows < m)
        even ^= 1


@gluon.jit(do_not_specialize=["m", "scale_stride_k", "first", "width"])
def fused_gemm(  # type: ignore[no-untyped-def]
    a, w, a_scale, w_scale, bias, x0, x1, out, out_scale, m, n, k, w_scale_stride_n, w_scale_stride_k,
    x0_stride, x1_stride, scale_stride_m, scale_stride_k, first, width,
    EXPRESSION: gl.constexpr, PARTS: gl.constexpr, HANDED: gl.constexpr,
    WAVES: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, WHOLE: gl.constexpr,
    AMAX_FLOOR: gl.constexpr, TOP: gl.constexpr, RECIPROCAL: gl.constexpr, UE8M0: gl.constexpr,
):  # fmt: skip
    """Columns of tiles of out[m, n], of a[m, k] and w[PARTS n, k], on a grid of any size.

    Compiled with `enable_fp_fusion=False`, so that the epilogue rounds as written. Descriptor loads outside a tensor
    return zero; nothing is written beyond m or n.

    Args:
        a: float8e4nv descriptor, block [rows, 128]. A tile has 128 WAVES / PARTS rows; fewer are loaded if m is no
            larger than the block, because the copy engine is slow at rows outside the tensor. The others then have
            any values, and are not stored.
        w: float8e4nv descriptor, block [128, 128].
        a_scale: float32 descriptor of the transposed scales [ceil(k / 128), m], block [1, rows of a's block], at least
            32 of them.
        w_scale: float32 [PARTS ceil(n / 128), ceil(k / 128)], any strides.
        bias: [PARTS n] in any floating dtype, or None.
        x0: An operand of the epilogue: [m, n] in any floating dtype, rows `x0_stride` elements apart, columns
            contiguous; [n] with `x0_stride` 0; or None. The same holds for `x1`, which is None if x0 is.
        out: [m, n], contiguous: of the expression's dtype, or float8e4nv, float8e5 or int8 with a scale.
        out_scale: float32 [m, ceil(n / 128)], any strides, or None.
        first: The first column of tiles; a tile has 128 columns.
        width: The number of columns of tiles.
        EXPRESSION: A function of `codegen.fused_expressions` over sums in HANDED.
        PARTS: Stacked parts of the weight: 1, or 2, which are a multiple of 128 rows each.
        HANDED: The element type that sums are rounded to.
        WAVES: Units of 64 rows and one part that each of the two consumers owns, 1 or 2.
        STAGES: Blocks of K in shared memory at once.
        GROUP: Consecutive rows of tiles.
        WHOLE: n is a multiple of 128.
        AMAX_FLOOR: As in `quantize_tiles`; likewise `TOP`, `RECIPROCAL` and `UE8M0`.
    """
    UNITS: gl.constexpr = 2 * WAVES
    BLOCK_M: gl.constexpr = UNITS // PARTS * 64
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0])
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES, BLOCK_M, 128], a.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES * PARTS, 128, 128], w.layout)
    s_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], a_scale.layout)
    hand = gl.allocate_shared_memory(HANDED, [UNITS, 64, 128], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [UNITS // PARTS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [UNITS // PARTS, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    for group in gl.static_range(UNITS // PARTS):
        mbarrier.init(ready.index(group), count=1 if WAVES == 2 else PARTS)
        mbarrier.init(taken.index(group), count=1)
    fence_async_shared()
    height = gl.cdiv(m, BLOCK_M)
    # Argument tuples must be written in the call: in a variable, their constants would become tensors.
    gl.warp_specialize(
        [
            (_consume, (gl.constexpr(0), w_scale, bias, a_ring, w_ring, s_ring, hand, full, free, ready, taken, n, k,
                        w_scale_stride_n, w_scale_stride_k, height, first, width, WAVES, STAGES, GROUP, WHOLE)),
            (_consume, (gl.constexpr(1), w_scale, bias, a_ring, w_ring, s_ring, hand, full, free, ready, taken, n, k,
                        w_scale_stride_n, w_scale_stride_k, height, first, width, WAVES, STAGES, GROUP, WHOLE)),
            (_finish, (hand, ready, taken, x0, x0_stride, x1, x1_stride, out, out_scale, m, n, scale_stride_m,
                       scale_stride_k, height, first, width, EXPRESSION, PARTS, GROUP, WHOLE,
                       AMAX_FLOOR, TOP, RECIPROCAL, UE8M0)),
            (_produce, (a, w, a_scale, a_ring, w_ring, s_ring, full, free, n, k, height, first, width, STAGES, GROUP)),
        ],
        [4, 4, 1], [208, 72, 24],
    )  # fmt: skip
