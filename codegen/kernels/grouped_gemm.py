"""Gluon kernels for Hopper: one matmul for each group of rows, such as the tokens of one expert.

    out[t, n] = sum over blocks of 128 of K:  (x[t, block] . w[g, n, block]) * x_scale[t, block] * w_scale[g, n, block]

where g is the group of row t, and 128 rows of its weight share a scale. Group bounds are known on the device only: one
block of threads stays on each multiprocessor, all of them build the same table of groups in shared memory, and each
finds its next tile there. A group may begin at any row. Its first tile begins at a multiple of 4 rows, because the copy
engine reads their scales from multiples of 16 bytes only; rows of a tile outside its group are multiplied but never
written.

`grouped_wide` has the rows as left operand of the tensor cores, 64 of them for each consumer; a consumer whose rows lie
after the group skips the tile. `grouped_narrow` is for groups of few rows, where weights dominate memory traffic: the
weights are the left operand, the rows the right one. A producer warp fills a ring of shared memory, as in
`warp_pipeline`, and starts the next tile while this one is stored; sums are promoted as in `warp_gemm`.
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

from codegen.kernels.gluon_versions import async_load, reinterpret
from codegen.kernels.group_table import entry, find_tile, list_groups, tiles_in
from codegen.kernels.overlap import inputs_ready, let_next_start
from codegen.kernels.warp_pipeline import store


@gluon.jit
def _produce(  # type: ignore[no-untyped-def]
    x, w, x_scale, x_ring, w_ring, s_ring, full, free, table, n, k, width, ORDER: gl.constexpr
):
    """Fills the ring, stage by stage, for all tiles of this block of threads; skips boxes after the group."""
    STAGES: gl.constexpr = w_ring.shape[0]
    BOXES: gl.constexpr = x_ring.shape[0] // STAGES
    ROWS: gl.constexpr = x_ring.shape[1]
    SCALES: gl.constexpr = s_ring.shape[2]
    turn = 0
    for tile in range(gl.program_id(0), tiles_in(table, width), gl.num_programs(0)):
        group, row, tile_n, _, end = find_tile(table, tile, width, BOXES * ROWS, ORDER)
        column = group * n + tile_n * 128
        boxes = gl.minimum(gl.cdiv(end - row, ROWS), BOXES)
        for block in range(gl.cdiv(k, 128)):
            stage = turn % STAGES
            mbarrier.wait(free.index(stage), (turn // STAGES) & 1 ^ 1)
            bar = full.index(stage)
            for count in gl.static_range(1, BOXES + 1):
                mbarrier.expect(bar, 128 * 128 + count * (ROWS * 128 + SCALES * 4), pred=boxes == count)
            async_load(w, [column, block * 128], bar, w_ring.index(stage))
            for box in gl.static_range(BOXES):
                place, there = stage * BOXES + box, box < boxes
                source = row + box * ROWS
                async_load(x_scale, [block, source], bar, s_ring.index(place), pred=there)
                async_load(x, [source, block * 128], bar, x_ring.index(place), pred=there)
            turn += 1


@gluon.jit
def _clear(  # type: ignore[no-untyped-def]
    WHO: gl.constexpr, out, table, groups, rows, n, CONSUMERS: gl.constexpr
):
    """Writes zeros to the rows after the last group."""
    LANES: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    first = entry(table, 1, groups - 1) + gl.program_id(0) * CONSUMERS + WHO
    for row in range(first, rows, gl.num_programs(0) * CONSUMERS):
        for column in range(0, n, 1024):
            columns = column + gl.arange(0, 1024, LANES)
            gl.store(out + row.to(gl.int64) * n + columns, gl.zeros_like(columns).to(out.dtype.element_ty), columns < n)


@gluon.jit
def _wide_consumer(  # type: ignore[no-untyped-def]
    WHO: gl.constexpr, out_box, out, w_scale, x_ring, w_ring, s_ring, out_ring, full, free, table,
    groups, rows, n, k, width, capacity, CONSUMERS: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """Multiplies, promotes and stores 64 rows of each tile of this block of threads."""
    STAGES: gl.constexpr = w_ring.shape[0]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    BOXES: gl.constexpr = x_ring.shape[0] // STAGES
    ROWS: gl.constexpr = x_ring.shape[1]
    # Position of this consumer's rows: the box in a stage, and the row in the box.
    BOX: gl.constexpr = WHO * 64 // ROWS
    ROW: gl.constexpr = WHO * 64 % ROWS
    scales = reinterpret(s_ring, gl.float32, [STAGES * BOXES, ROWS], FLAT)
    buffer = out_ring.index(WHO)
    blocks = gl.cdiv(k, 128)
    turn = 0
    for tile in range(gl.program_id(0), tiles_in(table, width), gl.num_programs(0)):
        group, row, tile_n, start, end = find_tile(table, tile, width, BOXES * ROWS, ORDER)
        row += WHO * 64
        if row < end:
            total = gl.zeros([64, 128], gl.float32, SUMS)
            part = gl.zeros([64, 128], gl.float32, SUMS)
            w_scales = w_scale + (group * width + tile_n).to(gl.int64) * blocks
            w_next = gl.load(w_scales)
            for block in range(blocks):
                stage = turn % STAGES
                w_now = w_next
                w_next = gl.load(w_scales + gl.minimum(block + 1, blocks - 1))  # one block ahead
                mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
                place = stage * BOXES + BOX
                left, right = x_ring.index(place).slice(ROW, 64), w_ring.index(stage).permute((1, 0))
                part = warpgroup_mma(left, right, part, use_acc=False, is_async=True)
                scale = scales.index(place).slice(ROW, 64).load(gl.SliceLayout(1, SUMS))
                part = warpgroup_mma_wait(0, deps=(part,))
                mbarrier.arrive(free.index(stage), count=1)
                total += part * (scale * w_now)[:, None]
                total = warpgroup_mma_wait(0, deps=(total,))  # enforces the order, see `warp_gemm`
                turn += 1
            if start <= row and row + 64 <= end:
                store(out_box, buffer, total, row, tile_n * 128, None, n)
            else:
                _store_some(out, buffer, total, row, start, end, tile_n * 128, n)
        else:
            for _ in range(blocks):
                stage = turn % STAGES
                mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
                mbarrier.arrive(free.index(stage), count=1)
                turn += 1
    tma.store_wait(0)
    if capacity is None:
        _clear(WHO, out, table, groups, rows, n, CONSUMERS)


@gluon.jit
def _store_some(out, buffer, total, row, start, end, column, n):  # type: ignore[no-untyped-def]
    """Writes only the rows of a 64-row tile that belong to the group, which the copy engine cannot do."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    tma.store_wait(0)  # the previous rows have left the buffer
    buffer.store(total.to(out.dtype.element_ty))
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, WIDE))
    columns = column + gl.arange(0, 128, gl.SliceLayout(0, WIDE))
    places = out + rows.to(gl.int64)[:, None] * n + columns[None, :]
    ours = (start <= rows) & (rows < end)
    gl.store(places, buffer.load(WIDE), mask=ours[:, None] & (columns < n)[None, :])


@gluon.jit
def _narrow_consumer(  # type: ignore[no-untyped-def]
    WHO: gl.constexpr, out, w_scale, x_ring, w_ring, s_ring, full, free, table,
    groups, rows, n, k, width, capacity, ORDER: gl.constexpr,
):  # fmt: skip
    """Multiplies, promotes and stores 64 columns of each tile of this block of threads."""
    STAGES: gl.constexpr = w_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    SCALES: gl.constexpr = s_ring.shape[2]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 32])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    scales = reinterpret(s_ring, gl.float32, [STAGES, SCALES], FLAT)
    blocks = gl.cdiv(k, 128)
    turn = 0
    for tile in range(gl.program_id(0), tiles_in(table, width), gl.num_programs(0)):
        group, row, tile_n, start, end = find_tile(table, tile, width, BLOCK_M, ORDER)
        total = gl.zeros([64, BLOCK_M], gl.float32, SUMS)
        part = gl.zeros([64, BLOCK_M], gl.float32, SUMS)
        w_scales = w_scale + (group * width + tile_n).to(gl.int64) * blocks
        w_next = gl.load(w_scales)
        for block in range(blocks):
            stage = turn % STAGES
            w_now = w_next
            w_next = gl.load(w_scales + gl.minimum(block + 1, blocks - 1))  # one block ahead
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            left, right = w_ring.index(stage).slice(WHO * 64, 64), x_ring.index(stage).permute((1, 0))
            part = warpgroup_mma(left, right, part, use_acc=False, is_async=True)
            scale = scales.index(stage).slice(0, BLOCK_M).load(gl.SliceLayout(0, SUMS)) * w_now
            part = warpgroup_mma_wait(0, deps=(part,))
            mbarrier.arrive(free.index(stage), count=1)
            total += part * scale[None, :]
            total = warpgroup_mma_wait(0, deps=(total,))  # enforces the order, see `warp_gemm`
            turn += 1
        columns = tile_n * 128 + WHO * 64 + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
        lines = row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, SUMS))
        places = out + lines.to(gl.int64)[None, :] * n + columns[:, None]
        ours = (start <= lines) & (lines < end)
        gl.store(places, total.to(out.dtype.element_ty), mask=ours[None, :] & (columns < n)[:, None])
    if capacity is None:
        _clear(WHO, out, table, groups, rows, n, 2)


@gluon.jit(do_not_specialize=["groups", "rows", "k", "capacity"])
def grouped_wide(  # type: ignore[no-untyped-def]
    x, w, out_box, x_scale, out, w_scale, offsets, groups, rows, n, k, capacity,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, ORDER: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """out[rows, n] of x[rows, k] and w[groups * n, k], on a grid of any size.

    Args:
        x: float8e4nv descriptor, block [64, 128] or [128, 128].
        w: float8e4nv descriptor, block [128, 128].
        out_box: bfloat16, float16 or float32 descriptor of the output, block [64, 128].
        x_scale: float32 descriptor of the transposed scales [ceil(k / 128), rows], block [1, rows of x's block].
        out: The output again, as a pointer: contiguous [rows, n].
        w_scale: float32 [groups, ceil(n / 128), ceil(k / 128)], contiguous.
        offsets: int32 [groups]: the end row of each group, or, with a capacity, the number of rows of each.
        capacity: None, or the number of rows of x reserved for each group; each group then begins at a multiple of it.
        CONSUMERS: Warpgroups that multiply, 2 or 3; a tile has 64 rows for each.
        STAGES: Blocks of K in shared memory at once.
        ORDER: Consecutive rows of tiles of one group.
        GROUPS: A power of two, at least `groups` and at least 32.
    """
    ROWS: gl.constexpr = x.block_shape[0]
    BOXES: gl.constexpr = CONSUMERS * 64 // ROWS
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * BOXES, ROWS, 128], x.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, 128, 128], w.layout)
    s_ring = gl.allocate_shared_memory(gl.float32, [STAGES * BOXES, 1, ROWS], x_scale.layout)
    out_ring = gl.allocate_shared_memory(out_box.dtype, [CONSUMERS, 64, 128], out_box.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=CONSUMERS)
    fence_async_shared()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    table = gl.allocate_shared_memory(gl.int32, [3, GROUPS], FLAT)
    let_next_start()
    inputs_ready()
    list_groups(offsets, table, groups, rows, capacity, CONSUMERS * 64)
    width = gl.cdiv(n, 128)
    # Argument tuples must be written in the call: in a variable, their constants would become tensors.
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_wide_consumer, (gl.constexpr(0), out_box, out, w_scale, x_ring, w_ring, s_ring, out_ring, full, free,
                                  table, groups, rows, n, k, width, capacity, CONSUMERS, ORDER)),
                (_wide_consumer, (gl.constexpr(1), out_box, out, w_scale, x_ring, w_ring, s_ring, out_ring, full, free,
                                  table, groups, rows, n, k, width, capacity, CONSUMERS, ORDER)),
                (_wide_consumer, (gl.constexpr(2), out_box, out, w_scale, x_ring, w_ring, s_ring, out_ring, full, free,
                                  table, groups, rows, n, k, width, capacity, CONSUMERS, ORDER)),
                (_produce, (x, w, x_scale, x_ring, w_ring, s_ring, full, free, table, n, k, width, ORDER)),
            ],
            [4, 4, 1], [160, 160, 32],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_wide_consumer, (gl.constexpr(0), out_box, out, w_scale, x_ring, w_ring, s_ring, out_ring, full, free,
                                  table, groups, rows, n, k, width, capacity, CONSUMERS, ORDER)),
                (_wide_consumer, (gl.constexpr(1), out_box, out, w_scale, x_ring, w_ring, s_ring, out_ring, full, free,
                                  table, groups, rows, n, k, width, capacity, CONSUMERS, ORDER)),
                (_produce, (x, w, x_scale, x_ring, w_ring, s_ring, full, free, table, n, k, width, ORDER)),
            ],
            [4, 1], [232, 40],
        )  # fmt: skip


@gluon.jit(do_not_specialize=["groups", "rows", "k", "capacity"])
def grouped_narrow(  # type: ignore[no-untyped-def]
    x, w, x_scale, out, w_scale, offsets, groups, rows, n, k, capacity,
    STAGES: gl.constexpr, ORDER: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """As `grouped_wide`, in tiles of the rows of an x block, 8 to 128; the scales' block has at least 32."""
    BLOCK_M: gl.constexpr = x.block_shape[0]
    SCALES: gl.constexpr = x_scale.block_shape[1]
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, 128], x.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, 128, 128], w.layout)
    s_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, SCALES], x_scale.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    table = gl.allocate_shared_memory(gl.int32, [3, GROUPS], FLAT)
    let_next_start()
    inputs_ready()
    list_groups(offsets, table, groups, rows, capacity, BLOCK_M)
    width = gl.cdiv(n, 128)
    gl.warp_specialize(
        [
            (_narrow_consumer, (gl.constexpr(0), out, w_scale, x_ring, w_ring, s_ring, full, free,
                                table, groups, rows, n, k, width, capacity, ORDER)),
            (_narrow_consumer, (gl.constexpr(1), out, w_scale, x_ring, w_ring, s_ring, full, free,
                                table, groups, rows, n, k, width, capacity, ORDER)),
            (_produce, (x, w, x_scale, x_ring, w_ring, s_ring, full, free, table, n, k, width, ORDER)),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip
