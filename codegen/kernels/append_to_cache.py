"""Triton kernel: writes the keys and values of new tokens to a KV cache, and quantizes them on the way.

A token and head of a quantized cache has one scale; codes and scales are bit-equal to `qcompiler.numerics.quantize` in
blocks of [1, -1]. With static scales, codes are bit-equal to `qcompiler.numerics.quantize_static`.
"""

import triton
import triton.language as tl

from codegen.kernels.encoding import (
    amax_of_keys,
    codes,
    magnitude_keys,
    nan_for_infinity,
    quotients,
    scale_of,
    static_quotients,
)
from codegen.kernels.overlap import inputs_ready, let_next_start


@triton.jit
def store_rows(  # type: ignore[no-untyped-def]
    values, cache, scale, places, inside, columns, AMAX_FLOOR, TOP, RECIPROCAL, UE8M0, SIZE: tl.constexpr,
):  # fmt: skip
    """Writes rows [m, n] to the rows `places` [m, 1] of the cache, where `inside` [m, 1].

    Args:
        values: In any floating dtype; 0 in columns from SIZE on.
        scale: One number per row of the cache, or one in all; None: the cache is not quantized.
        AMAX_FLOOR: None: the scale is one number, which is only read.
        columns: 0 … n - 1, [1, n].
        SIZE: Columns of the cache.
    """
    mask = inside & (columns < SIZE)
    targets = cache + places * SIZE + columns
    if scale is None:
        tl.store(targets, values.to(cache.dtype.element_ty), mask=mask)
    elif AMAX_FLOOR is None:
        wide = values.to(tl.float32)
        if cache.dtype.element_ty != tl.int8:
            wide = nan_for_infinity(wide)  # the scale does not show that a value is not finite, so the code must
        scaled = static_quotients(wide, tl.load(scale), TOP, RECIPROCAL)
        tl.store(targets, codes(scaled, TOP, cache.dtype.element_ty), mask=mask)
    else:
        wide = values.to(tl.float32)
        s = scale_of(amax_of_keys(tl.max(magnitude_keys(wide), axis=1, keep_dims=True)), AMAX_FLOOR, TOP, UE8M0)
        tl.store(targets, codes(quotients(wide, s, RECIPROCAL or UE8M0), TOP, cache.dtype.element_ty), mask=mask)
        tl.store(scale + places, s, mask=inside)


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
    store_rows(
        values, cache, scale, places[:, None], inside[:, None], columns[None, :],
        AMAX_FLOOR, TOP, RECIPROCAL, UE8M0, SIZE,
    )  # fmt: skip


@triton.jit(do_not_specialize=[
    "rows", "tokens", "slot_count", "key_stride_b", "key_stride_h", "key_stride_s", "value_stride_b", "value_stride_h",
    "value_stride_s",
])  # fmt: skip
def append_to_cache(  # type: ignore[no-untyped-def]
    key, value, key_cache, value_cache, key_scale, value_scale, slots, lengths, rows, tokens, slot_count, capacity,
    key_stride_b, key_stride_h, key_stride_s, value_stride_b, value_stride_h, value_stride_s,
    AMAX_FLOOR: tl.constexpr, TOP: tl.constexpr, RECIPROCAL: tl.constexpr, UE8M0: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Token i of row b becomes position lengths[b] + i of slot slots[b]; nothing is written outside the cache.

    A row is one token and head. The first half of the programs appends keys, the second half values. Without the second
    half, values are within the keys.

    Args:
        key: [batch, GROUPS, tokens, SIZE] in any floating dtype, sizes contiguous; likewise `value`, with VALUE_SIZE.
        key_cache: [slot_count, GROUPS, RING or capacity, SIZE], contiguous; likewise `value_cache`, with VALUE_SIZE.
        key_scale: float32 [slot_count, GROUPS, RING or capacity], contiguous, or static [1], or None: the cache is not
            quantized; likewise `value_scale`.
        slots: int64 [batch].
        lengths: int64 [batch].
        rows: batch * GROUPS * tokens.
        key_stride_b: In units of UNIT elements, like all strides, so that loads can be wide.
        AMAX_FLOOR: As in `codegen.kernels.quantize`; likewise `TOP`, `RECIPROCAL` and `UE8M0`.
        BLOCK_M: Rows of a program, a power of two.
        RING: Positions of a slot, of which position p is at p % RING; None if all `capacity` positions have a place.
    """
    half = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    row = program % half * BLOCK_M + tl.arange(0, BLOCK_M)
    batch, group, token = row // (GROUPS * tokens), row % GROUPS, row // GROUPS % tokens
    let_next_start()
    inputs_ready()
    slot = tl.load(slots + batch, mask=row < rows, other=-1)
    position = tl.load(lengths + batch, mask=row < rows, other=-1) + token
    inside = (slot >= 0) & (slot < slot_count) & (position >= 0) & (position < capacity)
    held = capacity if RING is None else RING
    stored = position if RING is None else position % RING
    places = (slot * GROUPS + group) * held + stored
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
