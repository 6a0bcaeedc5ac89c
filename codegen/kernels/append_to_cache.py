"""Triton kernel: writes the keys and values of new tokens to a KV cache, and quantizes them on the way.

A token and head of a quantized cache has one scale; codes and scales are bit-equal to `qcompiler.numerics.quantize` in
blocks of [1, -1].
"""

import triton
import triton.language as tl

from codegen.kernels.encoding import amax_of_keys, codes, magnitude_keys, quotients, scale_of


@triton.jit
def _append(  # type: ignore[no-untyped-def]
    x, cache, scale, rows, places, inside, tokens, stride_b, stride_h, stride_s,
    AMAX_FLOOR, TOP, RECIPROCAL, UE8M0, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Writes rows of x [batch, GROUPS, tokens, SIZE] to the rows `places` of the cache, where `inside`."""
    columns = tl.arange(0, triton.next_power_of_2(SIZE))
    mask = inside[:, None] & (columns < SIZE)[None, :]
    batch, token = (rows // (GROUPS * tokens)).to(tl.int64), rows // GROUPS % tokens
    starts = batch * stride_b + (rows % GROUPS) * stride_h + token * stride_s
    values = tl.load(x + starts[:, None] + columns[None, :], mask=mask, other=0.0)
    targets = cache + places[:, None] * SIZE + columns[None, :]
    if scale is not None:
        wide = values.to(tl.float32)
        s = scale_of(amax_of_keys(tl.max(magnitude_keys(wide), axis=1)), AMAX_FLOOR, TOP, UE8M0)
        scaled = quotients(wide, s[:, None], RECIPROCAL or UE8M0)
        tl.store(targets, codes(scaled, TOP, cache.dtype.element_ty), mask=mask)
        tl.store(scale + places, s, mask=inside)
    else:
        tl.store(targets, values.to(cache.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[
    "rows", "tokens", "slot_count", "key_stride_b", "key_stride_h", "key_stride_s", "value_stride_b", "value_stride_h",
    "value_stride_s",
])  # fmt: skip
def append_to_cache(  # type: ignore[no-untyped-def]
    key, value, key_cache, value_cache, key_scale, value_scale, slots, lengths, rows, tokens, slot_count, capacity,
    key_stride_b, key_stride_h, key_stride_s, value_stride_b, value_stride_h, value_stride_s,
    AMAX_FLOOR: tl.constexpr, TOP: tl.constexpr, RECIPROCAL: tl.constexpr, UE8M0: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Token i of row b becomes position lengths[b] + i of slot slots[b]; nothing is written outside the cache.

    A row is one token and head. The first half of the programs appends keys, the second half values.

    Args:
        key: [batch, GROUPS, tokens, SIZE] in any floating dtype, sizes contiguous; likewise `value`, with VALUE_SIZE.
        key_cache: [slot_count, GROUPS, capacity, SIZE], contiguous; likewise `value_cache`, with VALUE_SIZE.
        key_scale: float32 [slot_count, GROUPS, capacity], contiguous, or None: the cache is not quantized; likewise
            `value_scale`.
        slots: int64 [batch].
        lengths: int64 [batch].
        rows: batch * GROUPS * tokens.
        key_stride_b: In units of UNIT elements, like all strides, so that loads can be wide.
        AMAX_FLOOR: As in `codegen.kernels.quantize`; likewise `TOP`, `RECIPROCAL` and `UE8M0`.
        BLOCK_M: Rows of a program, a power of two.
    """
    half = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    row = program % half * BLOCK_M + tl.arange(0, BLOCK_M)
    batch, group, token = row // (GROUPS * tokens), row % GROUPS, row // GROUPS % tokens
    slot = tl.load(slots + batch, mask=row < rows, other=-1)
    position = tl.load(lengths + batch, mask=row < rows, other=-1) + token
    inside = (slot >= 0) & (slot < slot_count) & (position >= 0) & (position < capacity)
    places = (slot * GROUPS + group) * capacity + position
    if program < half:
        _append(
            key, key_cache, key_scale, row, places, inside, tokens, key_stride_b * UNIT, key_stride_h * UNIT,
            key_stride_s * UNIT, AMAX_FLOOR, TOP, RECIPROCAL, UE8M0, GROUPS, SIZE,
        )  # fmt: skip
    else:
        _append(
            value, value_cache, value_scale, row, places, inside, tokens, value_stride_b * UNIT, value_stride_h * UNIT,
            value_stride_s * UNIT, AMAX_FLOOR, TOP, RECIPROCAL, UE8M0, GROUPS, VALUE_SIZE,
        )  # fmt: skip
