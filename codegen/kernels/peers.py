"""Triton kernel that exchanges tensors between GPUs of a host, through memory that all of them can address.

    rank 0   terms ──────────► memory of rank 1        ─ signal ─┐
    rank 1   terms ──────────► memory of rank 0        ─ signal ─┤ wait for all signals; add in the order of ranks

Each program sends tiles to all other ranks and waits for their tiles: one way over NVLink, where a ring takes several,
and no second stream. All ranks add the same terms in the same order in FP32 and round once, so they hold equal bits on
every run.

A rank's memory is divided among programs, and a program's among two turns and the ranks. What a program sends in step c
goes to turn c % 2. A rank may be one step ahead of another one, never two: it does not complete step c + 1 before the
other rank has sent its tile of c + 1, which is after its step c. So nothing that is still read is overwritten.

Source: the one-shot all-reduce of TensorRT-LLM and vLLM ("custom all-reduce").
"""

import triton
import triton.language as tl

from codegen.kernels.overlap import inputs_ready, let_next_start

REGION = tl.constexpr(1 << 15)
"""Bytes that a program can receive from one rank in a step."""

# Reads a signal until it has reached the number of this step, or a later one: the other rank may be ahead.
# Without `trap`, a rank would wait forever for a rank that has ended.
_WAIT = tl.constexpr("""{
    .reg .pred %behind, %late;
    .reg .u32 %seen, %ahead;
    .reg .u64 %now, %end;
    mov.u64 %now, %globaltimer;
    add.u64 %end, %now, $3;
again:
    ld.acquire.sys.global.u32 %seen, [$1];
    sub.u32 %ahead, %seen, $2;
    setp.lt.s32 %behind, %ahead, 0;
    @!%behind bra done;
    mov.u64 %now, %globaltimer;
    setp.gt.u64 %late, %now, %end;
    @%late trap;
    bra again;
done:
    mov.u32 $0, %seen;
}""")


@triton.jit
def region_of(memory, place, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """A region of a memory, for elements of this type."""
    return tl.multiple_of((memory + place * REGION).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _signal_of(memory, program, from_, RANKS: tl.constexpr, PROGRAMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a rank's program finds the number of the last step whose tile a rank has sent."""
    end = tl.full([], PROGRAMS * 2 * RANKS, tl.int64) * REGION
    return (memory + end + (program * RANKS + from_) * 4).to(tl.pointer_type(tl.int32))


@triton.jit
def wait_for(signal, step, patience):  # type: ignore[no-untyped-def]
    """Returns when another rank has set a signal of this rank to this step or a later one.

    Args:
        signal: Points to int32.
        step: int32.
        patience: Nanoseconds after which a rank ends its process's use of the GPU.
    """
    tl.inline_asm_elementwise(
        _WAIT, "=r,l,r,l", [signal, step, patience.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def meet(step, memories, rank, patience, RANKS: tl.constexpr, PROGRAMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Signals all other ranks that this program has sent its tiles of a step, and waits for their signals."""
    program = tl.program_id(0)
    tl.debug_barrier()  # all threads have stored
    for ahead in tl.static_range(1, RANKS):
        memory = tl.load(memories + (rank + ahead) % RANKS)
        tl.atomic_xchg(_signal_of(memory, program, rank, RANKS, PROGRAMS), step, sem="release", scope="sys")
    own = tl.load(memories + rank)
    for ahead in tl.static_range(1, RANKS):
        wait_for(_signal_of(own, program, (rank + ahead) % RANKS, RANKS, PROGRAMS), step, patience)
    tl.debug_barrier()  # all threads have seen all signals


@triton.jit
def _tile_of(other, mine, places, mask, own, first, rank):  # type: ignore[no-untyped-def]
    """The tile of a rank in this step."""
    # ".cg": no cache of this multiprocessor holds an old tile.
    region = region_of(own, first + other, mine.dtype)
    sent = tl.load(region + places, mask=mask & (other != rank), other=0, cache_modifier=".cg")
    return tl.where(other == rank, mine, sent)


@triton.jit
def sum_over_ranks(  # type: ignore[no-untyped-def]
    mine, places, mask, memories, steps, rank, patience, RANKS: tl.constexpr, PROGRAMS: tl.constexpr
):  # fmt: skip
    """The sum of the tiles of this program on all ranks, in FP32: one step of another kernel, after `inputs_ready`.

    Args:
        mine: This rank's tile, floating.
        places: The place of each element in a region.
        mask: Which elements exist.
        memories: See `exchange`; so are the others.
    """
    program = tl.program_id(0)
    step = tl.load(steps + program) + 1
    first = (program.to(tl.int64) * 2 + (step & 1)) * RANKS
    for ahead in tl.static_range(1, RANKS):
        memory = tl.load(memories + (rank + ahead) % RANKS)
        tl.store(region_of(memory, first + rank, mine.dtype) + places, mine, mask=mask)
    meet(step, memories, rank, patience, RANKS, PROGRAMS)
    own = tl.load(memories + rank)
    total = tl.zeros(mine.shape, tl.float32)
    for other in tl.static_range(RANKS):
        tile = _tile_of(other, mine, places, mask, own, first, rank).to(tl.float32)
        total = tile if other == 0 else total + tile  # 0.0 + -0.0 would be 0.0
    tl.store(steps + program, step)
    return total


@triton.jit(do_not_specialize=["count", "rank", "patience"])
def exchange(  # type: ignore[no-untyped-def]
    x, out, memories, steps, count, rank, patience, RANKS: tl.constexpr, PROGRAMS: tl.constexpr, TILE: tl.constexpr,
    VECTOR: tl.constexpr, SCATTERED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """The tensors that all ranks have sent to this one: their sum, rounded once, or concatenated.

    SCATTERED  SUMMED
    no         yes     out[i] = sum of x[i] of all ranks            all-reduce
    no         no      out[r, i] = x[i] of rank r                   all-gather
    yes        yes     out[i] = sum of x[rank, i] of all ranks      reduce-scatter
    yes        no      out[r, i] = x[rank, i] of rank r             all-to-all

    Args:
        x: Contiguous, `count` elements, or [RANKS, count] if scattered: bfloat16, float16 or float32; if not
            summed, int8, which are bytes of any type.
        out: Contiguous, like x; `count` elements if summed, or [RANKS, count].
        memories: int64 [RANKS], addresses on this GPU of the memory of each rank.
        steps: int32 [PROGRAMS]: how many steps each program of this rank has taken.
        rank: The number of this rank.
        patience: Nanoseconds after which a rank that waits for another one ends its process's use of the GPU.
        RANKS: Number of ranks.
        PROGRAMS: Programs that the memory has regions for; the grid has at most as many.
        TILE: Elements of a step, a power of two, at most `REGION` bytes.
        VECTOR: A power of two that divides `count`: elements that exist together or not at all.
    """
    program = tl.program_id(0)
    places = tl.arange(0, TILE)
    length = count // VECTOR * VECTOR  # which is `count`; so the compiler sees that VECTOR divides it
    let_next_start()
    inputs_ready()
    step = tl.load(steps + program)
    own = tl.load(memories + rank)
    for start in range(program * TILE, length, tl.num_programs(0) * TILE):
        step += 1
        first = (program.to(tl.int64) * 2 + (step & 1)) * RANKS
        where, mask = start.to(tl.int64) + places, start + places < length
        mine = tl.load(x + where + (rank.to(tl.int64) * length if SCATTERED else 0), mask=mask, other=0)
        for ahead in tl.static_range(1, RANKS):
            to = (rank + ahead) % RANKS
            tile = tl.load(x + where + to.to(tl.int64) * length, mask=mask, other=0) if SCATTERED else mine
            tl.store(region_of(tl.load(memories + to), first + rank, mine.dtype) + places, tile, mask=mask)
        meet(step, memories, rank, patience, RANKS, PROGRAMS)
        total = tl.zeros([TILE], tl.float32)
        for other in tl.static_range(RANKS):
            tile = _tile_of(other, mine, places, mask, own, first, rank)
            if SUMMED:
                total = tile.to(tl.float32) if other == 0 else total + tile.to(tl.float32)
            else:
                tl.store(out + where + tl.full([], other, tl.int64) * length, tile, mask=mask)
        if SUMMED:
            tl.store(out + where, total.to(out.dtype.element_ty), mask=mask)
    tl.store(steps + program, step)
