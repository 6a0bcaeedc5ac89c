"""Triton kernels around matmuls that store their results in the memory of other GPUs of a host.

    rank 0   open_inboxes ─ matmul of rank 1's rows ─ matmul of own rows ─ sum_inbox
                                    └─ over NVLink ─┐                         ▲
    rank 1   open_inboxes ─ …              inbox of rank 1 ───────────────► sum_inbox

A matmul stores each tile when it is computed, so sending needs neither a separate step nor a multiprocessor.
`sum_inbox` adds the terms that all ranks have stored here, in FP32 in the order of the ranks, and rounds once.

An inbox has two turns, so that a rank may store terms while another one still adds the ones before. `open_inboxes`
waits until all ranks have added what was last stored in a turn. Usually they have: that was two calls ago.

A memory begins with the signals of the other ranks: how many calls each has completed, how many it has stored the
terms of, and the turns of the last two. So ranks need not use the same turn, as if only one of them records a graph. A
rank stores terms of a call only when all others have completed the call before the last one, so these are enough.
"""

import triton
import triton.language as tl

from codegen.kernels.overlap import inputs_ready, let_next_start
from codegen.kernels.peers import wait_for

HEAD = tl.constexpr(4096)
"""Bytes of signals at the start of a memory."""

_ADDED = tl.constexpr(0)
_STORED = tl.constexpr(1)
_TURN = tl.constexpr(2)  # and 3, for calls with even and odd numbers


@triton.jit
def _signal_of(memory, kind, from_, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    return (memory + (kind * RANKS + from_) * 4).to(tl.pointer_type(tl.int32))


@triton.jit
def _tell(step, kind: tl.constexpr, memories, rank, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    for ahead in tl.static_range(1, RANKS):
        memory = tl.load(memories + (rank + ahead) % RANKS)
        tl.atomic_xchg(_signal_of(memory, kind, rank, RANKS), step, sem="release", scope="sys")


@triton.jit
def _wait_for_all(step, kind: tl.constexpr, own, rank, patience, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    for ahead in tl.static_range(1, RANKS):
        wait_for(_signal_of(own, kind, (rank + ahead) % RANKS, RANKS), step, patience)


@triton.jit(do_not_specialize=["turn", "rank", "patience"])
def open_inboxes(memories, steps, turn, rank, patience, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Begins a call: returns when no rank reads this turn of its inbox any more. One program of one warp.

    Args:
        memories: int64 [RANKS], addresses on this GPU of the memory of each rank.
        steps: int32 [3]: the number of calls, and the last call that used turn 0 and turn 1.
        turn: 0 or 1.
        rank: The number of this rank.
        patience: Nanoseconds after which a rank that waits for another one ends its process's use of the GPU.
        RANKS: Number of ranks.
    """
    let_next_start()
    inputs_ready()
    step = tl.load(steps)
    _tell(step, _ADDED, memories, rank, RANKS)
    _wait_for_all(tl.load(steps + 1 + turn), _ADDED, tl.load(memories + rank), rank, patience, RANKS)
    tl.store(steps, step + 1)
    tl.store(steps + 1 + turn, step + 1)


@triton.jit(do_not_specialize=["turn", "size", "slot", "count", "stored", "rank", "patience"])
def sum_inbox(  # type: ignore[no-untyped-def]
    out, memories, steps, turn, size, slot, count, stored, rank, patience, RANKS: tl.constexpr, TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Ends a call: tells the others that all terms are stored, waits for theirs, and adds the terms in its inbox.

    Args:
        out: bfloat16, float16 or float32, `count` contiguous elements; those from `stored` on become zero.
        memories: See `open_inboxes`; so are the others.
        turn: Where this rank has stored its terms, as in `open_inboxes`.
        size: Bytes of a turn, a multiple of 16.
        slot: Bytes that are reserved for the terms of each rank, a multiple of 16.
        count: Number of elements.
        stored: Number of elements that the ranks have stored.
        TILE: Elements that a program adds at a time, a power of two.
        VECTOR: A power of two that divides `count` and `stored`: elements that exist together or not at all.
    """
    program = tl.program_id(0)
    let_next_start()
    inputs_ready()
    step = tl.load(steps)
    if program == 0:
        for ahead in tl.static_range(1, RANKS):
            memory = tl.load(memories + (rank + ahead) % RANKS)
            place = _signal_of(memory, _TURN + (step & 1), rank, RANKS)
            tl.atomic_xchg(place, turn, sem="relaxed", scope="sys")  # by the thread that signals next
        _tell(step, _STORED, memories, rank, RANKS)
    own = tl.load(memories + rank)
    _wait_for_all(step, _STORED, own, rank, patience, RANKS)
    tl.debug_barrier()  # all threads have seen all signals
    places = tl.arange(0, TILE)
    for first in range(program * TILE, count, tl.num_programs(0) * TILE):
        where = first + places
        total = tl.zeros([TILE], tl.float32)
        for other in tl.static_range(RANKS):
            told = tl.load(_signal_of(own, _TURN + (step & 1), other, RANKS), cache_modifier=".cg")
            of = tl.where(other == rank, turn, told).to(tl.int64)
            begin = own + HEAD + of * size + tl.full([], other, tl.int64) * slot
            terms = tl.multiple_of(begin.to(tl.pointer_type(out.dtype.element_ty)), 16)
            # ".cg": no cache of this multiprocessor holds old terms.
            tile = tl.load(terms + where, mask=where < stored // VECTOR * VECTOR, other=0, cache_modifier=".cg")
            total = tile.to(tl.float32) if other == 0 else total + tile.to(tl.float32)  # 0.0 + -0.0 would be 0.0
        tl.store(out + where, total.to(out.dtype.element_ty), mask=where < count // VECTOR * VECTOR)
