"""Triton kernel that exchanges the tokens of experts between GPUs of a host: only rows that a rank needs are sent.

    rank 0   tokens that chose experts of rank 1  ──────►  memory of rank 1      ─ signal ─┐
    rank 1   tokens that chose experts of rank 0  ──────►  memory of rank 0      ─ signal ─┤ wait; zeros elsewhere

Like `codegen.kernels.peers`, whose memory, steps and signals it shares. All ranks know what each token has chosen, so
both sides of an exchange find in the same numbers which rows are sent, and none are counted.
"""

import triton
import triton.language as tl

from codegen.kernels.overlap import inputs_ready, let_next_start
from codegen.kernels.peers import meet, region_of


@triton.jit
def _owners_of(experts, tokens, exist, HELD: tl.constexpr, CHOSEN: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rank of each expert that some tokens have chosen, [ROWS, WIDE]; -1 where there is none."""
    columns = tl.arange(0, WIDE)
    mask = exist[:, None] & (columns < CHOSEN)[None, :]
    found = tl.load(experts + tokens[:, None] * CHOSEN + columns[None, :], mask=mask, other=0)
    return tl.where(mask, (found // HELD).to(tl.int32), -1)


@triton.jit
def _needs(owners, rank):  # type: ignore[no-untyped-def]
    """Whether tokens have chosen an expert of a rank, [ROWS, 1]."""
    return (tl.max((owners == rank).to(tl.int32), axis=1) > 0)[:, None]


@triton.jit(do_not_specialize=["tokens", "share", "width", "rank", "patience"])
def exchange_chosen(  # type: ignore[no-untyped-def]
    x, experts, out, memories, steps, tokens, share, width, rank, patience, RANKS: tl.constexpr, PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, HELD: tl.constexpr, CHOSEN: tl.constexpr,
    WIDE: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Exchanges rows of tokens: a rank receives rows of all tokens, or the sum for its own tokens.

    SUMMED
    no      out[t] = x[t - r * share] of the rank r that has token t, if t chose an expert of this rank, or zeros
    yes     out[i] = sum of x[rank * share + i] of the ranks whose experts this token chose, in FP32, in order of ranks

    Args:
        x: Contiguous. If summed, terms [tokens, width]: bfloat16, float16 or float32. Otherwise int8 or
            int32 [share, width]: this rank's tokens, of any type.
        experts: Integers [tokens, CHOSEN], contiguous.
        out: Contiguous, like x: [share, width] if summed, or [tokens, width].
        memories: See `codegen.kernels.peers.exchange`; so are steps, rank, patience, RANKS, and PROGRAMS.
        tokens: The number of tokens of all ranks.
        share: The number of tokens of each rank; the last ranks may have fewer.
        width: Elements of a token.
        ROWS: Rows of a tile, a power of two.
        COLUMNS: Columns of a tile, a power of two; ROWS * COLUMNS elements are at most `peers.REGION` bytes.
        VECTOR: A power of two that divides `width`.
        HELD: The number of experts of each rank.
        CHOSEN: The number of experts that a token chooses.
        WIDE: A power of two, at least CHOSEN.
    """
    program = tl.program_id(0)
    length = width // VECTOR * VECTOR  # which is `width`; so the compiler sees that VECTOR divides it
    across = tl.cdiv(length, COLUMNS)
    places = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    let_next_start()
    inputs_ready()
    step = tl.load(steps + program)
    own = tl.load(memories + rank)
    for tile in range(program, tl.cdiv(share, ROWS) * across, tl.num_programs(0)):
        step += 1
        first = (program.to(tl.int64) * 2 + (step & 1)) * RANKS
        rows = (tile // across) * ROWS + tl.arange(0, ROWS)
        columns = ((tile % across) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        mine = rank * share + rows
        held = (rows < share) & (mine < tokens)
        owners = _owners_of(experts, mine.to(tl.int64), held, HELD, CHOSEN, WIDE)
        kept = tl.load(
            x + (mine if SUMMED else rows).to(tl.int64)[:, None] * length + columns,
            mask=_needs(owners, rank) & (columns < length), other=0,
        )  # fmt: skip
        for ahead in tl.static_range(1, RANKS):
            to = (rank + ahead) % RANKS
            if SUMMED:
                theirs = to * share + rows
                exist = (rows < share) & (theirs < tokens)
                sent = _needs(_owners_of(experts, theirs.to(tl.int64), exist, HELD, CHOSEN, WIDE), rank)
                given = x + theirs.to(tl.int64)[:, None] * length + columns
            else:
                sent = _needs(owners, to)
                given = x + rows.to(tl.int64)[:, None] * length + columns
            mask = sent & (columns < length)
            found = tl.load(given, mask=mask, other=0)
            tl.store(region_of(tl.load(memories + to), first + rank, kept.dtype) + places, found, mask=mask)
        meet(step, memories, rank, patience, RANKS, PROGRAMS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for other in tl.static_range(RANKS):
            theirs = other * share + rows
            exist = (rows < share) & (theirs < tokens)
            if SUMMED:
                sent = _needs(owners, other)
            else:
                sent = _needs(_owners_of(experts, theirs.to(tl.int64), exist, HELD, CHOSEN, WIDE), rank)
            # ".cg": no cache of this multiprocessor holds an old tile.
            mask = sent & (columns < length) & (other != rank)
            region = region_of(own, first + other, kept.dtype)
            found = tl.load(region + places, mask=mask, other=0, cache_modifier=".cg")
            found = tl.where(other == rank, kept, found)
            if SUMMED:
                total = found.to(tl.float32) if other == 0 else total + found.to(tl.float32)
            else:
                where = theirs.to(tl.int64)[:, None] * length + columns
                tl.store(out + where, found, mask=exist[:, None] & (columns < length))
        if SUMMED:
            where = rows.to(tl.int64)[:, None] * length + columns
            tl.store(out + where, total.to(out.dtype.element_ty), mask=(rows < share)[:, None] & (columns < length))
    tl.store(steps + program, step)
