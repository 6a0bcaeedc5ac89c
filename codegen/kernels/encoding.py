"""What the quantization kernels share: the amax of what is finite, the scale made from it, and the 8-bit codes.

A divide instruction for each element would cost as much time as the memory; hence the care for the division.
"""

import triton
import triton.language as tl


@triton.jit
def divide(x, by, reciprocal, BOUND: tl.constexpr):  # type: ignore[no-untyped-def]
    """x / by to the accuracy that the 8-bit code needs, from the correctly rounded 1 / by, in four instructions.

    One Markstein step (P. Markstein, IA-64 and Elementary Functions, 2000, chapter 8): the quotient's remainder, exact
    in a fused multiply-add, corrects it. What is left of the error, 2^-22 of an ulp, could move a code only where
    x / by is that close to where a tie between two codes begins; this happens next to nine values of the significand
    of `by` for the formats with 4 significant bits and to 65 for INT8, and there the tests go through all cases.
    Where a remainder underflows, the quotient is far below the smallest 8-bit subnormal: `by` is 2^-60 at least.

    The remainder is quotient * by - x and is subtracted, so that a zero keeps its sign. Negations are products with -1,
    which become operand modifiers; 0 - x would be an instruction and lose the sign of a zero. The bound keeps an
    infinity's remainder from becoming NaN: the quotient becomes infinite again, which the conversion saturates.
    """
    quotient = tl.clamp(x * reciprocal, -BOUND, BOUND, propagate_nan=tl.PropagateNan.ALL)
    return tl.fma(tl.fma(quotient, by, x * -1.0), reciprocal * -1.0, quotient)


@triton.jit
def finite_keys(values):  # type: ignore[no-untyped-def]
    """Signed integers in the order of the magnitudes of FP32 values, where what is not finite comes below zero's key.

    On the bits: the sign is dropped, and adding one to the exponent makes infinities and NaN negative. A shift in place
    of the mask would save nothing, and ptxas 12.8 turns a product of floats that is shifted into a product of integers.
    """
    ONE: tl.constexpr = 1 << 23
    return (values.to(tl.int32, bitcast=True) & 0x7FFFFFFF) + ONE


@triton.jit
def amax_of_keys(largest):  # type: ignore[no-untyped-def]
    """The magnitude behind the largest key; 0 if nothing was finite."""
    ONE: tl.constexpr = 1 << 23
    return (tl.maximum(largest, ONE) - ONE).to(tl.float32, bitcast=True)


@triton.jit
def finite_magnitudes(values):  # type: ignore[no-untyped-def]
    """The magnitudes of FP32 values, where what is not finite becomes NaN, which a maximum passes over."""
    return tl.abs(tl.fma(values, 0.0, values))


@triton.jit
def scale_of(amax, AMAX_FLOOR: tl.constexpr, TOP: tl.constexpr, UE8M0: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale of a block of that amax, NaN for none: FP32, or the power of two that is not below it.

    The division is corrected by its exact remainder as in `divide`; with the nearest number to 1 / TOP the result is
    the correctly rounded quotient (Markstein, theorem 8.2).
    """
    held = tl.maximum(amax, AMAX_FLOOR)
    quotient = held * (1.0 / TOP)
    s = tl.fma(tl.fma(quotient, TOP, held * -1.0), -1.0 / TOP, quotient)
    if UE8M0:
        s = ((s.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return s


@triton.jit
def reciprocal_of(s):  # type: ignore[no-untyped-def]
    """1 / s, correctly rounded, of scales between 2^-60 and 2^125: an estimate and two steps towards it.

    After the first step it is within an ulp, from where the second is exact but for a significand of ones (Markstein,
    theorem 8.1), whose case the tests show.
    """
    estimate = 1.0 / s
    estimate = tl.fma(tl.fma(estimate, s, -1.0), estimate * -1.0, estimate)
    return tl.fma(tl.fma(estimate, s, -1.0), estimate * -1.0, estimate)


@triton.jit
def quotients(values, s, TOP: tl.constexpr, RECIPROCAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """values / s, or values * (1 / s), of scales between 2^-60 and 2^125, as accurate as codes need."""
    reciprocal = reciprocal_of(s)
    return values * reciprocal if RECIPROCAL else divide(values, s, reciprocal, 2 * TOP)


@triton.jit
def codes(scaled, TOP: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The 8-bit codes of quotients: saturated, rounded to nearest even, NaN kept where the format has one."""
    if dtype == tl.int8:
        # 1.5 * 2^23 leaves no room for a fraction: the sum is rounded to an integer, and its low bits are the code.
        held = tl.clamp(tl.where(scaled == scaled, scaled, 0.0), -TOP, TOP)
        result = (held + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        result = scaled.to(dtype)  # the conversion itself saturates
    return result


@triton.jit
def load_values(x, prescale, rows, columns, m, k, x_stride):  # type: ignore[no-untyped-def]
    """Elements of x in FP32, each times the prescale of its column, zeros outside of [m, k]."""
    inside = (rows < m)[:, None] & (columns < k)[None, :]
    values = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if prescale is not None:
        values *= tl.load(prescale + columns, mask=columns < k, other=1.0).to(tl.float32)[None, :]
    return values


@triton.jit
def store_codes(q, encoded, rows, columns, m, k):  # type: ignore[no-untyped-def]
    """Writes codes to the contiguous q[m, k], and nothing outside of it."""
    inside = (rows < m)[:, None] & (columns < k)[None, :]
    tl.store(q + rows[:, None] * k + columns[None, :], encoded, mask=inside)
