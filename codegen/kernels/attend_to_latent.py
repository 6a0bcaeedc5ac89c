"""Triton kernel: attention of new tokens over a KV cache whose values are the first elements of its keys (MLA).

    scores = q[:, :512] . latent + q[:, 512:] . rope        softmax        out = probabilities . latent

Each block of the cache is read once, for scores and for sums: the latent part is the right operand of both matmuls. All
query heads of a token share it, so tiles have 64 rows and use the wide tensor-core instruction; the sums of a row, 512
elements, are spread over two groups of four warps. Splits of the cache's length are added by `combine_splits`.

8-bit codes are converted to the dtype of the query, or to bfloat16 if that is float32, once for both matmuls: these
types hold them exactly, and the query is an operand as it is loaded, without registers in the loop. A token's scale
multiplies its scores and its probability, which is divided by the largest scale so far to fit float16's range.
"""

import triton
import triton.language as tl

from codegen.kernels.attend_to_cache import LOG2_E
from codegen.kernels.overlap import inputs_ready, let_next_start


@triton.jit
def _places(batch, group, rows, tokens, GROUPS: tl.constexpr, REPEATS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The places of rows of a tile in [batch, tokens, GROUPS * REPEATS]."""
    head = group * REPEATS + rows % REPEATS
    return (batch.to(tl.int64) * tokens + rows // REPEATS) * (GROUPS * REPEATS) + head


@triton.jit(do_not_specialize=[
    "tokens", "tiles", "splits", "slot_count", "capacity", "query_stride_b", "query_stride_h", "query_stride_s",
])  # fmt: skip
def attend_to_latent(  # type: ignore[no-untyped-def]
    query, key, scale, slots, lengths, out, logs,
    tokens, tiles, splits, slot_count, capacity, query_stride_b, query_stride_h, query_stride_s,
    SCALE: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """Softmax over the positions 0 ... lengths[b] + i of slot slots[b], for token i of row b of the batch.

    Programs, tiles, splits and arguments are as in `attend_to_cache`, except:

    Args:
        key: [slot_count, GROUPS, capacity, SIZE], contiguous; the first VALUE_SIZE elements are the values.
        scale: float32 [slot_count, GROUPS, capacity] if keys are 8-bit codes, or [1] if STATIC, else None.
    """
    BLOCK_V: tl.constexpr = max(triton.next_power_of_2(VALUE_SIZE), 16)
    BLOCK_R: tl.constexpr = max(triton.next_power_of_2(SIZE - VALUE_SIZE), 16)
    let_next_start()
    inputs_ready()
    program = tl.program_id(0)
    split, tile = program % splits, program // splits % tiles
    group, batch = program // (splits * tiles) % GROUPS, program // (splits * tiles * GROUPS)

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = rows // REPEATS, group * REPEATS + rows % REPEATS
    there = token < tokens
    across, beside = tl.arange(0, BLOCK_V), VALUE_SIZE + tl.arange(0, BLOCK_R)

    length = tl.load(lengths + batch).to(tl.int32)
    last_token = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // REPEATS, tokens - 1)
    stop = tl.minimum(length + last_token + 1, capacity)
    blocks = tl.maximum(tl.cdiv(tl.cdiv(stop, BLOCK_N), splits), LEAST)
    start = split * blocks * BLOCK_N
    stop = tl.minimum(start + blocks * BLOCK_N, stop)
    if start >= stop:
        if logs is not None:
            places = _places(batch, group, rows, tokens, GROUPS, REPEATS)
            tl.store(logs + places * splits + split, float("-inf"), mask=there)
            # Zeros, so that `combine_splits` need not wait for the logarithms before it loads.
            few = tl.arange(0, 16)  # fewer addresses take fewer registers during the loop
            lines = ((places * splits + split) * VALUE_SIZE)[:, None] + few[None, :]
            for column in range(0, VALUE_SIZE, 16):
                tl.store(out + lines + column, 0.0, mask=there[:, None] & (column + few < VALUE_SIZE)[None, :])
        return

    q_places = batch.to(tl.int64) * (query_stride_b * UNIT)
    q_places += head * (query_stride_h * UNIT) + token * (query_stride_s * UNIT)
    q = tl.load(
        query + q_places[:, None] + across[None, :], mask=there[:, None] & (across < VALUE_SIZE)[None, :], other=0.0
    )  # fmt: skip
    q_beside = tl.load(
        query + q_places[:, None] + beside[None, :], mask=there[:, None] & (beside < SIZE)[None, :], other=0.0
    )  # fmt: skip
    if scale is None:
        q, q_beside = q.to(key.dtype.element_ty), q_beside.to(key.dtype.element_ty)
    elif query.dtype.element_ty == tl.float32:
        q, q_beside = q.to(tl.bfloat16), q_beside.to(tl.bfloat16)

    slot = tl.load(slots + batch)
    slot = tl.minimum(tl.maximum(slot, 0), slot_count - 1)  # never outside the cache
    origin = (slot * GROUPS + group) * capacity
    keys = key + origin * SIZE
    own = length + token  # the row's own position
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    largest = 1e-30  # scale so far, by which the sums are divided
    each = tl.arange(0, BLOCK_N)
    for position in tl.range(start, stop, BLOCK_N, disable_licm=True):
        at = position + each
        inside = at < stop
        block = keys + position * SIZE  # so that threads add constants to one address
        here, there_too = inside[:, None], inside[None, :]
        if BLOCK_V != VALUE_SIZE:
            here &= (across < VALUE_SIZE)[None, :]
        if BLOCK_R != SIZE - VALUE_SIZE:
            there_too &= (beside < SIZE)[:, None]
        latent = tl.load(block + (each[:, None] * SIZE + across[None, :]), mask=here, other=0.0)
        k = tl.load(block + (each[None, :] * SIZE + beside[:, None]), mask=there_too, other=0.0)
        if key.dtype.element_ty == tl.int8:
            latent, k = latent.to(tl.float32), k.to(tl.float32)
        latent, k = latent.to(q.dtype), k.to(q.dtype)
        s = tl.dot(q, tl.trans(latent), input_precision="ieee")
        s = tl.dot(q_beside, k, s, input_precision="ieee")
        scales = None
        if scale is not None and not STATIC:
            scales = tl.load(scale + origin + at, mask=inside, other=0.0)
            s *= scales[None, :]
        elif STATIC:
            s *= tl.load(scale)
        s = tl.where((at[None, :] <= own[:, None]) & inside[None, :], s * (SCALE * LOG2_E), float("-inf"))

        higher = tl.maximum(top, tl.max(s, axis=1))
        held = tl.where(higher == float("-inf"), 0.0, higher)  # rows that see nothing yet
        keep = tl.exp2(top - held)
        p = tl.exp2(s - held[:, None])
        total = total * keep + tl.sum(p, axis=1)
        top = higher
        if scales is not None:
            more = tl.maximum(largest, tl.max(scales, axis=0))
            keep *= largest / more
            largest = more
            p *= (scales / largest)[None, :]
        sums = tl.dot(p.to(latent.dtype), latent, sums * keep[:, None], input_precision="ieee")

    if scale is not None:
        sums *= tl.load(scale) if STATIC else largest
    sums /= tl.where(total > 0.0, total, 1.0)[:, None]  # a row without positions is zero
    # The rows again, from a value that differs from `tile` to the compiler: so they take no registers during the loop.
    rows = (tile + tl.minimum(stop, 0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < tokens * REPEATS
    places = _places(batch, group, rows, tokens, GROUPS, REPEATS)
    if logs is not None:
        tl.store(logs + places * splits + split, top + tl.log2(total), mask=there)
        places = places * splits + split
    filled = there[:, None] & (across < VALUE_SIZE)[None, :]
    tl.store(out + places[:, None] * VALUE_SIZE + across[None, :], sums.to(out.dtype.element_ty), mask=filled)
