"""Triton kernels: sort entries by the number of their group, without comparing entries.

    place of an entry  =  entries of the groups before its own
                        + entries of its group in earlier tiles  +  entries of its group before it in its tile

The first kernel counts the entries of each group in each tile; the second adds the counts up and writes. With one tile,
the second does both. All sums are of integers, so the result is always the same.
"""

import triton
import triton.language as tl

from codegen.kernels.overlap import inputs_ready, let_next_start


@triton.jit(do_not_specialize=["n"])
def count_entries(  # type: ignore[no-untyped-def]
    keys, counts, n, GROUPS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr
):
    """counts[tile, group]: the entries of each group in each tile. One program counts one tile.

    Args:
        keys: int64 [n], contiguous: 0 … GROUPS - 1.
        counts: int32 [tiles, GROUPS].
        GROUPS: Number of groups, a multiple of CHUNK.
        TILE: Entries of a tile, a power of two.
        CHUNK: Groups that are counted at once, a power of two.
    """
    tile = tl.program_id(0)
    entries = tile * TILE + tl.arange(0, TILE)
    let_next_start()
    inputs_ready()
    key = tl.load(keys + entries, mask=entries < n, other=-1).to(tl.int32)
    for first in range(0, GROUPS, CHUNK):
        group = first + tl.arange(0, CHUNK)
        found = tl.sum((key[:, None] == group[None, :]).to(tl.int32), axis=0)
        tl.store(counts + tile * GROUPS + group, found)


@triton.jit(do_not_specialize=["n", "groups", "tiles"])
def place_entries(  # type: ignore[no-untyped-def]
    keys, counts, sorted_keys, order, owner, place, ends, n, groups, tiles,
    GROUPS: tl.constexpr, EACH: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the place of each entry and what is there. One program places one tile.

    Args:
        keys: As in `count_entries`; likewise GROUPS, TILE and CHUNK.
        counts: As `count_entries` writes them; None if there is one tile.
        sorted_keys: int64 [n], contiguous, like the next three; see `qcompiler.dialects.entries`.
        ends: int32 [groups].
        groups: At most GROUPS.
        EACH: Entries of an owner.
    """
    tile = tl.program_id(0)
    entries = tile * TILE + tl.arange(0, TILE)
    inside = entries < n
    let_next_start()
    inputs_ready()
    key = tl.load(keys + entries, mask=inside, other=-1).to(tl.int32)
    at = tl.zeros([TILE], tl.int32)
    before = tl.sum(at, axis=0)  # entries of the groups before this chunk: 0
    for first in range(0, GROUPS, CHUNK):
        group = first + tl.arange(0, CHUNK)
        ours = (key[:, None] == group[None, :]).to(tl.int32)
        earlier = tl.zeros([CHUNK], tl.int32)
        if counts is None:
            total = tl.sum(ours, axis=0)
        else:
            total = tl.zeros([CHUNK], tl.int32)
            for start in range(0, tiles, 32):
                others = start + tl.arange(0, 32)
                found = tl.load(
                    counts + others[:, None] * GROUPS + group[None, :], mask=(others < tiles)[:, None], other=0
                )
                total += tl.sum(found, axis=0)
                earlier += tl.sum(tl.where((others < tile)[:, None], found, 0), axis=0)
        end = before + tl.cumsum(total, axis=0)
        base = end - total + earlier
        at += tl.sum(ours * (base[None, :] + tl.cumsum(ours, axis=0) - 1), axis=1)
        before += tl.sum(total, axis=0)
        tl.store(ends + group, end, mask=(group < groups) & (tile == 0))
    tl.store(place + entries, at.to(tl.int64), mask=inside)
    tl.store(order + at, entries.to(tl.int64), mask=inside)
    tl.store(owner + at, (entries // EACH).to(tl.int64), mask=inside)
    tl.store(sorted_keys + at, key.to(tl.int64), mask=inside)
