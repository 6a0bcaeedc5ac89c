"""Triton kernels: attention of a few new tokens over a KV cache, split along its length (flash decoding).

    attend_to_cache   out, or for each split of the cache: its normalized sum, and the logarithm of its softmax's sum
    combine_splits    out = the splits' sums, weighted by their part of the softmax, added in a fixed order

The kernel that writes the result can quantize it for the next matmul, in tiles that lie within a head or, only in
`combine_splits`, cover several.

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

from codegen.kernels.encoding import store_tiles
from codegen.kernels.overlap import inputs_ready, let_next_start, prefetch

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


@triton.jit
def _positions(  # type: ignore[no-untyped-def]
    length, tile, split, splits, tokens, capacity, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    REPEATS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """The first position that a tile reads, and where a split of its positions starts and stops."""
    first_token = tile * BLOCK_M // REPEATS
    last_token = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // REPEATS, tokens - 1)
    stop = tl.minimum(length + last_token + 1, capacity)
    begin = 0
    start = 0
    if WINDOW is not None:
        begin = tl.maximum(length + first_token + 1 - WINDOW, 0)
    if CHUNK is not None:
        begin = tl.maximum((length + first_token) // CHUNK * CHUNK, begin)
    if WINDOW is not None or CHUNK is not None:
        start = begin // BLOCK_N * BLOCK_N
    blocks = tl.maximum(tl.cdiv(tl.cdiv(stop - start, BLOCK_N), splits), LEAST)
    start += split * blocks * BLOCK_N
    return begin, start, tl.minimum(start + blocks * BLOCK_N, stop)


@triton.jit
def _prefetch_rows(  # type: ignore[no-untyped-def]
    rows, origin, start, stop, SIZE: tl.constexpr, POSITIONS: tl.constexpr, RING: tl.constexpr
):  # fmt: skip
    """Moves the first POSITIONS rows of SIZE elements from `start` on, but none from `stop` on, to the L2 cache."""
    LINE: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.next_power_of_2((POSITIONS * SIZE + LINE - 1) // LINE)
    place = start * SIZE + tl.arange(0, LINES) * LINE
    place = tl.minimum(place, stop * SIZE - 1)
    prefetch(rows + origin * SIZE + (place if RING is None else place % (RING * SIZE)))


@triton.jit(do_not_specialize=[
    "tokens", "tiles", "splits", "slot_count", "capacity", "query_stride_b", "query_stride_h", "query_stride_s",
    "out_scale_stride_k",
])  # fmt: skip
def attend_to_cache(  # type: ignore[no-untyped-def]
    query, key, value, key_scale, value_scale, slots, lengths, sinks, slopes, out, out_scale, logs,
    tokens, tiles, splits, slot_count, capacity, query_stride_b, query_stride_h, query_stride_s,
    out_scale_stride_m, out_scale_stride_k,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, GROUPS: tl.constexpr,
    REPEATS: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEAST: tl.constexpr, STATIC: tl.constexpr, RING: tl.constexpr, AHEAD: tl.constexpr,
    TILE: tl.constexpr,
    AMAX_FLOOR: tl.constexpr, TOP: tl.constexpr, RECIPROCAL: tl.constexpr, UE8M0: tl.constexpr,
):  # fmt: skip
    """Softmax over the positions 0 ... lengths[b] + i of slot slots[b], for token i of row b of the batch.

    A program processes a tile of rows (token by token, the REPEATS query heads of a KV head next to each other) and one
    split of the positions that any row of the tile reads. Programs without positions exit at once.

    Args:
        query: [batch, GROUPS * REPEATS, tokens, SIZE] in any floating dtype, sizes contiguous.
        key: [slot_count, GROUPS, RING or capacity, SIZE], contiguous; likewise `value`, with VALUE_SIZE.
        key_scale: float32 [slot_count, GROUPS, RING or capacity] if key and value are 8-bit codes, or [1] if STATIC,
            else None; likewise `value_scale`. The VALUE_SIZE of codes is even.
        slots: int64 [batch].
        lengths: int64 [batch].
        sinks: [GROUPS * REPEATS] in any floating dtype, or None.
        slopes: float32 [GROUPS * REPEATS], factors of the distance to a key, or None.
        out: Contiguous [batch, tokens, GROUPS * REPEATS, VALUE_SIZE]: a floating dtype, or codes of 8 bits with
            `out_scale`; with `logs` float32 [..., splits, VALUE_SIZE].
        out_scale: float32 [batch * tokens, GROUPS * REPEATS * VALUE_SIZE / TILE] with any two strides, or None.
        logs: float32 [batch, tokens, GROUPS * REPEATS, splits], base 2, or None for one split.
        tiles: Tiles of rows for each row of the batch and KV head.
        query_stride_b: In units of UNIT elements, like the other strides, so that loads can be wide.
        LEAST: Fewest blocks of a split.
        RING: Positions of a slot, of which position p is at p % RING; None if all `capacity` positions have a place.
        AHEAD: While earlier kernels still run, move the first LEAST blocks of the split to the L2 cache.
        TILE: Columns of a head that share a scale of the codes; it divides VALUE_SIZE.
        AMAX_FLOOR: As in `quantize_tiles`; likewise `TOP`, `RECIPROCAL` and `UE8M0`.
    """
    BLOCK_K: tl.constexpr = max(triton.next_power_of_2(SIZE), 16)  # a matmul has no smaller sides
    BLOCK_V: tl.constexpr = max(triton.next_power_of_2(VALUE_SIZE), 16)
    program = tl.program_id(0)
    split, tile = program % splits, program // splits % tiles
    group, batch = program // (splits * tiles) % GROUPS, program // (splits * tiles * GROUPS)
    let_next_start()
    if AHEAD:
        # An earlier kernel may still write slots and lengths, so they are read again after the wait.
        length = tl.load(lengths + batch, volatile=True).to(tl.int32)
        slot = tl.load(slots + batch, volatile=True)
        _, start, stop = _positions(
            length, tile, split, splits, tokens, capacity, WINDOW, CHUNK, REPEATS, BLOCK_M, BLOCK_N, LEAST
        )  # fmt: skip
        if start < stop:
            origin = tl.minimum(tl.maximum(slot, 0), slot_count - 1) * GROUPS + group
            origin *= capacity if RING is None else RING
            _prefetch_rows(key, origin, start, stop, SIZE, LEAST * BLOCK_N, RING)
            _prefetch_rows(value, origin, start, stop, VALUE_SIZE, LEAST * BLOCK_N, RING)
            if key_scale is not None and not STATIC:
                _prefetch_rows(key_scale, origin, start, stop, 1, LEAST * BLOCK_N, RING)
                _prefetch_rows(value_scale, origin, start, stop, 1, LEAST * BLOCK_N, RING)
    inputs_ready()
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = rows // REPEATS, group * REPEATS + rows % REPEATS
    there = token < tokens
    places = (batch.to(tl.int64) * tokens + token) * (GROUPS * REPEATS) + head

    # Volatile loads are not from L1, and come before the branch: all three loads wait for memory together.
    length = tl.load(lengths + batch, volatile=True).to(tl.int32)
    slot = tl.load(slots + batch, volatile=True)
    inner = tl.arange(0, BLOCK_K)
    q_places = batch.to(tl.int64) * (query_stride_b * UNIT)
    q_places += head * (query_stride_h * UNIT) + token * (query_stride_s * UNIT)
    q = tl.load(query + q_places[:, None] + inner[None, :], mask=there[:, None] & (inner < SIZE)[None, :], other=0.0)
    begin, start, stop = _positions(
        length, tile, split, splits, tokens, capacity, WINDOW, CHUNK, REPEATS, BLOCK_M, BLOCK_N, LEAST
    )  # fmt: skip
    if start >= stop:
        if logs is not None:
            whole = tl.arange(0, BLOCK_V)
            filled = there[:, None] & (whole < VALUE_SIZE)[None, :]
            tl.store(logs + places * splits + split, float("-inf"), mask=there)
            # Zeros, so that `combine_splits` need not wait for the logarithms before it loads.
            tl.store(out + ((places * splits + split) * VALUE_SIZE)[:, None] + whole[None, :], 0.0, mask=filled)
        return

    CODES: tl.constexpr = 1 if value_scale is None else 2  # in one number of a value
    across = tl.arange(0, BLOCK_V // CODES)
    factor = None
    if key_scale is not None:
        q, factor = _in_float16(q.to(tl.float32))
        if STATIC:
            factor *= tl.load(key_scale)
    else:
        q = q.to(key.dtype.element_ty)

    slot = tl.minimum(tl.maximum(slot, 0), slot_count - 1)  # never outside the cache
    origin = (slot * GROUPS + group) * (capacity if RING is None else RING)
    keys, values = key + origin * SIZE, value + origin * VALUE_SIZE
    if CODES == 2:
        values = values.to(tl.pointer_type(tl.uint16), bitcast=True)
    own = length + token  # the row's own position
    if slopes is not None:
        slope = tl.load(slopes + head, mask=there, other=0.0) * LOG2_E
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
        if WINDOW is not None or CHUNK is not None:
            inside &= at >= begin
        stored = at if RING is None else at % RING
        k = tl.load(
            keys + stored[None, :] * SIZE + inner[:, None], mask=inside[None, :] & (inner < SIZE)[:, None], other=0.0
        )  # fmt: skip
        v = tl.load(
            values + stored[:, None] * (VALUE_SIZE // CODES) + across[None, :],
            mask=inside[:, None] & (across < VALUE_SIZE // CODES)[None, :], other=0,
        )  # fmt: skip
        k_scales = None
        if key_scale is not None and not STATIC:
            k_scales = tl.load(key_scale + origin + stored, mask=inside, other=0.0)
        s = _scores(q, factor, k.to(q.dtype), k_scales, SCALE, SOFTCAP)
        if slopes is not None:
            s += slope[:, None] * (at[None, :] - own[:, None]).to(tl.float32)
        seen = (at[None, :] <= own[:, None]) & inside[None, :]
        if WINDOW is not None:
            seen &= at[None, :] > own[:, None] - WINDOW
        if CHUNK is not None:
            seen &= at[None, :] >= (own // CHUNK * CHUNK)[:, None]
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
                v_scales = tl.load(value_scale + origin + stored, mask=inside, other=0.0)
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
    if out_scale is None:
        tl.store(out + places[:, None] * VALUE_SIZE + across[None, :], sums.to(out.dtype.element_ty), mask=filled)
    else:
        rounded = sums.to(query.dtype.element_ty).to(tl.float32)
        lines = (batch.to(tl.int64) * tokens + token) * out_scale_stride_m
        lines += head.to(tl.int64) * (VALUE_SIZE // TILE) * out_scale_stride_k
        store_tiles(
            rounded, out, out_scale, (places * VALUE_SIZE)[:, None], lines[:, None], out_scale_stride_k,
            there[:, None], across[None, :], VALUE_SIZE, TILE, AMAX_FLOOR, TOP, RECIPROCAL, UE8M0,
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "out_scale_stride_k"])
def combine_splits(  # type: ignore[no-untyped-def]
    partial, logs, out, out_scale, splits, out_scale_stride_m, out_scale_stride_k,
    VALUE_SIZE: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr, TOGETHER: tl.constexpr, DTYPE: tl.constexpr,
    TILE: tl.constexpr, AMAX_FLOOR: tl.constexpr, TOP: tl.constexpr, RECIPROCAL: tl.constexpr, UE8M0: tl.constexpr,
):  # fmt: skip
    """out[row] = sum over splits of partial[row, split] * 2^logs[row, split] / sum of 2^logs[row, split].

    A row is a head of a token. A program combines neighboring heads of one token. A split without positions has zeros
    and a logarithm of -inf. Nothing is loaded after something else, because the kernel's time is the latency of memory.

    Args:
        partial: float32 [tokens, HEADS, splits, VALUE_SIZE], contiguous.
        logs: float32 [tokens, HEADS, splits], contiguous.
        out: Contiguous [tokens, HEADS, VALUE_SIZE]: a floating dtype, or codes of 8 bits with `out_scale`.
        out_scale: float32 [tokens, ceil(HEADS * VALUE_SIZE / TILE)] with any two strides, or None.
        SPLITS: The next power of two.
        TOGETHER: Heads of a program, a power of two; 1 unless tiles cover several heads.
        DTYPE: The result is rounded to it before it is quantized.
        TILE: Columns that share a scale: they divide VALUE_SIZE, or are TOGETHER * VALUE_SIZE.
        AMAX_FLOOR: As in `quantize_tiles`; likewise `TOP`, `RECIPROCAL` and `UE8M0`.
    """
    BLOCK_V: tl.constexpr = triton.next_power_of_2(VALUE_SIZE)
    PARTS: tl.constexpr = (HEADS + TOGETHER - 1) // TOGETHER  # programs of a token
    token, first = tl.program_id(0).to(tl.int64) // PARTS, tl.program_id(0) % PARTS * TOGETHER
    head, split, across = first + tl.arange(0, TOGETHER), tl.arange(0, SPLITS), tl.arange(0, BLOCK_V)
    places = (token * HEADS + head)[:, None] * splits + split[None, :]
    there = (head < HEADS)[:, None] & (split < splits)[None, :]
    let_next_start()
    inputs_ready()
    log = tl.load(logs + places, mask=there, other=float("-inf"))
    parts = tl.load(
        partial + places[:, :, None] * VALUE_SIZE + across[None, None, :],
        mask=there[:, :, None] & (across < VALUE_SIZE)[None, None, :], other=0.0,
    )  # fmt: skip
    top = tl.max(log, axis=1)
    weights = tl.exp2(log - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(weights, axis=1)
    result = tl.sum(parts * weights[:, :, None], axis=1) / tl.where(total > 0.0, total, 1.0)[:, None]
    result = tl.reshape(result, (1, TOGETHER * BLOCK_V))
    columns = tl.arange(0, TOGETHER * BLOCK_V)[None, :]
    start = token * (HEADS * VALUE_SIZE) + first * VALUE_SIZE + tl.zeros([1, 1], tl.int64)
    size = tl.minimum(HEADS - first, TOGETHER) * VALUE_SIZE
    if out_scale is None:
        tl.store(out + start + columns, result.to(out.dtype.element_ty), mask=columns < size)
    else:
        line = token * out_scale_stride_m + (first * VALUE_SIZE // TILE).to(tl.int64) * out_scale_stride_k
        store_tiles(
            result.to(DTYPE).to(tl.float32), out, out_scale, start, line + tl.zeros([1, 1], tl.int64),
            out_scale_stride_k, start >= 0, columns, size, TILE, AMAX_FLOOR, TOP, RECIPROCAL, UE8M0,
        )  # fmt: skip
