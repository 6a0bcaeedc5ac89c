"""Triton kernels: attention of a few new tokens over a KV cache, split along its length (flash decoding).

    attend_to_cache   out, or for each split of the cache: its normalized sum, and the logarithm of its softmax's sum
    combine_splits    out = the splits' sums, weighted by their part of the softmax, added in a fixed order

The query heads that share a KV head, and the tokens of a chunk, are the rows of one tile: each key and value is read
once for all of them. Lengths are read on the device, so a CUDA graph stays valid while the cache fills.

8-bit codes are converted to float16, which holds them exactly. A key's scale multiplies the scores, a value's scale the
probabilities; both are FP32. The other operands are divided to fit float16's range: each row of the query by a power of
two, the scaled probabilities by the largest scale of a block. Static scales are factors of the query and of the result.

The values are the right operand of a matmul, for which shared memory is read transposed. The machine transposes 16 bits
at once, so two neighboring codes are loaded as one number and become two operands: even and odd columns.
"""

import triton
import triton.language as tl

from codegen.kernels.overlap import inputs_ready, let_next_start

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores(q, factor, k, scales, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores in units of log 2: [rows, positions] of q [rows, size] and k [size, positions]."""
    s = tl.dot(q, k, input_precision="ieee")
    if scales is not None:
        s = s * scales[None, :]
    if factor is not None:
        s = s * factor[:, None]
    if SOFTCAP is None:
        s *= SCALE * LOG2_E
    else:
        # tanh(y) = 1 - 2 / (1 + e^2y), which is exact to 1e-7 and also in the limits
        s = 1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 * LOG2_E * SCALE / SOFTCAP)))
        s *= SOFTCAP * LOG2_E
    return s


@triton.jit
def _in_float16(q):  # type: ignore[no-untyped-def]
    """q = codes * factor: each row divided by the power of two of its largest magnitude, in float16, and that power."""
    bits = tl.max(tl.abs(q).to(tl.int32, bitcast=True), axis=1) & 0x7F800000
    factor = tl.maximum(bits, 0x00800000).to(tl.float32, bitcast=True)
    return (q / factor[:, None]).to(tl.float16), factor


@triton.jit(do_not_specialize=[
    "tokens", "tiles", "splits", "slot_count", "capacity", "query_stride_b", "query_stride_h", "query_stride_s",
])  # fmt: skip
def attend_to_cache(  # type: ignore[no-untyped-def]
    query, key, value, key_scale, value_scale, slots, lengths, sinks, out, logs,
    tokens, tiles, splits, slot_count, capacity, query_stride_b, query_stride_h, query_stride_s,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LEAST: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Softmax over the positions 0 ... lengths[b] + i of slot slots[b], for token i of row b of the batch.

    A program processes a tile of rows (token by token, the REPEATS query heads of a KV head next to each other) and one
    split of the positions that any row of the tile reads. Programs without positions exit at once.

    Args:
        query: [batch, GROUPS * REPEATS, tokens, SIZE] in any floating dtype, sizes contiguous.
        key: [slot_count, GROUPS, capacity, SIZE], contiguous; likewise `value`, with VALUE_SIZE.
        key_scale: float32 [slot_count, GROUPS, capacity] if key and value are 8-bit codes, or [1] if STATIC, else None;
            likewise `value_scale`. The VALUE_SIZE of codes is even.
        slots: int64 [batch].
        lengths: int64 [batch].
        sinks: [GROUPS * REPEATS] in any floating dtype, or None.
        out: Contiguous [batch, tokens, GROUPS * REPEATS, VALUE_SIZE]; with `logs` float32 [..., splits, VALUE_SIZE].
        logs: float32 [batch, tokens, GROUPS * REPEATS, splits], base 2, or None for one split.
        tiles: Tiles of rows for each row of the batch and KV head.
        query_stride_b: In units of UNIT elements, like the other strides, so that loads can be wide.
        LEAST: Fewest blocks of a split.
    """
    BLOCK_K: tl.constexpr = max(triton.next_power_of_2(SIZE), 16)  # a matmul has no smaller sides
    BLOCK_V: tl.constexpr = max(triton.next_power_of_2(VALUE_SIZE), 16)
    let_next_start()
    inputs_ready()
    program = tl.program_id(0)
    split, tile = program % splits, program // splits % tiles
    group, batch = program // (splits * tiles) % GROUPS, program // (splits * tiles * GROUPS)

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = rows // REPEATS, group * REPEATS + rows % REPEATS
    there = token < tokens
    places = (batch.to(tl.int64) * tokens + token) * (GROUPS * REPEATS) + head

    length = tl.load(lengths + batch).to(tl.int32)
    first_token = tile * BLOCK_M // REPEATS
    last_token = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // REPEATS, tokens - 1)
    stop = tl.minimum(length + last_token + 1, capacity)
    begin = 0
    start = 0
    if WINDOW is not None:
        begin = tl.maximum(length + first_token + 1 - WINDOW, 0)
        start = begin // BLOCK_N * BLOCK_N
    blocks = tl.maximum(tl.cdiv(tl.cdiv(stop - start, BLOCK_N), splits), LEAST)
    start += split * blocks * BLOCK_N
    stop = tl.minimum(start + blocks * BLOCK_N, stop)
    if start >= stop:
        if logs is not None:
            tl.store(logs + places * splits + split, float("-inf"), mask=there)
        return

    CODES: tl.constexpr = 1 if value_scale is None else 2  # in one number of a value
    inner, across = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V // CODES)
    q_places = batch.to(tl.int64) * (query_stride_b * UNIT)
    q_places += head * (query_stride_h * UNIT) + token * (query_stride_s * UNIT)
    q = tl.load(query + q_places[:, None] + inner[None, :], mask=there[:, None] & (inner < SIZE)[None, :], other=0.0)
    factor = None
    if key_scale is not None:
        q, factor = _in_float16(q.to(tl.float32))
        if STATIC:
            factor *= tl.load(key_scale)
    else:
        q = q.to(key.dtype.element_ty)

    slot = tl.load(slots + batch)
    slot = tl.minimum(tl.maximum(slot, 0), slot_count - 1)  # never outside the cache
    origin = (slot * GROUPS + group) * capacity
    keys, values = key + origin * SIZE, value + origin * VALUE_SIZE
    if CODES == 2:
        values = values.to(tl.pointer_type(tl.uint16), bitcast=True)
    own = length + token  # the row's own position
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:  # as if they were scores of the first split
        sink = tl.load(sinks + head, mask=there & (split == 0), other=float("-inf"))
        top = sink.to(tl.float32) * LOG2_E
        total = tl.where(top > float("-inf"), 1.0, 0.0)
    sums = tl.zeros([BLOCK_M, BLOCK_V // CODES], tl.float32)
    odd = tl.zeros([BLOCK_M, BLOCK_V // CODES], tl.float32)
    for position in range(start, stop, BLOCK_N):
        at = position + tl.arange(0, BLOCK_N)
        inside = at < stop
        if WINDOW is not None:
            inside &= at >= begin
        k = tl.load(
            keys + at[None, :] * SIZE + inner[:, None], mask=inside[None, :] & (inner < SIZE)[:, None], other=0.0
        )  # fmt: skip
        v = tl.load(
            values + at[:, None] * (VALUE_SIZE // CODES) + across[None, :],
            mask=inside[:, None] & (across < VALUE_SIZE // CODES)[None, :], other=0,
        )  # fmt: skip
        k_scales = None
        if key_scale is not None and not STATIC:
            k_scales = tl.load(key_scale + origin + at, mask=inside, other=0.0)
        s = _scores(q, factor, k.to(q.dtype), k_scales, SCALE, SOFTCAP)
        seen = (at[None, :] <= own[:, None]) & inside[None, :]
        if WINDOW is not None:
            seen &= at[None, :] > own[:, None] - WINDOW
        s = tl.where(seen, s, float("-inf"))

        higher = tl.maximum(top, tl.max(s, axis=1))
        held = tl.where(higher == float("-inf"), 0.0, higher)  # rows that see nothing yet
        keep = tl.exp2(top - held)
        p = tl.exp2(s - held[:, None])
        total = total * keep + tl.sum(p, axis=1)
        top = higher
        if CODES == 2:
            largest = 1.0
            if not STATIC:
                v_scales = tl.load(value_scale + origin + at, mask=inside, other=0.0)
                largest = tl.max(v_scales, axis=0)
                p *= (v_scales / largest)[None, :]
            weights = p.to(tl.float16)
            first = v.to(tl.uint8).to(value.dtype.element_ty, bitcast=True).to(tl.float16)
            second = (v >> 8).to(tl.uint8).to(value.dtype.element_ty, bitcast=True).to(tl.float16)
            sums = sums * keep[:, None] + tl.dot(weights, first) * largest
            odd = odd * keep[:, None] + tl.dot(weights, second) * largest
        else:
            sums = tl.dot(p.to(v.dtype), v, sums * keep[:, None], input_precision="ieee")

    if CODES == 2:
        sums = tl.interleave(sums, odd)
        if STATIC:
            sums *= tl.load(value_scale)
        across = tl.arange(0, BLOCK_V)
    sums /= tl.where(total > 0.0, total, 1.0)[:, None]  # a row without positions is zero
    filled = there[:, None] & (across < VALUE_SIZE)[None, :]
    if logs is not None:
        tl.store(logs + places * splits + split, top + tl.log2(total), mask=there)
        places = places * splits + split
    tl.store(out + places[:, None] * VALUE_SIZE + across[None, :], sums.to(out.dtype.element_ty), mask=filled)


@triton.jit(do_not_specialize=["splits"])
def combine_splits(  # type: ignore[no-untyped-def]
    partial, logs, out, splits, VALUE_SIZE: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """out[row] = sum over splits of partial[row, split] * 2^logs[row, split] / sum of 2^logs[row, split].

    A split without positions has a logarithm of -inf; its `partial` is not read. A program combines one row.

    Args:
        partial: float32 [rows, splits, VALUE_SIZE], contiguous.
        logs: float32 [rows, splits], contiguous.
        out: Any floating dtype [rows, VALUE_SIZE], contiguous.
        SPLITS: The next power of two.
    """
    BLOCK_V: tl.constexpr = triton.next_power_of_2(VALUE_SIZE)
    row = tl.program_id(0).to(tl.int64)
    split, across = tl.arange(0, SPLITS), tl.arange(0, BLOCK_V)
    let_next_start()
    inputs_ready()
    log = tl.load(logs + row * splits + split, mask=split < splits, other=float("-inf"))
    top = tl.max(log, axis=0)
    weights = tl.exp2(log - tl.where(top == float("-inf"), 0.0, top))
    there = (log > float("-inf"))[:, None] & (across < VALUE_SIZE)[None, :]
    parts = tl.load(
        partial + (row * splits + split)[:, None] * VALUE_SIZE + across[None, :], mask=there, other=0.0
    )  # fmt: skip
    total = tl.sum(weights, axis=0)
    result = tl.sum(parts * weights[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * VALUE_SIZE + across, result.to(out.dtype.element_ty), mask=across < VALUE_SIZE)
