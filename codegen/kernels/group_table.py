"""Locates the tiles of a grouped GEMM: a table of the groups in shared memory, and a search in it.

Group sizes are known on the device only. Each block of threads builds its own table before its warps specialize, then
searches it for each tile: a few instructions, compared with the thousands that a tile takes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from codegen.kernels.gluon_versions import reinterpret
from codegen.kernels.warp_pipeline import tile_of


@gluon.jit
def _add(a, b):  # type: ignore[no-untyped-def]
    return a + b


@gluon.jit
def _aligned(row):  # type: ignore[no-untyped-def]
    """The last row up to this one whose scales begin at a multiple of 16 bytes."""
    return row // 4 * 4


@gluon.jit
def list_groups(offsets, table, groups, rows, capacity, BLOCK_M: gl.constexpr):  # type: ignore[no-untyped-def]
    """Fills the table: for each group its first row, its end row, and the number of tiles of the previous groups.

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
    heights = gl.where(starts < ends, (ends - _aligned(starts) + BLOCK_M - 1) // BLOCK_M, 0)
    table.index(0).store(starts)
    table.index(1).store(ends)
    table.index(2).store(gl.associative_scan(heights, 0, _add))


@gluon.jit
def entry(table, which: gl.constexpr, group):  # type: ignore[no-untyped-def]
    """One entry of the table."""
    GROUPS: gl.constexpr = table.shape[1]
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    entries = reinterpret(table, gl.int32, [3 * GROUPS, 1], FLAT)
    return gl.max(entries.index(which * GROUPS + group).load(ONE), axis=0)


@gluon.jit
def tiles_in(table, width):  # type: ignore[no-untyped-def]
    """Total number of tiles."""
    return entry(table, 2, table.shape[1] - 1) * width


@gluon.jit
def find_tile(table, tile, width, BLOCK_M: gl.constexpr, ORDER: gl.constexpr):  # type: ignore[no-untyped-def]
    """A tile's group, its first row and tile column, and the group's first row and end row."""
    GROUPS: gl.constexpr = table.shape[1]
    LINE: gl.constexpr = gl.BlockedLayout([max(GROUPS // 32, 1)], [32], [gl.num_warps()], [0])
    before = (table.index(2).load(LINE) * width <= tile).to(gl.int32)
    group = gl.sum(before, axis=0)
    start, end = entry(table, 0, group), entry(table, 1, group)
    row = _aligned(start)
    height = (end - row + BLOCK_M - 1) // BLOCK_M
    first = entry(table, 2, group) - height
    tile_m, tile_n = tile_of(tile - first * width, height, width, ORDER)
    return group, row + tile_m * BLOCK_M, tile_n, start, end
