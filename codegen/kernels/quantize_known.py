"""Triton kernels: quantization with given scales, and the one scale of a whole tensor.

A dynamic tensor scale takes three launches whose results do not depend on the order of programs: `partial_amax` writes
the amax of each program's part, `scale_of_tensor` computes the scale from them, and `quantize_known` reads it. A static
scale needs only the last one. The host never waits for a scale.
"""

import triton
import triton.language as tl

from codegen.kernels.encoding import (
    amax_of_keys,
    codes,
    divide,
    load_values,
    magnitude_keys,
    nan_for_infinity,
    reciprocal_of,
    scale_of,
    store_codes,
)


@triton.jit(do_not_specialize=["m"])
def partial_amax(  # type: ignore[no-untyped-def]
    x, partial, prescale, m, k, x_stride, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, FINITE: tl.constexpr
):
    """partial[p] = the largest magnitude of x[m, k] in every tile t with t % programs == p; 0 if there is none.

    Args:
        x: bfloat16, float16 or float32, rows `x_stride` elements apart, columns contiguous.
        partial: float32, one for each program.
        prescale: [k] in any floating dtype, contiguous, or None.
        BLOCK_M: Rows of a tile, a power of two.
        BLOCK_K: Columns of a tile, a power of two.
        FINITE: Ignore infinities and NaN, for formats with a NaN code; otherwise they carry over to the result.
    """
    EXPONENT: tl.constexpr = 1 << 23
    across = tl.cdiv(k, BLOCK_K)
    keys = tl.zeros([BLOCK_M, BLOCK_K], tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(m, BLOCK_M) * across, tl.num_programs(0)):
        rows = (tile // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile % across * BLOCK_K + tl.arange(0, BLOCK_K)
        found = magnitude_keys(load_values(x, prescale, rows, columns, m, k, x_stride))
        if FINITE:
            # A different exponent makes the keys of infinities and NaN negative.
            found += EXPONENT
        keys = tl.maximum(keys, found)
    largest = tl.max(tl.max(keys, axis=1), axis=0)
    if FINITE:
        largest = tl.maximum(largest, EXPONENT) - EXPONENT
    tl.store(partial + tl.program_id(0), amax_of_keys(largest))


@triton.jit(do_not_specialize=["count"])
def scale_of_tensor(  # type: ignore[no-untyped-def]
    partial, scale, count,
    AMAX_FLOOR: tl.constexpr, TOP: tl.constexpr, UE8M0: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale[0] from the `count` partial amaxes, at most `BLOCK`, a power of two."""
    places = tl.arange(0, BLOCK)
    keys = magnitude_keys(tl.load(partial + places, mask=places < count, other=0.0))
    tl.store(scale, scale_of(amax_of_keys(tl.max(keys, axis=0)), AMAX_FLOOR, TOP, UE8M0))


@triton.jit(do_not_specialize=["m", "scale_stride_k"])
def quantize_known(  # type: ignore[no-untyped-def]
    x, q, scale, prescale, m, k, x_stride, scale_stride_m, scale_stride_k,
    TOP: tl.constexpr, RECIPROCAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ONE_SCALE: tl.constexpr,
):  # fmt: skip
    """q[m, k] from x[m, k] and its scales.

    Args:
        x: bfloat16, float16 or float32, rows `x_stride` elements apart, columns contiguous.
        q: float8e4nv, float8e5 or int8, contiguous.
        scale: float32: the scale of a row and a block of `BLOCK_K` columns, at the strides, which may be 0.
        prescale: [k] in any floating dtype, contiguous, or None.
        TOP: The format's largest value.
        RECIPROCAL: x * (1 / scale) instead of x / scale.
        BLOCK_M: Rows of a tile, a power of two.
        BLOCK_K: Columns of a tile, a power of two.
        ONE_SCALE: The tensor has one scale; the strides are ignored.
    """
    blocks = tl.cdiv(k, BLOCK_K)
    tile = tl.program_id(0)
    block = tile % blocks
    rows = (tile // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    values = load_values(x, prescale, rows, columns, m, k, x_stride)
    if q.dtype.element_ty != tl.int8:
        values = nan_for_infinity(values)  # the scale does not show that a value is not finite, so the code must
    if ONE_SCALE:
        s = tl.load(scale)
        smallest, largest = s, s
    else:
        places = scale + rows * scale_stride_m + block.to(tl.int64) * scale_stride_k
        s = tl.load(places, mask=rows < m, other=1.0)
        smallest, largest = tl.min(s, axis=0), tl.max(s, axis=0)
        s = s[:, None]
    if RECIPROCAL:
        scaled = values * tl.div_rn(1.0, s)
    else:
        # A given scale may be any number, but the cheap division is proven only for these; NaN is not among them.
        if (smallest >= 2.0**-60) & (largest <= 2.0**100):
            scaled = divide(values, s, reciprocal_of(s), 2 * TOP)
        else:
            scaled = tl.div_rn(values, tl.broadcast_to(s, values.shape))
    store_codes(q, codes(scaled, TOP, q.dtype.element_ty), rows, columns, m, k)
