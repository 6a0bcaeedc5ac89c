"""Triton kernel: 1 x 128 quantization of the rows of a matrix, bit for bit what `qcompiler.numerics.quantize` says.

One program takes a tile of `BLOCK_M` rows by one block of columns, so a scale is one reduction along the tile's rows.
Programs that follow each other take neighbouring blocks of the same rows. The kernel moves 2 bytes in and 1 byte out
per element of a bfloat16 tensor and is bound by memory, if the division is cheap: see `_divide`.
"""

import triton
import triton.language as tl


@triton.jit
def _divide(x, by, reciprocal, BOUND: tl.constexpr):  # type: ignore[no-untyped-def]
    """x / by to the accuracy that the 8-bit code needs, from the correctly rounded 1 / by, in four instructions.

    One Markstein step (P. Markstein, IA-64 and Elementary Functions, 2000, chapter 8): the quotient's remainder, exact
    in a fused multiply-add, corrects it. What is left of the error, 2^-22 of an ulp, could move a code only where
    x / by is that close to where a tie between two codes begins; this happens next to nine values of the significand
    of `by`, and there the tests go through all cases. A divide instruction for each element would cost as much time
    as the memory. Where a remainder underflows, the quotient is far below the smallest 8-bit subnormal.

    The remainder is quotient * by - x and is subtracted, so that a zero keeps its sign. Negations are products with -1,
    which become operand modifiers; 0 - x would be an instruction and lose the sign of a zero. The bound keeps an
    infinity's remainder from becoming NaN: the quotient becomes infinite again, which the conversion saturates.
    """
    quotient = tl.clamp(x * reciprocal, -BOUND, BOUND, propagate_nan=tl.PropagateNan.ALL)
    return tl.fma(tl.fma(quotient, by, x * -1.0), reciprocal * -1.0, quotient)


@triton.jit
def _finite_amax(values):  # type: ignore[no-untyped-def]
    """The largest magnitude among the finite elements of each row of FP32 values; 0 if there is none.

    On the bits, in two instructions an element: shifting left drops the sign, and adding one to the exponent wraps
    infinities and NaN around to less than any finite value.
    """
    ONE: tl.constexpr = 1 << 24
    keys = (values.to(tl.uint32, bitcast=True) << 1) + ONE
    largest = tl.max(keys, axis=1)
    return (tl.maximum(largest, ONE) - ONE >> 1).to(tl.float32, bitcast=True)


# What follows M must not be a reason to compile again: in the column-major layout the stride along K does.
@triton.jit(do_not_specialize=["m", "scale_stride_k"])
def quantize_rows(  # type: ignore[no-untyped-def]
    x, q, scale, m, k, x_stride, scale_stride_m, scale_stride_k,
    AMAX_FLOOR: tl.constexpr, TOP: tl.constexpr, RECIPROCAL: tl.constexpr, UE8M0: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """q[m, k] and scale[m, ceil(k / BLOCK_K)] of x[m, k].

    Args:
        x: bfloat16, float16 or float32, rows `x_stride` elements apart, columns contiguous.
        q: float8e4nv or float8e5, contiguous.
        scale: float32 with any two strides, in elements.
        AMAX_FLOOR: The profile's floor.
        TOP: The format's largest value.
        RECIPROCAL: x * (1 / scale) in place of x / scale.
        UE8M0: Round the scale up to a power of two.
        BLOCK_M: Rows of a tile, a power of two.
        BLOCK_K: Columns of a block, a power of two.
    """
    blocks = tl.cdiv(k, BLOCK_K)
    tile = tl.program_id(0)
    block = tile % blocks
    rows = (tile // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < m)[:, None] & (columns < k)[None, :]
    values = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)

    amax = tl.maximum(_finite_amax(values), AMAX_FLOOR)
    s = tl.div_rn(amax, TOP)
    if UE8M0:
        s = ((s.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    reciprocal = tl.div_rn(1.0, s)[:, None]
    if RECIPROCAL or UE8M0:  # dividing by a power of two is multiplying by its exact reciprocal
        scaled = tl.clamp(values * reciprocal, -TOP, TOP, propagate_nan=tl.PropagateNan.ALL)
    else:
        scaled = _divide(values, s[:, None], reciprocal, 2 * TOP)
    tl.store(q + rows[:, None] * k + columns[None, :], scaled.to(q.dtype.element_ty), mask=inside)
    tl.store(scale + rows * scale_stride_m + block.to(tl.int64) * scale_stride_k, s, mask=rows < m)
