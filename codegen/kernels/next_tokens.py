"""Triton kernels: the largest logit of each row becomes the next token of its sequence.

A logit and its index are one number of 64 bits, which compares like the logit and, among equal logits, like the index
in reverse. So the largest one has the first index of the largest logit, in any order of reduction, also across ranks
that hold different columns. As in torch, NaN is larger than all numbers, and -0 equals 0.
"""

import triton
import triton.language as tl

from codegen.kernels.overlap import inputs_ready, let_next_start

LAST = tl.constexpr(2**31 - 1)
"""The largest index."""


@triton.jit
def _ranked(logits, index, inside):  # type: ignore[no-untyped-def]
    """Logits with their indices as numbers; smaller than any of them outside the row."""
    wide = logits.to(tl.float32)
    bits = wide.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & LAST)  # as signed integers, in the order of the logits
    key = tl.where(wide == 0.0, 0, key)
    key = tl.where(wide != wide, LAST, key)
    key = tl.where(inside, key, -LAST - 1)
    # index ^ LAST is LAST - index
    return (key.to(tl.int64) << 32) | (index ^ LAST).to(tl.int64)


@triton.jit
def rank_parts(  # type: ignore[no-untyped-def]
    logits, parts, rows, columns, stride, first, PART: tl.constexpr,
):  # fmt: skip
    """The largest logit of each part of a row, with its index in the vocabulary.

    Args:
        logits: [rows, columns] in bfloat16, float16 or float32; the last stride is 1.
        parts: int64 [parts of a row, rows].
        stride: From one row to the next.
        first: The index of the first column; `first + columns` is at most 2^31.
        PART: Columns of a part, a power of two.
    """
    program = tl.program_id(0)
    row, part = (program % rows).to(tl.int64), program // rows
    index = part * PART + tl.arange(0, PART)
    inside = index < columns
    let_next_start()
    inputs_ready()
    found = tl.load(logits + row * stride + index, mask=inside, other=0.0)
    tl.store(parts + program, tl.max(_ranked(found, first + index, inside), axis=0))


@triton.jit
def enter_tokens(  # type: ignore[no-untyped-def]
    parts, slots, active, tokens, lengths, row_tokens, row_lengths, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Enters the largest logit of a row as the latest token of its slot, whose length grows if it is active.

    Args:
        parts: int64 [COUNT, rows], as `rank_parts` writes them; of one rank, or of several ones.
        slots: int64 [rows].
        active: int64 [slots]: 1 or 0.
        tokens: int64 [slots], overwritten for the slots of rows; likewise `lengths`.
        row_tokens: int64 [rows], overwritten.
        row_lengths: int64 [rows]: the lengths of the slots before this step; overwritten.
        BLOCK: A power of two, at least COUNT.
    """
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    let_next_start()
    inputs_ready()
    slot = tl.load(slots + row)
    length = tl.load(row_lengths + row) + tl.load(active + slot)
    ranked = tl.load(parts + part * tl.num_programs(0) + row, mask=part < COUNT, other=-(2**63))
    token = (tl.max(ranked, axis=0) & LAST) ^ LAST
    tl.store(tokens + slot, token)
    tl.store(row_tokens + row, token)
    tl.store(lengths + slot, length)
    tl.store(row_lengths + row, length)
