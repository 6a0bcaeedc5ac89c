"""Shared by the warp-specialized Gluon kernels for Hopper: tile order, producer warp, turns, and output stores.

One block of threads stays on each multiprocessor and computes one output tile after another. A producer warp loads
tiles of both operands and the activation's scales through the copy engine into a ring of shared memory, guarded by two
barriers per stage, and starts the next output tile while the consumers still write theirs.

The tensor cores must not wait while a consumer promotes, so consumers take turns: each passes the turn on after issuing
its wave, and promotes while the next consumer's wave runs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from codegen.kernels.gluon_versions import async_load, async_store
from codegen.kernels.overlap import inputs_ready, let_next_start


@gluon.jit
def tile_of(tile, height, width, GROUP: gl.constexpr):  # type: ignore[no-untyped-def]
    """The row and the column of a tile; as in `scaled_gemm`, in columns of GROUP tiles."""
    first = tile // (GROUP * width) * GROUP
    rows = gl.minimum(height - first, GROUP)
    return first + tile % (GROUP * width) % rows, tile % (GROUP * width) // rows


@gluon.jit
def splits_of(k, depth):  # type: ignore[no-untyped-def]
    """Number of splits of K, of `depth` blocks each; one if that is None."""
    return 1 if depth is None else gl.cdiv(gl.cdiv(k, 128), depth)


@gluon.jit
def blocks_of(tile, tiles, k, depth):  # type: ignore[no-untyped-def]
    """A tile's split of K, for `tiles` tiles per split; the split's first block, and its number of blocks."""
    blocks = gl.cdiv(k, 128)
    if depth is None:
        split, first, count = 0, 0, blocks
    else:
        split = tile // tiles
        first = split * depth
        count = gl.minimum(depth, blocks - first)
    return split, first, count


@gluon.jit
def wait_for_turn(WHO: gl.constexpr):  # type: ignore[no-untyped-def]
    """Waits until the warpgroup before this one has passed the turn to number WHO.

    Uses the hardware's named barriers, of which Triton itself uses the first few; a barrier in shared memory costs the
    warpgroup two more.
    """
    lanes = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    BARRIER: gl.constexpr = "8" if WHO == 0 else "9" if WHO == 1 else "10"
    gl.inline_asm_elementwise(
        "bar.sync " + BARRIER + ", 256; mov.b32 $0, $1;", "=r,r", [lanes], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def give_turn(WHO: gl.constexpr):  # type: ignore[no-untyped-def]
    """Passes the turn to warpgroup number WHO, without waiting."""
    lanes = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    BARRIER: gl.constexpr = "8" if WHO == 0 else "9" if WHO == 1 else "10"
    gl.inline_asm_elementwise(
        "bar.arrive " + BARRIER + ", 256; mov.b32 $0, $1;", "=r,r", [lanes], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def produce(  # type: ignore[no-untyped-def]
    a, w, a_scale, a_ring, w_ring, s_ring, full, free, k, height, width, GROUP: gl.constexpr, SPAN: gl.constexpr,
    depth=None,
):  # fmt: skip
    """Fills the ring, stage by stage, for all tiles of this block of threads.

    The first stages' weights are loaded while the previous kernel may still run. If `a_scale` and `s_ring` are None,
    there are no scales. A ring of scales with several rows for each box of the activation holds the scales of narrow
    tiles.
    """
    STAGES: gl.constexpr = w_ring.shape[0]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    BOXES: gl.constexpr = a_ring.shape[0] // STAGES
    ROWS: gl.constexpr = a_ring.shape[1]
    SUBS: gl.constexpr = 0 if s_ring is None else s_ring.shape[0] // a_ring.shape[0]
    BYTES: gl.constexpr = (BOXES * ROWS + BLOCK_N) * 128 + BOXES * ROWS * SUBS * 4
    tiles = height * width
    tile = gl.program_id(0)
    _, tile_n = tile_of(tile if depth is None else tile % tiles, height, width, GROUP)
    _, first, count = blocks_of(tile, tiles, k, depth)
    early = gl.where(tile < tiles * splits_of(k, depth), gl.minimum(count, STAGES), 0)
    for turn in range(early):
        mbarrier.expect(full.index(turn), BYTES)
        async_load(w, [tile_n * BLOCK_N, (first + turn) * 128], full.index(turn), w_ring.index(turn))
    let_next_start()
    inputs_ready()
    turn = 0
    for tile in range(gl.program_id(0), tiles * splits_of(k, depth), gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile if depth is None else tile % tiles, height, width, GROUP)
        _, first, count = blocks_of(tile, tiles, k, depth)
        for block in range(first, first + count):
            stage = turn % STAGES
            mbarrier.wait(free.index(stage), (turn // STAGES) & 1 ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES, pred=turn >= early)
            for box in gl.static_range(BOXES):
                row = (tile_m * BOXES + box) * ROWS
                place = stage * BOXES + box
                for sub in gl.static_range(SUBS):
                    line = (block * SUBS + sub) // SPAN
                    async_load(a_scale, [line, row], bar, s_ring.index(place * SUBS + sub))
                async_load(a, [row, block * 128], bar, a_ring.index(place))
            async_load(w, [tile_n * BLOCK_N, block * 128], bar, w_ring.index(stage), pred=turn >= early)
            turn += 1


@gluon.jit
def store(out, buffer, total, row, column, bias, n, PENDING: gl.constexpr = 0):  # type: ignore[no-untyped-def]
    """Starts the store of 64 output rows; it completes while the next tile is multiplied.

    The buffer must not be used by the previous PENDING stores.
    """
    if bias is not None:
        columns = column + gl.arange(0, total.shape[1], gl.SliceLayout(0, total.type.layout))
        total += gl.load(bias + columns, mask=columns < n, other=0.0).to(gl.float32)[None, :]
    tma.store_wait(PENDING)  # earlier rows have left the buffer
    buffer.store(total.to(out.dtype))
    fence_async_shared()
    async_store(out, [row, column], buffer)
