"""Gluon kernels for Hopper: one product for each group of rows, such as the tokens of one expert.

    out[t, n] = sum over blocks of 128 of K:  (x[t, block] . w[g, n, block]) * x_scale[t, block] * w_scale[g, n/128, block]

where g is the group that row t belongs to. Where the groups begin and end is on the device only: one block of threads
stays on each multiprocessor, all of them make the same table of groups in shared memory, and each finds its next tile
there. No tile spans two groups, so a group may begin at any row; a tile's rows beyond its group are multiplied with
the wrong weights and never written.

`grouped_wide` has the rows on the left of the tensor cores, 64 of them for each consumer, which sits out a tile whose
rows it has none of. `grouped_narrow` is for groups of few rows, where weights are all there is to read: the weights
stand on the left, the rows on the right. Both bring their operands as `warp_pipeline` says; sums are promoted as in
`warp_gemm`.
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

from codegen.kernels.warp_pipeline import store, tile_of


@gluon.jit
def _add(a, b):  # type: ignore[no-untyped-def]
    return a + b


@gluon.jit
def _list_groups(offsets, table, groups, rows, capacity, BLOCK_M: gl.constexpr):  # type: ignore[no-untyped-def]
    """Fills the table: for each group its first row, the row behind its last, and the tiles up to its own.

    Offsets that decrease or leave the tensor are clamped: they cost rows, never an address.
    """
    GROUPS: gl.constexpr = table.shape[1]
    LINE: gl.constexpr = gl.BlockedLayout([max(GROUPS // 32, 1)], [32], [gl.num_warps()], [0])
    group = gl.arange(0, GROUPS, LINE)
    ends = gl.load(offsets + group, mask=group < groups, other=0)
    if capacity is None:
        starts = gl.load(offsets + group - 1, mask=(group > 0) & (group < groups), other=0)
        starts = gl.minimum(gl.maximum(starts, 0), rows)
        ends = gl.minimum(ends, rows)
    else:
        starts = group * capacity
        ends = starts + gl.minimum(ends, capacity)
    ends = gl.where(group < groups, gl.maximum(ends, starts), starts)
    tiles = gl.associative_scan((ends - starts + BLOCK_M - 1) // BLOCK_M, 0, _add)
    table.index(0).store(starts)
    table.index(1).store(ends)
    table.index(2).store(tiles)


@gluon.jit
def _entry(table, which: gl.constexpr, group):  # type: ignore[no-untyped-def]
    """One number of the table."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(table.index(which).slice(group, 1).load(ONE), axis=0)


@gluon.jit
def _tiles_in(table, width):  # type: ignore[no-untyped-def]
    """How many tiles there are."""
    return _entry(table, 2, table.shape[1] - 1) * width


@gluon.jit
def _find(table, tile, width, BLOCK_M: gl.constexpr, ORDER: gl.constexpr):  # type: ignore[no-untyped-def]
    """A tile's group, first row, the row behind the group's last, and its column of tiles."""
    GROUPS: gl.constexpr = table.shape[1]
    LINE: gl.constexpr = gl.BlockedLayout([max(GROUPS // 32, 1)], [32], [gl.num_warps()], [0])
    before = (table.index(2).load(LINE) * width <= tile).to(gl.int32)
    group = gl.sum(before, axis=0)
    start, end = _entry(table, 0, group), _entry(table, 1, group)
    height = (end - start + BLOCK_M - 1) // BLOCK_M
    first = _entry(table, 2, group) - height
    tile_m, tile_n = tile_of(tile - first * width, height, width, ORDER)
    return group, start + tile_m * BLOCK_M, end, tile_n


@gluon.jit
def _produce(  # type: ignore[no-untyped-def]
    x, w, x_scale, x_ring, w_ring, s_ring, full, free, table, n, k, width, ORDER: gl.constexpr
):  # fmt: skip
    """Fills the ring, stage after stage, for all tiles of this block of threads."""
    STAGES: gl.constexpr = w_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    SCALES: gl.constexpr = s_ring.shape[2]
    turn = 0
    for tile in range(gl.program_id(0), _tiles_in(table, width), gl.num_programs(0)):
        group, row, _, tile_n = _find(table, tile, width, BLOCK_M, ORDER)
        column = group * n + tile_n * 128
        for block in range(gl.cdiv(k, 128)):
            stage = turn % STAGES
            mbarrier.wait(free.index(stage), (turn // STAGES) & 1 ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, (BLOCK_M + 128) * 128 + SCALES * 4)
            tma.async_copy_global_to_shared(w, [column, block * 128], bar, w_ring.index(stage))
            tma.async_copy_global_to_shared(x_scale, [block, row], bar, s_ring.index(stage))
            tma.async_copy_global_to_shared(x, [row, block * 128], bar, x_ring.index(stage))
            turn += 1


@gluon.jit
def _clear(  # type: ignore[no-untyped-def]
    WHO: gl.constexpr, out, table, groups, rows, n
):  # fmt: skip
    """Writes zeros to the rows that belong to no group: those behind the last."""
    LANES: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    for row in range(_entry(table, 1, groups - 1) + gl.program_id(0) * 2 + WHO, rows, gl.num_programs(0) * 2):
        for first in range(0, n, 1024):
            columns = first + gl.arange(0, 1024, LANES)
            gl.store(out + row.to(gl.int64) * n + columns, gl.zeros_like(columns).to(out.dtype.element_ty), columns < n)


@gluon.jit
def _wide_consumer(  # type: ignore[no-untyped-def]
    WHO: gl.constexpr, out_box, out, w_scale, x_ring, w_ring, s_ring, out_ring, full, free, table,
    groups, rows, n, k, width, capacity, ORDER: gl.constexpr,
):  # fmt: skip
    """Multiplies, promotes and stores 64 rows of each tile of this block of threads."""
    STAGES: gl.constexpr = w_ring.shape[0]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    scales = s_ring._reinterpret(gl.float32, [STAGES, 128], FLAT)
    buffer = out_ring.index(WHO)
    blocks = gl.cdiv(k, 128)
    turn = 0
    for tile in range(gl.program_id(0), _tiles_in(table, width), gl.num_programs(0)):
        group, row, end, tile_n = _find(table, tile, width, 128, ORDER)
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
                left, right = x_ring.index(stage).slice(WHO * 64, 64), w_ring.index(stage).permute((1, 0))
                part = warpgroup_mma(left, right, part, use_acc=False, is_async=True)
                scale = scales.index(stage).slice(WHO * 64, 64).load(gl.SliceLayout(1, SUMS))
                part = warpgroup_mma_wait(0, deps=(part,))
                mbarrier.arrive(free.index(stage), count=1)
                total += part * (scale * w_now)[:, None]
                total = warpgroup_mma_wait(0, deps=(total,))  # pins the order, see `warp_gemm`
                turn += 1
            if row + 64 <= end:
                store(out_box, buffer, total, row, tile_n * 128, None, n)
            else:
                _store_some(out, buffer, total, row, end, tile_n * 128, n)
        else:
            for _ in range(blocks):
                stage = turn % STAGES
                mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
                mbarrier.arrive(free.index(stage), count=1)
                turn += 1
    tma.store_wait(0)
    if capacity is None:
        _clear(WHO, out, table, groups, rows, n)


@gluon.jit
def _store_some(out, buffer, total, row, end, column, n):  # type: ignore[no-untyped-def]
    """Writes those of 64 rows that come before `end`; the copy engine cannot leave out rows."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    tma.store_wait(0)  # the rows before these have left the buffer
    buffer.store(total.to(out.dtype.element_ty))
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, WIDE))
    columns = column + gl.arange(0, 128, gl.SliceLayout(0, WIDE))
    places = out + rows.to(gl.int64)[:, None] * n + columns[None, :]
    gl.store(places, buffer.load(WIDE), mask=(rows < end)[:, None] & (columns < n)[None, :])


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
    scales = s_ring._reinterpret(gl.float32, [STAGES, SCALES], FLAT)
    blocks = gl.cdiv(k, 128)
    turn = 0
    for tile in range(gl.program_id(0), _tiles_in(table, width), gl.num_programs(0)):
        group, row, end, tile_n = _find(table, tile, width, BLOCK_M, ORDER)
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
            total = warpgroup_mma_wait(0, deps=(total,))  # pins the order, see `warp_gemm`
            turn += 1
        columns = tile_n * 128 + WHO * 64 + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
        lines = row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, SUMS))
        places = out + lines.to(gl.int64)[None, :] * n + columns[:, None]
        gl.store(places, total.to(out.dtype.element_ty), mask=(lines < end)[None, :] & (columns < n)[:, None])
    if capacity is None:
        _clear(WHO, out, table, groups, rows, n)


@gluon.jit(do_not_specialize=["rows"])
def grouped_wide(  # type: ignore[no-untyped-def]
    x, w, out_box, x_scale, out, w_scale, offsets, groups, rows, n, k, capacity,
    STAGES: gl.constexpr, ORDER: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """out[rows, n] of x[rows, k] and w[groups * n, k], in tiles of 128 rows, on a grid of any size.

    Args:
        x: float8e4nv descriptor, block [128, 128].
        w: float8e4nv descriptor, block [128, 128].
        out_box: bfloat16, float16 or float32 descriptor of the output, block [64, 128].
        x_scale: float32 descriptor of the transposed scales [ceil(k / 128), rows], block [1, 128].
        out: The output again, as a pointer: contiguous [rows, n].
        w_scale: float32 [groups, ceil(n / 128), ceil(k / 128)], contiguous.
        offsets: int32 [groups]: the row behind the last of each group, or, with a capacity, the rows of each.
        capacity: None, or how many rows of x each group has room for; then its rows begin at a multiple of that.
        STAGES: Blocks of K that are in shared memory at one time.
        ORDER: Rows of tiles of one group that follow each other.
        GROUPS: A power of two, `groups` or more, 32 at least.
    """
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, 128, 128], x.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, 128, 128], w.layout)
    s_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], x_scale.layout)
    out_ring = gl.allocate_shared_memory(out_box.dtype, [2, 64, 128], out_box.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    table = gl.allocate_shared_memory(gl.int32, [3, GROUPS], FLAT)
    _list_groups(offsets, table, groups, rows, capacity, 128)
    width = gl.cdiv(n, 128)
    # Each tuple of arguments stands where it is passed: from a variable, its constants would come out as tensors.
    gl.warp_specialize(
        [
            (_wide_consumer, (gl.constexpr(0), out_box, out, w_scale, x_ring, w_ring, s_ring, out_ring, full, free,
                              table, groups, rows, n, k, width, capacity, ORDER)),
            (_wide_consumer, (gl.constexpr(1), out_box, out, w_scale, x_ring, w_ring, s_ring, out_ring, full, free,
                              table, groups, rows, n, k, width, capacity, ORDER)),
            (_produce, (x, w, x_scale, x_ring, w_ring, s_ring, full, free, table, n, k, width, ORDER)),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["rows"])
def grouped_narrow(  # type: ignore[no-untyped-def]
    x, w, x_scale, out, w_scale, offsets, groups, rows, n, k, capacity,
    STAGES: gl.constexpr, ORDER: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """As `grouped_wide`, in tiles of as many rows as a block of x has, 8 to 128; the scales' block has 32 at least."""
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
    _list_groups(offsets, table, groups, rows, capacity, BLOCK_M)
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
