"""Triton kernels: sort entries by the number of their group.

Few entries are compared with all others, by one kernel:

    place of an entry  =  entries of smaller numbers  +  earlier entries of its number

Of many, the first kernel counts the entries of each group in each tile; the second adds the counts up and writes:

    place of an entry  =  entries of smaller numbers
                        + entries of its number in earlier tiles  +  earlier entries of its number in its tile

All sums are of integers, so the result is always the same.
"""

import triton
import triton.language as tl

from codegen.kernels.overlap import inputs_ready, let_next_start


@triton.jit
def _before(keys, key, entry, start, stop, SMALLER: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of the entries start … stop - 1 are before each of TILE entries, with or without smaller numbers."""
    found = tl.zeros([TILE, CHUNK], tl.int32)
    for first in range(start, stop, CHUNK):
        other = first + tl.arange(0, CHUNK)
        theirs = tl.load(keys + other, mask=other < stop, other=2**31 - 1).to(tl.int32)[None, :]
        before = (theirs == key[:, None]) & (other[None, :] < entry[:, None])
        if SMALLER:
            before = before | (theirs < key[:, None])
        found += before.to(tl.int32)
    return tl.sum(found, axis=1)


@triton.jit
def _write(sorted_keys, order, owner, place, key, entry, at, inside, EACH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes entries to their places."""
    tl.store(place + entry, at.to(tl.int64), mask=inside)
    tl.store(order + at, entry.to(tl.int64), mask=inside)
    tl.store(owner + at, (entry // EACH).to(tl.int64), mask=inside)
    tl.store(sorted_keys + at, key.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["n", "groups"])
def rank_entries(  # type: ignore[no-untyped-def]
    keys, sorted_keys, order, owner, place, ends, n, groups,
    EACH: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the place of each entry and what is there, and the end of each group. One program writes TILE of each.

    Args:
        keys: int64 [n], contiguous: 0 … groups - 1.
        sorted_keys: int64 [n], contiguous, like the next three; see `qcompiler.dialects.entries`.
        ends: int32 [groups].
        EACH: Entries of an owner.
        TILE: Entries of a program, a power of two.
        CHUNK: Entries that they are compared with at once, a power of two.
    """
    entry = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = entry < n
    let_next_start()
    inputs_ready()
    key = tl.load(keys + entry, mask=inside, other=0).to(tl.int32)
    at = _before(keys, key, entry, 0, n, True, TILE, CHUNK)
    _write(sorted_keys, order, owner, place, key, entry, at, inside, EACH)
    # The end of a group is the place of a first entry of the next group.
    if tl.program_id(0) * TILE < groups:
        tl.store(ends + entry, _before(keys, entry + 1, entry * 0, 0, n, True, TILE, CHUNK), mask=entry < groups)


@triton.jit(do_not_specialize=["n"])
def count_entries(  # type: ignore[no-untyped-def]
    keys, counts, n, GROUPS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr
):
    """counts[tile, group]: the entries of each group in each tile. One program counts one tile.

    Args:
        keys: As in `rank_entries`.
        counts: int32 [tiles, GROUPS].
        GROUPS: Number of groups, rounded up to a multiple of CHUNK.
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
    GROUPS: tl.constexpr, EACH: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Writes what `rank_entries` writes. One program places one tile.

    Args:
        counts: As `count_entries` writes them; likewise GROUPS, TILE and CHUNK. See `rank_entries` for the others.
        TILES: Tiles whose counts are added at once, a power of two.
    """
    tile = tl.program_id(0)
    entry = tile * TILE + tl.arange(0, TILE)
    inside = entry < n
    let_next_start()
    inputs_ready()
    key = tl.load(keys + entry, mask=inside, other=-1).to(tl.int32)
    at = _before(keys, key, entry, tile * TILE, min(tile * TILE + TILE, n), False, TILE, CHUNK)
    smaller = tl.sum(tl.zeros([CHUNK], tl.int32), axis=0)  # entries of the groups before this chunk: 0
    for first in range(0, GROUPS, CHUNK):
        group = first + tl.arange(0, CHUNK)
        total = tl.zeros([CHUNK], tl.int32)
        earlier = tl.zeros([CHUNK], tl.int32)
        for start in range(0, tiles, TILES):
            others = start + tl.arange(0, TILES)
            found = tl.load(counts + others[:, None] * GROUPS + group[None, :], mask=(others < tiles)[:, None], other=0)
            total += tl.sum(found, axis=0)
            earlier += tl.sum(tl.where((others < tile)[:, None], found, 0), axis=0)
        end = smaller + tl.cumsum(total, axis=0)
        at += tl.sum(tl.where(key[:, None] == group[None, :], (end - total + earlier)[None, :], 0), axis=1)
        smaller += tl.sum(total, axis=0)
        tl.store(ends + group, end, mask=(group < groups) & (tile == 0))
    _write(sorted_keys, order, owner, place, key, entry, at, inside, EACH)
