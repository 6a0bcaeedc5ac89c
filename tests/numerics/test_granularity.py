"""`qcompiler.numerics` in every granularity and format of the field, against loops over single elements."""

import bisect
import math
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompiler import numerics
from qcompiler.errors import QCompilerError
from qcompiler.numerics import ALL
from qcompiler.numerics.dtypes import ir_dtype

E4M3, E5M2, I8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
FORMATS = (E4M3, E5M2, I8)
F32 = np.float32
TOP = {E4M3: 448.0, E5M2: 57344.0, I8: 127.0}
TABLES = {
    dtype: [v for v in torch.arange(128, dtype=torch.uint8).view(dtype).double().tolist() if math.isfinite(v)]
    for dtype in (E4M3, E5M2)
}
"""The finite values from zero up, by code: a float format orders its codes like their values."""
BLOCKS = [(1, 5), (1, ALL), (ALL, ALL), (ALL, 1), (3, 4), (ALL, 5), (3, ALL)]
SHAPES = [(11,), (7, 11), (2, 7, 11), (2, 3, 4, 6)]


def rounded(value: float, dtype: torch.dtype) -> float:
    """The value of a format nearest to a number, ties to the even code, saturated; what INT8 makes of NaN is zero."""
    if math.isnan(value):
        return 0.0 if dtype is I8 else math.nan
    magnitude = min(abs(value), TOP[dtype])
    if dtype is I8:
        return math.copysign(float(round(magnitude)), value) + 0.0
    table = TABLES[dtype]
    above = bisect.bisect_left(table, magnitude)
    below = max(above - 1, 0)
    up, down = table[above] - magnitude, magnitude - table[below]
    return math.copysign(table[above if up < down or (up == down and above % 2 == 0) else below], value)


def key_of(index: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Which scale belongs to an element: an index into the scales."""
    rows, columns = block
    across = 0 if columns == ALL else index[-1] // columns
    if len(index) == 1:
        return (across,)
    return (0, across) if rows == ALL else (*index[:-2], index[-2] // rows, across)


def slow(
    x: Tensor, block: tuple[int, int], dtype: torch.dtype, profile: str = "deepseek", prescale: Tensor | None = None
) -> tuple[Any, dict[tuple[int, ...], Any]]:
    """What each element becomes, and the scale of each block, by definition: element by element, in FP32."""
    wide = x.float().numpy()
    wide = wide if prescale is None else wide * prescale.float().numpy()
    floor = F32(127 * 2.0**-100 if dtype is I8 else 1e-10 if profile == "vllm" else 1e-4)
    scales: dict[tuple[int, ...], Any] = {}
    poisoned = set()
    for index in np.ndindex(*wide.shape):
        key, finite = key_of(index, block), np.isfinite(wide[index])
        scales[key] = max(scales.get(key, floor), abs(wide[index]) if finite else F32(0))
        if not finite and (block[0] == 1 or dtype is I8):
            poisoned.add(key)
    for key, amax in scales.items():
        scales[key] = F32(np.nan) if key in poisoned else F32(amax) / F32(TOP[dtype])
        if profile == "ue8m0" and key not in poisoned:
            fraction, exponent = math.frexp(float(scales[key]))
            scales[key] = F32(math.ldexp(1.0, exponent - (fraction == 0.5)))
    values = np.zeros(wide.shape)
    for index in np.ndindex(*wide.shape):
        scale = scales[key_of(index, block)]
        scaled = wide[index] * (F32(1) / scale) if profile == "deepgemm" else wide[index] / scale
        values[index] = rounded(float(scaled) if np.isfinite(wide[index]) else math.nan, dtype)
    return values, scales


def check(x: Tensor, block: tuple[int, int], dtype: torch.dtype, profile: str, prescale: Tensor | None = None) -> None:
    """Holds quantize, quantize_static and dequantize to the slow implementation."""
    q, scale = numerics.quantize(x, numerics.format_of(block, dtype, profile), prescale)
    values, scales = slow(x, block, dtype, profile, prescale)
    assert q.dtype is dtype and q.shape == x.shape and q.is_contiguous() and scale.is_contiguous()
    assert scale.dtype is torch.float32 and list(scale.shape) == numerics.scale_shape(x.shape, block)
    np.testing.assert_array_equal([scale[key].item() for key in scales], [float(value) for value in scales.values()])
    assert len(scales) == scale.numel()
    np.testing.assert_array_equal(q.double().numpy(), values)
    static = numerics.quantize_static(x, scale, numerics.format_of(block, dtype, profile), prescale)
    assert torch.equal(bits(static), bits(q)) and static.is_contiguous()
    with np.errstate(all="ignore"):
        want = [F32(values[i]) * F32(scales[key_of(i, block)]) for i in np.ndindex(*x.shape)]
    np.testing.assert_array_equal(
        numerics.dequantize(q, scale, format=numerics.format_of(block, q.dtype)).flatten().numpy(), np.array(want, F32)
    )


def bits(q: Tensor) -> Tensor:
    """The codes, with one for all NaN."""
    return q.view(torch.uint8).masked_fill(q.float().isnan(), 255)


def ordinary(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_granularity_format_and_rank(block: tuple[int, int], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(ordinary(*shape), block, dtype, "deepseek")
    check(ordinary(*shape, seed=1).bfloat16(), block, dtype, "deepseek", torch.linspace(0.2, 5, shape[-1]))


@pytest.mark.parametrize("profile", sorted(numerics.PROFILES))
@pytest.mark.parametrize("block", [(1, ALL), (ALL, ALL), (ALL, 1), (2, 4)])
def test_every_profile(profile: str, block: tuple[int, int]) -> None:
    for dtype in FORMATS:
        check(ordinary(4, 9), block, dtype, profile, torch.linspace(-1, 2, 9).half())
        check(torch.zeros(2, 3), block, dtype, profile)


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (ALL, 128), (128, ALL)])
def test_blocks_of_128(block: tuple[int, int]) -> None:
    for dtype in (E4M3, I8):
        check(ordinary(130, 132), block, dtype, "deepseek")


AWKWARD = st.one_of(
    st.floats(width=32),
    st.floats(-1e3, 1e3, width=32),
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3e38, 127.5, 63.5, -0.5, 448.0]),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(AWKWARD, min_size=1, max_size=24), st.integers(1, 6), st.sampled_from([*range(1, 4), ALL]),
    st.sampled_from([*range(1, 7), ALL]), st.sampled_from(FORMATS), st.sampled_from(sorted(numerics.PROFILES)),
)  # fmt: skip
def test_any_content(
    values: list[float], width: int, rows: int, columns: int, dtype: torch.dtype, profile: str
) -> None:
    x = torch.tensor(values + [0.5] * (-len(values) % width)).view(-1, width)
    with np.errstate(all="ignore"):
        check(x, (rows, columns), dtype, profile)


def test_int8_rounds_ties_to_even_and_keeps_to_127() -> None:
    ties = torch.arange(-127, 127).float() + 0.5  # with 127 in the row the scale is 1, and these are the ties
    q, scale = numerics.quantize(torch.cat([ties, torch.tensor([127.0])])[None], numerics.format_of((1, ALL), I8))
    assert scale.item() == 1.0
    assert q[0, :-1].tolist() == [round(tie) for tie in ties.tolist()]
    over = torch.tensor([[300.0, -300.0, -128.0, math.inf, -math.inf, math.nan, 126.5]])
    assert numerics.quantize_static(over, torch.ones(1, 1), numerics.format_of((-1, -1), I8)).tolist() == [
        [127, -127, -127, 127, -127, 0, 126]
    ]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("profile", sorted(numerics.PROFILES))
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_so(odd: float, profile: str, dtype: torch.dtype) -> None:
    x, w = ordinary(4, 8), ordinary(3, 8, seed=1)
    x[2, 5] = odd
    for x_block in ((1, ALL), (1, 4), (ALL, ALL), (2, 4), (ALL, 1)):
        x_q, x_s = numerics.quantize(x, numerics.format_of(x_block, dtype, profile))
        operands = (x_q, x_s, *numerics.quantize(w, numerics.format_of((1, ALL), dtype, profile)))
        bad = (
            numerics.scaled_linear(
                *operands, x_format=numerics.format_of(x_block, dtype), w_format=numerics.format_of((1, ALL), dtype)
            )
            .isnan()
            .all(1)
        )
        # An INT8 code cannot be NaN, so there the rows that share the scale of this one are lost, too.
        lost = {(ALL, ALL): [0, 1, 2, 3], (ALL, 1): [0, 1, 2, 3], (2, 4): [2, 3]} if dtype is I8 else {}
        assert bad.nonzero().flatten().tolist() == lost.get(x_block, [2]), x_block
        alone = torch.ones(4, dtype=torch.bool).index_fill_(0, torch.tensor(lost.get(x_block, [2])), False)
        assert bool(
            numerics.dequantize(x_q, x_s, format=numerics.format_of(x_block, x_q.dtype))[alone].isfinite().all()
        )


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("profile", sorted(numerics.PROFILES))
def test_a_static_scale_keeps_nan_where_the_format_has_one(profile: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, math.nan, math.inf, -math.inf, 3e38, -3e38]])
    q = numerics.quantize_static(x, torch.full((1, 1), 2.0**-40), numerics.format_of((-1, -1), dtype, profile)).float()
    top = TOP[dtype]
    want = [top, 0.0, top, -top, top, -top] if dtype is I8 else [top, math.nan, math.nan, math.nan, top, -top]
    np.testing.assert_array_equal(q[0].numpy(), want)


def test_int8_has_no_floor_in_the_sizes_of_data() -> None:
    x = ordinary(8, 64)
    for block, profile in product(((1, ALL), (ALL, ALL), (1, 16)), sorted(numerics.PROFILES)):
        q, scale = numerics.quantize(x, numerics.format_of(block, I8, profile))
        for exponent in (-93, -60, -30, 20, 100):
            small_q, small_scale = numerics.quantize(x * 2.0**exponent, numerics.format_of(block, I8, profile))
            assert torch.equal(small_q, q) and torch.equal(small_scale, scale * 2.0**exponent)


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_smallest_scales_are_normal_numbers_with_a_reciprocal(dtype: torch.dtype) -> None:
    for profile in numerics.PROFILES:
        q, scale = numerics.quantize(torch.tensor([[0.0, -0.0, 1e-45]]), numerics.format_of((1, ALL), dtype, profile))
        assert q.float().abs().tolist() == [[0.0, 0.0, 0.0]]
        assert scale.item() >= 2.0**-100 and bool(scale.reciprocal().isfinite())


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_static_scale_saturates(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -1.0, 1000.0, -1e30, 0.25]])
    scale = torch.full((1, 1), 1.0 / TOP[dtype])
    got = numerics.dequantize(
        numerics.quantize_static(x, scale, numerics.format_of((-1, -1), dtype)),
        scale,
        format=numerics.format_of((ALL, ALL), dtype),
    )
    torch.testing.assert_close(got, torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.25]]), rtol=0, atol=0.5 / 127)
    assert got[0, :4].tolist() == [got[0, 0], -got[0, 0], got[0, 0], -got[0, 0]]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [(1, ALL), (ALL, ALL), (1, 4), (ALL, 1)])
def test_a_prescale_multiplies_in_fp32_before_anything_else(kind: torch.dtype, block: tuple[int, int]) -> None:
    x, factors = ordinary(2, 3, 10).to(kind), torch.linspace(-2, 3, 10)
    for given_factors in (factors, factors.bfloat16()):
        product = x.float() * given_factors.float()
        for dtype in FORMATS:
            q, scale = numerics.quantize(x, numerics.format_of(block, dtype), prescale=given_factors)
            want_q, want_scale = numerics.quantize(product, numerics.format_of(block, dtype))
            assert torch.equal(bits(q), bits(want_q)) and torch.equal(scale, want_scale)
            static = numerics.quantize_static(x, scale * 2, numerics.format_of(block, dtype), prescale=given_factors)
            assert torch.equal(
                bits(static), bits(numerics.quantize_static(product, scale * 2, numerics.format_of(block, dtype)))
            )


def test_scale_of() -> None:
    amax = torch.tensor([0.0, 1e-6, 1.0, 448.0, 3e38])
    kept = amax.clone()
    for (name, rule), dtype in product(numerics.PROFILES.items(), FORMATS):
        exact = amax.clamp_min(rule.amax_floor(ir_dtype(dtype))).numpy() / F32(TOP[dtype])
        got = numerics.scale_of(amax, numerics.format_of((1, 1), dtype, name))
        if rule.scale_format == "f32":
            assert got.tolist() == exact.tolist()
        else:
            assert got.tolist() == [2.0 ** math.ceil(math.log2(float(value))) for value in exact]
        assert bool(
            numerics.scale_of(torch.tensor([torch.inf, torch.nan]), numerics.format_of((1, 1), dtype, name))
            .isnan()
            .all()
        )
    assert torch.equal(amax, kept)
    assert numerics.scale_of(torch.tensor(448.0)).item() == 1.0  # a scalar, e4m3 and deepseek unless told otherwise
    x = ordinary(5, 8)
    assert torch.equal(
        numerics.scale_of(x.abs().amax(), numerics.format_of((1, 1), I8)).view(1, 1),
        numerics.quantize(x, numerics.format_of((ALL, ALL), I8))[1],
    )


@pytest.mark.parametrize(
    ("shape", "block", "scales"),
    [
        ((5, 300), (1, 128), [5, 3]), ((5, 300), (1, ALL), [5, 1]), ((5, 300), (ALL, ALL), [1, 1]),
        ((5, 300), (ALL, 1), [1, 300]), ((5, 300), (128, 128), [1, 3]), ((5, 300), (ALL, 128), [1, 3]),
        ((5, 300), (2, ALL), [3, 1]), ((300,), (1, 128), [3]), ((300,), (ALL, ALL), [1]), ((300,), (ALL, 1), [300]),
        ((2, 4, 5, 300), (1, ALL), [2, 4, 5, 1]), ((2, 4, 5, 300), (ALL, ALL), [1, 1]),
        ((2, 4, 5, 300), (ALL, 128), [1, 3]), ((2, 4, 5, 300), (2, 100), [2, 4, 3, 3]),
        ((0, 300), (1, ALL), [0, 1]), ((0, 300), (ALL, ALL), [1, 1]), ((0, 300), (ALL, 128), [1, 3]),
        ((4, 0), (1, ALL), [4, 1]), ((4, 0), (1, 128), [4, 0]), ((4, 0), (ALL, 1), [1, 0]),
        ((4, 0), (ALL, ALL), [1, 1]), ((0,), (1, ALL), [1]), ((0,), (1, 4), [0]),
        ((2, 0, 300), (ALL, 1), [1, 300]), ((2, 0, 300), (2, ALL), [2, 0, 1]),
    ],
)  # fmt: skip
def test_scale_shape_also_of_nothing(shape: tuple[int, ...], block: tuple[int, int], scales: list[int]) -> None:
    assert numerics.scale_shape(shape, block) == scales
    for dtype in FORMATS:
        x = ordinary(*shape)
        q, scale = numerics.quantize(x, numerics.format_of(block, dtype))
        assert (list(q.shape), list(scale.shape)) == ([*shape], scales)
        assert bool((scale > 0).all()) and bool(scale.isfinite().all())
        assert numerics.quantize_static(x, scale, numerics.format_of(block, dtype)).shape == shape
        assert numerics.dequantize(q, scale, format=numerics.format_of(block, q.dtype)).shape == shape
        meta_q, meta_scale = numerics.quantize(x.to("meta"), numerics.format_of(block, dtype))
        assert (meta_q.shape, meta_scale.shape, meta_q.dtype) == (q.shape, scale.shape, dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    ("x_block", "w_block"),
    [((1, ALL), (1, ALL)), ((ALL, ALL), (ALL, ALL)), ((ALL, 1), (1, ALL)), ((1, 4), (5, 4)), ((ALL, ALL), (4, 4))],
)
def test_the_scaled_matmul(dtype: torch.dtype, x_block: tuple[int, int], w_block: tuple[int, int]) -> None:
    x, w, bias = ordinary(2, 3, 10), ordinary(7, 10, seed=1), ordinary(7, seed=2)
    x_values, x_scales = slow(x, x_block, dtype)
    w_values, w_scales = slow(w, w_block, dtype)
    want = np.zeros((2, 3, 7))
    for a, b, n in np.ndindex(2, 3, 7):
        terms = (
            float(x_values[a, b, k]) * float(x_scales[key_of((a, b, k), x_block)])
            * float(w_values[n, k]) * float(w_scales[key_of((n, k), w_block)]) for k in range(10)
        )  # fmt: skip
        want[a, b, n] = sum(terms) + bias[n].item()
    operands = (
        *numerics.quantize(x, numerics.format_of(x_block, dtype)),
        *numerics.quantize(w, numerics.format_of(w_block, dtype)),
        bias,
    )
    got = numerics.scaled_linear(
        *operands,
        x_format=numerics.format_of(x_block, dtype),
        w_format=numerics.format_of(w_block, dtype),
        out_dtype=torch.float32,
    )
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-5)


def test_errors() -> None:
    x, one = torch.ones(2, 4), torch.ones(1, 1)
    for block in ((0, ALL), (1, -2), (ALL,), (1, 2, 3)):
        with pytest.raises(QCompilerError) as error:
            numerics.quantize(x, numerics.format_of(block))
        need = "need [rows, columns], where -1 means the whole axis"
        assert str(error.value) == f"a block must be two positive sizes: got {list(block)}; {need}"
        with pytest.raises(QCompilerError, match="two positive sizes"):
            numerics.quantize_static(x, one, numerics.format_of(block))
    with pytest.raises(QCompilerError) as error:
        numerics.quantize_static(x, torch.ones(2, 1))
    problem = "the scale does not have one entry for each [-1, -1] block of float32[2, 4]"
    assert str(error.value) == f"{problem}: got float32[2, 1]; need [1, 1]"
    for bad in (torch.ones(2), torch.ones(1, 4), torch.ones(4, dtype=torch.int32), torch.tensor(1.0)):
        for call in (numerics.quantize, partial(numerics.quantize_static, scale=one)):
            with pytest.raises(QCompilerError) as error:
                call(x, prescale=bad)
            kind = f"{str(bad.dtype).removeprefix('torch.')}{list(bad.shape)}"
            problem = "the prescale does not have one number for each channel of float32[2, 4]"
            assert str(error.value) == f"{problem}: got {kind}; need float[4]"
    with pytest.raises(QCompilerError, match=r"the dtype is not an 8-bit code type: got torch.uint8; need torch"):
        numerics.quantize_static(x, one, numerics.format_of((-1, -1), torch.uint8))
    with pytest.raises(QCompilerError, match="Did you mean 'vllm'"):
        numerics.scale_of(one, numerics.format_of((1, 1), profile="vlm"))
    with pytest.raises(QCompilerError, match=r"cannot quantize this tensor: got int8\[2, 4\]"):
        numerics.quantize_static(x.to(I8), one)
