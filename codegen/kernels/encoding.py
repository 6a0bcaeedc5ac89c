"""Shared by the quantization kernels: the amax of a block, its scale, and the 8-bit codes.

One divide instruction per element would take as long as the memory accesses, so divisions are optimized.
"""

import triton
import triton.language as tl


@triton.jit
def divide(x, by, reciprocal, BOUND: tl.constexpr):  # type: ignore[no-untyped-def]
    """x / by to the accuracy that the 8-bit code needs, from the correctly rounded 1 / by.

    One Markstein step (P. Markstein, IA-64 and Elementary Functions, 2000, chapter 8): the quotient's remainder, exact
    in a fused multiply-add, corrects it. The remaining error, 2^-22 of an ulp, could change a code only if x / by is
    that close to a tie between two codes. This happens next to nine values of the significand of `by` for formats with
    4 significant bits and up to 65 for INT8; the tests check all of these cases.

    A remainder that underflows must not change a code either. Its last bit is ulp(x / by) * ulp(by), which is 2^-149 or
    more wherever a tie is near: for INT8, whose smallest tie is 1/2, if `by` is at least 2^-101; for e5m2, whose
    smallest tie is 2^-17, if `by` is at least 2^-85.

    The remainder is quotient * by - x and is subtracted, so that a zero keeps its sign. Negations are multiplications
    by -1, which become operand modifiers; 0 - x would be an instruction and lose the sign of a zero.

    BOUND limits the quotient, and keeps the remainder of a quotient that overflows from becoming NaN: such a quotient
    becomes infinite again, which the conversion saturates. It is None if no quotient can overflow.
    """
    quotient = x * reciprocal
    if BOUND is not None:
        quotient = tl.clamp(quotient, -BOUND, BOUND, propagate_nan=tl.PropagateNan.ALL)
    return tl.fma(tl.fma(quotient, by, x * -1.0), reciprocal * -1.0, quotient)


@triton.jit
def magnitude_keys(values):  # type: ignore[no-untyped-def]
    """Integers ordered like the magnitudes of FP32 values: finite numbers, then infinity, then NaN.

    They are the bits without the sign. A floating-point maximum drops NaN, and one that keeps NaN takes more
    instructions in FP32.
    """
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def amax_of_keys(largest):  # type: ignore[no-untyped-def]
    """The magnitude with this key, which may be infinity or NaN."""
    return largest.to(tl.float32, bitcast=True)


@triton.jit
def nan_for_infinity(values):  # type: ignore[no-untyped-def]
    """FP32 values with infinities replaced by NaN; a zero keeps its sign."""
    return tl.fma(values, 0.0, values)


@triton.jit
def scale_of(amax, AMAX_FLOOR: tl.constexpr, TOP: tl.constexpr, UE8M0: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale of a block with that amax: FP32, or the next power of two; NaN if the amax is infinity or NaN.

    The division is corrected by its exact remainder as in `divide`; with the nearest number to 1 / TOP the result is
    the correctly rounded quotient (Markstein, theorem 8.2). The remainder of an infinity is NaN.
    """
    held = tl.maximum(amax, AMAX_FLOOR, propagate_nan=tl.PropagateNan.ALL)
    quotient = held * (1.0 / TOP)
    s = tl.fma(tl.fma(quotient, TOP, held * -1.0), -1.0 / TOP, quotient)
    if UE8M0:
        rounded = (s.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        s = tl.fma(s, 0.0, rounded.to(tl.float32, bitcast=True))  # adding s * 0 restores NaN, whose bits were rounded
    return s


@triton.jit
def reciprocal_of(s):  # type: ignore[no-untyped-def]
    """1 / s, correctly rounded, for scales between 2^-100 and 2^125: an estimate and two refinement steps.

    The first step is within an ulp. From there the second is exact except for a significand of all ones (Markstein,
    theorem 8.1), which the tests check.
    """
    estimate = 1.0 / s
    estimate = tl.fma(tl.fma(estimate, s, -1.0), estimate * -1.0, estimate)
    return tl.fma(tl.fma(estimate, s, -1.0), estimate * -1.0, estimate)


@triton.jit
def quotients(values, s, RECIPROCAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """values / s, or values * (1 / s), as accurate as codes need, where s is computed from the amax of values.

    Such a scale is NaN, or between 2^-60 (FP8) or 2^-100 (INT8) and 2^125, and no quotient overflows.
    """
    reciprocal = reciprocal_of(s)
    return values * reciprocal if RECIPROCAL else divide(values, s, reciprocal, None)


@triton.jit
def static_quotients(values, s, TOP: tl.constexpr, RECIPROCAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """values / s, or values * (1 / s), as accurate as codes need, for one given scale s, which may be any number.

    The cheap division is proven only for some scales.
    """
    if RECIPROCAL:
        scaled = values * tl.div_rn(1.0, s)
    elif (s >= 2.0**-60) & (s <= 2.0**100):
        scaled = divide(values, s, reciprocal_of(s), 2 * TOP)
    else:
        scaled = tl.div_rn(values, tl.broadcast_to(s, values.shape))
    return scaled


@triton.jit
def codes(scaled, TOP: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The 8-bit codes of quotients: saturated, rounded to nearest even, NaN kept where the format has one."""
    if dtype == tl.int8:
        # 1.5 * 2^23 leaves no fraction bits: the sum rounds to an integer, and its low bits are the code.
        held = tl.clamp(tl.where(scaled == scaled, scaled, 0.0), -TOP, TOP)
        result = (held + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        result = scaled.to(dtype)  # the conversion itself saturates
    return result


@triton.jit
def load_values(x, prescale, rows, columns, m, k, x_stride):  # type: ignore[no-untyped-def]
    """Elements of x in FP32, multiplied by the prescale of their column; zeros outside [m, k]."""
    inside = (rows < m)[:, None] & (columns < k)[None, :]
    values = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if prescale is not None:
        values *= tl.load(prescale + columns, mask=columns < k, other=1.0).to(tl.float32)[None, :]
    return values


@triton.jit
def store_codes(q, encoded, rows, columns, m, k):  # type: ignore[no-untyped-def]
    """Writes codes to the contiguous q[m, k], and nothing outside it."""
    inside = (rows < m)[:, None] & (columns < k)[None, :]
    tl.store(q + rows[:, None] * k + columns[None, :], encoded, mask=inside)


@triton.jit
def store_tiles(  # type: ignore[no-untyped-def]
    values, q, scale, places, lines, scale_stride_k, inside, columns, size,
    TILE: tl.constexpr, AMAX_FLOOR: tl.constexpr, TOP: tl.constexpr, RECIPROCAL: tl.constexpr, UE8M0: tl.constexpr,
):  # fmt: skip
    """Quantizes rows [m, n] in tiles of TILE columns, as `quantize_tiles` does, and stores their first `size` columns.

    Args:
        values: FP32; 0 in columns from `size` on. n is a multiple of TILE.
        places: [m, 1], where the codes of a row begin in q.
        lines: [m, 1], where the scales of a row begin in `scale`.
        scale_stride_k: Elements between the scales of two tiles of a row.
        inside: [m, 1], the rows to store.
        columns: 0 ... n - 1, [1, n].
    """
    ROWS: tl.constexpr = values.shape[0]
    COLUMNS: tl.constexpr = values.shape[1]
    tiles = tl.reshape(values, (ROWS, COLUMNS // TILE, TILE))
    s = scale_of(amax_of_keys(tl.max(magnitude_keys(tiles), axis=2)), AMAX_FLOOR, TOP, UE8M0)
    scaled = quotients(tiles, s[:, :, None], RECIPROCAL or UE8M0)
    encoded = tl.reshape(codes(scaled, TOP, q.dtype.element_ty), (ROWS, COLUMNS))
    tl.store(q + places + columns, encoded, mask=inside & (columns < size))
    across = tl.arange(0, COLUMNS // TILE)[None, :]
    tl.store(scale + lines + across.to(tl.int64) * scale_stride_k, s, mask=inside & (across * TILE < size))
