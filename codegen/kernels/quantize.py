"""Triton kernels: quantization of matrix rows, bit-equal to `qcompiler.numerics.quantize`.

`quantize_tiles` has one scale for each 1 x b block, `quantize_tokens` one for each row. A kernel reads 2 bytes and
writes 1 byte per element of a bfloat16 tensor and is memory-bound if division is cheap: see `encoding.divide`.
"""

import triton
import triton.language as tl

from codegen.kernels.encoding import (
    amax_of_keys,
    codes,
    load_values,
    magnitude_keys,
    quotients,
    scale_of,
    store_codes,
)
from codegen.kernels.overlap import inputs_ready, let_next_start


# Parameters after M must not cause recompilation: in the column-major layout, the stride along K depends on M.
@triton.jit(do_not_specialize=["m", "scale_stride_k"])
def quantize_tiles(  # type: ignore[no-untyped-def]
    x, q, scale, prescale, m, k, x_stride, scale_stride_m, scale_stride_k,
    AMAX_FLOOR: tl.constexpr, TOP: tl.constexpr, RECIPROCAL: tl.constexpr, UE8M0: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """q[m, k] and scale[m, ceil(k / BLOCK_K)] of x[m, k].

    One program processes a tile of `BLOCK_M` rows by one block of columns, so a scale is one reduction along the tile's
    rows. Consecutive programs process neighboring blocks of the same rows.

    Args:
        x: bfloat16, float16 or float32, rows `x_stride` elements apart, columns contiguous.
        q: float8e4nv, float8e5 or int8, contiguous.
        scale: float32 with any two strides, in elements.
        prescale: [k] in any floating dtype, contiguous, or None.
        AMAX_FLOOR: The profile's floor.
        TOP: The format's largest value.
        RECIPROCAL: x * (1 / scale) instead of x / scale.
        UE8M0: Round the scale up to a power of two.
        BLOCK_M: Rows of a tile, a power of two.
        BLOCK_K: Columns of a block, a power of two.
    """
    blocks = tl.cdiv(k, BLOCK_K)
    tile = tl.program_id(0)
    block = tile % blocks
    rows = (tile // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    let_next_start()
    inputs_ready()
    values = load_values(x, prescale, rows, columns, m, k, x_stride)
    s = scale_of(amax_of_keys(tl.max(magnitude_keys(values), axis=1)), AMAX_FLOOR, TOP, UE8M0)
    # Dividing by a power of two equals multiplying by its exact reciprocal.
    scaled = quotients(values, s[:, None], RECIPROCAL or UE8M0)
    store_codes(q, codes(scaled, TOP, q.dtype.element_ty), rows, columns, m, k)
    tl.store(scale + rows * scale_stride_m + block.to(tl.int64) * scale_stride_k, s, mask=rows < m)


@triton.jit(do_not_specialize=["m"])
def quantize_tokens(  # type: ignore[no-untyped-def]
    x, q, scale, prescale, m, k, x_stride, scale_stride_m,
    AMAX_FLOOR: tl.constexpr, TOP: tl.constexpr, RECIPROCAL: tl.constexpr, UE8M0: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ONE_STEP: tl.constexpr,
):  # fmt: skip
    """q[m, k] and scale[m] of x[m, k]: one scale for each row.

    One program processes `BLOCK_M` whole rows: all at once in registers, or, if they are too long, in two passes, the
    second of which finds most of the row in L2.

    Args:
        x: As in `quantize_tiles`; likewise `q`, `prescale`, `AMAX_FLOOR`, `TOP`, `RECIPROCAL` and `UE8M0`.
        scale: float32, `scale_stride_m` elements apart.
        BLOCK_M: Rows of a program, a power of two.
        BLOCK_K: Columns of a step, a power of two.
        ONE_STEP: `BLOCK_K` spans the row.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    inputs_ready()  # the next kernel must not start yet: these may be the rows of its weight
    if ONE_STEP:
        values = load_values(x, prescale, rows, columns, m, k, x_stride)
        s = scale_of(amax_of_keys(tl.max(magnitude_keys(values), axis=1)), AMAX_FLOOR, TOP, UE8M0)
        scaled = quotients(values, s[:, None], RECIPROCAL or UE8M0)
        store_codes(q, codes(scaled, TOP, q.dtype.element_ty), rows, columns, m, k)
    else:
        keys = tl.zeros([BLOCK_M, BLOCK_K], tl.int32)
        for start in range(0, k, BLOCK_K):
            values = load_values(x, prescale, rows, start + columns, m, k, x_stride)
            keys = tl.maximum(keys, magnitude_keys(values))
        s = scale_of(amax_of_keys(tl.max(keys, axis=1)), AMAX_FLOOR, TOP, UE8M0)
        for start in range(0, k, BLOCK_K):
            values = load_values(x, prescale, rows, start + columns, m, k, x_stride)
            scaled = quotients(values, s[:, None], RECIPROCAL or UE8M0)
            store_codes(q, codes(scaled, TOP, q.dtype.element_ty), rows, start + columns, m, k)
    tl.store(scale + rows * scale_stride_m, s, mask=rows < m)
