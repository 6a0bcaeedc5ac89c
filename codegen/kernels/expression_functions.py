"""Functions that a fused expression may call, in Triton: `qcompiler.dialects.fused_expression.FUNCTIONS` on FP32 tiles.

A value rounded to bfloat16 or float16 is a tile of that type; `wide` converts it back to FP32.

They use only elementwise functions of `triton.language`, so that Gluon kernels can call them too. Divisions and square
roots round as in IEEE 754; the other functions are accurate to a few ulp, like torch's.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def wide(x):  # type: ignore[no-untyped-def]
    """x in FP32; converts two bfloat16 numbers in two instructions, where the compiler uses three."""
    if x.dtype == tl.bfloat16 and x.numel > 1:
        result = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        result = x.to(tl.float32)
    return result


@triton.jit
def bf16(x):  # type: ignore[no-untyped-def]
    """x rounded to bfloat16: two numbers in one instruction, where the compiler uses two slow ones."""
    if x.numel > 1:
        result = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        result = x.to(tl.bfloat16)
    return result


@triton.jit
def f16(x):  # type: ignore[no-untyped-def]
    """x rounded to float16."""
    return x.to(tl.float16)


@triton.jit
def f32(x):  # type: ignore[no-untyped-def]
    """x, which is in FP32 already."""
    return x


@triton.jit
def bf16_sum(a, b):  # type: ignore[no-untyped-def]
    """bf16(a + b); the compiler uses packed arithmetic for two bfloat16 numbers, which rounds the same."""
    if a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16:
        result = (a.to(tl.float32) + b.to(tl.float32)).to(tl.bfloat16)
    else:
        result = bf16(wide(a) + wide(b))
    return result


@triton.jit
def bf16_product(a, b):  # type: ignore[no-untyped-def]
    """bf16(a * b), like `bf16_sum`."""
    if a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16:
        result = (a.to(tl.float32) * b.to(tl.float32)).to(tl.bfloat16)
    else:
        result = bf16(wide(a) * wide(b))
    return result


@triton.jit
def times(a, b):  # type: ignore[no-untyped-def]
    """a * b, rounded, regardless of what is added to it.

    Any other multiplication, even `libdevice.mul_rn`, may become part of a fused multiply-add, which rounds only once.
    """
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def divide(a, b):  # type: ignore[no-untyped-def]
    """a / b, correctly rounded."""
    return tl.div_rn(a, b)


@triton.jit
def neg(x):  # type: ignore[no-untyped-def]
    """-x; 0 - x would lose the sign of a zero."""
    return x * -1.0


@triton.jit
def relu(x):  # type: ignore[no-untyped-def]
    """The larger of x and 0, or NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_least(x, low):  # type: ignore[no-untyped-def]
    """The larger of x and a number, or NaN."""
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(x, high):  # type: ignore[no-untyped-def]
    """The smaller of x and a number, or NaN."""
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sqrt(x):  # type: ignore[no-untyped-def]
    """The correctly rounded square root."""
    return tl.sqrt_rn(x)


@triton.jit
def rsqrt(x):  # type: ignore[no-untyped-def]
    """1 / sqrt(x) within 2 ulp, by the instruction that torch also uses on a GPU."""
    return tl.rsqrt(x)


@triton.jit
def exp(x):  # type: ignore[no-untyped-def]
    """The exponential function; `tl.exp` loses accuracy for large x."""
    return libdevice.exp(x)


@triton.jit
def cos(x):  # type: ignore[no-untyped-def]
    """The cosine; accurate for any x, as torch's is."""
    return libdevice.cos(x)


@triton.jit
def sin(x):  # type: ignore[no-untyped-def]
    """The sine, likewise."""
    return libdevice.sin(x)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """The hyperbolic tangent."""
    return libdevice.tanh(x)


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x))."""
    return tl.div_rn(1.0, 1.0 + libdevice.exp(x * -1.0))


@triton.jit
def reciprocal_of(x):  # type: ignore[no-untyped-def]
    """1 / x within 1 ulp for normal numbers; zero if the result would be subnormal."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def silu(x):  # type: ignore[no-untyped-def]
    """x / (1 + exp(-x)), the quotient corrected by its exact remainder instead of a general division.

    Above 2^126 the reciprocal is subnormal, which `reciprocal_of` flushes to zero: the tiny result becomes zero with
    the right sign for any x. The bounds keep the remainder of an infinity from becoming NaN.
    """
    by = tl.minimum(1.0 + libdevice.exp(x * -1.0), 2.0**127)
    reciprocal = reciprocal_of(by)
    quotient = tl.minimum(x * reciprocal, 3.4028234663852886e38)
    return tl.fma(tl.fma(quotient * -1.0, by, x), reciprocal, quotient)


@triton.jit
def gelu_tanh(x):  # type: ignore[no-untyped-def]
    """0.5 x (1 + tanh(z)) with z = sqrt(2 / pi) (x + 0.044715 x^3), computed as x / (1 + exp(-2 z)).

    This form takes half as long, and is accurate where 1 + tanh(z) cancels.
    """
    twice = 1.5957691216057308 * (x + 0.044715 * (x * x * x))
    by = tl.minimum(1.0 + libdevice.exp(twice * -1.0), 2.0**127)
    reciprocal = reciprocal_of(by)
    quotient = tl.minimum(x * reciprocal, 3.4028234663852886e38)
    return tl.fma(tl.fma(quotient * -1.0, by, x), reciprocal, quotient)


@triton.jit
def gelu(x):  # type: ignore[no-untyped-def]
    """x times the normal cumulative distribution at x, within 1e-7 of max(x, 1).

    max(x, 0) - |x| h, where h = erfc(|x| / sqrt(2)) / 2 is exp(-x^2 / 2) times a polynomial in t = 1 / (1 + 0.23 |x|),
    the form of Abramowitz and Stegun 7.1.26; fitted for minimum relative error up to 13, which is 1.6e-7. It takes half
    as long as the library's erf. Beyond 100, h is zero, and infinities are preserved.
    """
    size = tl.minimum(tl.abs(x), 100.0)
    t = reciprocal_of(tl.fma(size, 0.23, 1.0))
    series = tl.fma(t, -0.07343449043176573, 0.26689675561620724)
    series = tl.fma(t, series, -0.23143902047573067)
    series = tl.fma(t, series, 0.25012764427884226)
    series = tl.fma(t, series, 0.0012392890067790302)
    series = tl.fma(t, series, 0.1054536947166794)
    series = tl.fma(t, series, 0.08925676113756512)
    series = tl.fma(t, series, 0.09189938357887759)
    half = series * t * tl.exp2(size * size * -0.7213475204444817)
    return tl.fma(size * -1.0, half, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def mean(x, inside, columns):  # type: ignore[no-untyped-def]
    """The means of the rows, [rows, 1], over `columns` elements inside the row; a [rows, 1] input is its own mean."""
    if x.shape[1] == 1:
        result = x
    else:
        held = x if inside is None else tl.where(inside, x, 0.0)
        result = tl.div_rn(tl.sum(held, axis=1, keep_dims=True), columns * 1.0)
    return result


@triton.jit
def standardize(x, eps, inside, columns):  # type: ignore[no-untyped-def]
    """(x - mean(x)) / sqrt(variance(x) + eps), with the variance computed from the deviations."""
    away = x - mean(x, inside, columns)
    return away * rsqrt(mean(away * away, inside, columns) + eps)
