"""The division of the quantization kernels rounds to the right code: all cases that could go wrong, computed exactly.

The kernels correct a product with the reciprocal by one step (see `codegen.kernels.encoding.divide`), which leaves an
error of 2^-22 of an ulp. A code is decided by comparing the quotient with a tie between two codes.
"""

from fractions import Fraction
from math import floor, log2

import pytest
import torch
from torch import Tensor


def test_the_division_of_the_quantization_kernel_rounds_to_the_right_code() -> None:
    # The proof that the kernel's comment promises. A code is decided by comparing the quotient with a tie between two
    # codes, an integer T in [16, 32) times a power of two. If the corrected quotient is RN(x / s + e), the comparison
    # can differ from that of RN(x / s) only where x / s is within e of T + half an ulp or T - half an ulp. Written in
    # integers (x = 16 X, s = S), |e| <= 2^-22 ulp asks S / 2^20 to be within 2^-17 of an integer, so S to be within 8
    # of a multiple of 2^20. All of these, and as many again, times all T, are tried here in exact arithmetic.
    wrong = {0: 0, 1: 0}
    for s in (Fraction(j * 2**20 + near) for j in range(8, 17) for near in range(-17, 18)):
        if not 2**23 <= s < 2**24:
            continue
        reciprocal = float32(1 / s)
        for tie in map(Fraction, range(16, 33)):
            for half_ulp in (Fraction(1, 2**20), Fraction(-1, 2**20), Fraction(-1, 2**21)):
                middle = float32(s * (tie + half_ulp))
                ulp = Fraction(2) ** (floor(log2(middle)) - 23)
                for x in (middle - ulp, middle, middle + ulp):
                    want = side(float32(x / s), tie)
                    quotient = float32(x * reciprocal)
                    wrong[0] += side(quotient, tie) != want
                    quotient = float32(quotient - float32(quotient * s - x) * reciprocal)
                    wrong[1] += side(quotient, tie) != want
    assert wrong[1] == 0
    assert wrong[0] > 0, "without the correction these cases do go wrong, or they would show nothing"


def side(value: Fraction, tie: Fraction) -> int:
    return (value > tie) - (value < tie)


def float32(value: Fraction) -> Fraction:
    """The nearest FP32 number, ties to even, for a value of ordinary size."""
    if value == 0:
        return value
    magnitude = abs(value)
    exponent = floor(log2(magnitude))
    exponent += (magnitude >= Fraction(2) ** (exponent + 1)) - (magnitude < Fraction(2) ** exponent)
    ulp = Fraction(2) ** (exponent - 23)
    return round(value / ulp) * ulp  # round() of a Fraction is to even


@pytest.mark.parametrize(("scale", "smallest"), [(1.0, 1.0), (2.0**-123, 2.0**-8)])
def test_the_division_rounds_to_the_right_integer(scale: float, smallest: float) -> None:
    # As above for INT8, whose ties have 8 significant bits: T is an integer in [128, 256) times a power of two, and S
    # must be within 8 of a multiple of 2^17. These cases are two million, hence float64 in place of fractions: products
    # of two FP32 numbers and their sums with a close third are exact in it; the last sum is rounded to odd.
    # The second case has the smallest scales, from 2^-100 on, and the ties from 1/2 on: FP32 remainders are subnormal.
    s = (torch.arange(64, 129).view(-1, 1) * 2**17 + torch.arange(-17, 18)).view(-1)
    s = s[(s >= 2**23) & (s < 2**24)].double().view(-1, 1, 1, 1) * scale
    reciprocal = rounded(1 / s)
    tie = torch.arange(128, 257).double().view(-1, 1, 1) * smallest
    half_ulp = torch.tensor([2.0**-17, -(2.0**-17), -(2.0**-18)], dtype=torch.float64).view(-1, 1) * smallest
    middle = rounded(s * (tie + half_ulp))
    ulp = torch.exp2(torch.floor(torch.log2(middle)) - 23)
    x = middle + ulp * torch.tensor([-1, 0, 1])
    want = torch.sign(rounded(x / s) - tie)
    quotient = rounded(x * reciprocal)
    corrected = rounded_difference(quotient, rounded(quotient * s - x) * reciprocal)
    assert bool((torch.sign(corrected - tie) == want).all())
    assert bool((torch.sign(quotient - tie) != want).any()), "without the correction these cases do go wrong"


def rounded(value: Tensor) -> Tensor:
    """The nearest FP32 numbers, ties to even."""
    return value.float().double()


def rounded_difference(left: Tensor, right: Tensor) -> Tensor:
    """left - right, rounded once to FP32: rounding to odd in float64 first makes the second rounding harmless."""
    total = left - right
    taken = total - left
    error = (left - (total - taken)) + (-right - taken)
    bits = total.view(torch.int64)
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & (bits % 2 == 0), bits + towards, bits)
    return rounded(odd.view(torch.float64))
