"""Triton kernel: reads the first positions of slots of a KV cache, codes times scales, as contiguous tensors."""

import triton
import triton.language as tl

from codegen.kernels.overlap import inputs_ready, let_next_start


@triton.jit
def _read(  # type: ignore[no-untyped-def]
    out, cache, scale, targets, places, inside, STATIC: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Copies the rows `places` of the cache to the rows `targets`, where `inside`; all are [rows]."""
    columns = tl.arange(0, triton.next_power_of_2(SIZE))
    mask = inside[:, None] & (columns < SIZE)[None, :]
    values = tl.load(cache + places[:, None] * SIZE + columns[None, :], mask=mask, other=0.0)
    if scale is not None:
        values = values.to(tl.float32)
        values *= tl.load(scale) if STATIC else tl.load(scale + places, mask=inside, other=0.0)[:, None]
    tl.store(out + targets[:, None] * SIZE + columns[None, :], values.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "end", "slot_count"])
def read_cache(  # type: ignore[no-untyped-def]
    key_out, value_out, key, value, key_scale, value_scale, slots, rows, end, slot_count, capacity,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, STATIC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Keys and values of the positions 0 … end - 1 of slots[b], for each row b and KV head.

    The first half of the programs reads keys, the second half values.

    Args:
        key_out: [batch, GROUPS, end, SIZE] in a floating dtype, contiguous; likewise `value_out`, with VALUE_SIZE.
        key: [slot_count, GROUPS, capacity, SIZE], contiguous; likewise `value`, with VALUE_SIZE.
        key_scale: float32 [slot_count, GROUPS, capacity], contiguous, or static [1], or None: the cache is not
            quantized; likewise `value_scale`.
        slots: int64 [batch].
        rows: batch * GROUPS * end, below 2^31.
        STATIC: The scales are [1].
        BLOCK_M: Rows of a program, a power of two.
    """
    half = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    row = program % half * BLOCK_M + tl.arange(0, BLOCK_M)
    let_next_start()
    inputs_ready()
    slot = tl.load(slots + row // (GROUPS * end), mask=row < rows, other=0)
    slot = tl.minimum(tl.maximum(slot, 0), slot_count - 1)  # never outside the cache
    places = (slot * GROUPS + row // end % GROUPS) * capacity + row % end
    if program < half:
        _read(key_out, key, key_scale, row.to(tl.int64), places, row < rows, STATIC, SIZE)
    else:
        _read(value_out, value, value_scale, row.to(tl.int64), places, row < rows, STATIC, VALUE_SIZE)
