"""`qcompiler.numerics` against a second implementation: loops over blocks, rounding by a table, by definition."""

import bisect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from qcompiler import numerics
from qcompiler.errors import QCompilerError
from qcompiler.numerics.dtypes import ir_dtype

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
F32 = np.float32


def code_values(exponent_bits: int, mantissa_bits: int, top: float) -> list[float]:
    """The non-negative values of a small float format, by code: the definition of the format."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            value = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
            values += [value] if value <= top else []
    return values


TABLES = {E4M3: code_values(4, 3, 448.0), E5M2: code_values(5, 2, 57344.0)}
NAN_CODE = 255  # replaces every NaN


def rounded_code(value: float, dtype: torch.dtype) -> int:
    """The code nearest to a float64 value, ties to the even code, saturated."""
    if math.isnan(value):
        return NAN_CODE
    table = TABLES[dtype]
    magnitude = min(abs(value), table[-1])
    above = min(bisect.bisect_left(table, magnitude), len(table) - 1)
    below = max(above - 1, 0)
    up, down = table[above] - magnitude, magnitude - table[below]
    code = above if up < down or (up == down and above % 2 == 0) else below
    return code | (0x80 if math.copysign(1.0, value) < 0 else 0)


def naive(x: np.ndarray[Any, Any], rows: int, columns: int, dtype: torch.dtype, name: str) -> tuple[Any, Any]:
    """Codes and scales of a float32 matrix, block after block."""
    floor, reciprocal, ue8m0 = {
        "deepseek": (1e-4, False, False),
        "deepgemm": (1e-4, True, False),
        "vllm": (1e-10, False, False),
        "ue8m0": (1e-4, False, True),
    }[name]
    m, k = x.shape
    codes = np.zeros((m, k), np.uint8)
    scales = np.zeros((-(-m // rows), -(-k // columns)), F32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = x[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            amax = max([abs(float(v)) for v in block.flat if np.isfinite(v)] + [float(F32(floor))])
            scale = F32(amax) / F32(TABLES[dtype][-1])
            if rows == 1 and not np.isfinite(block).all():
                scale = F32(np.nan)
            elif ue8m0:
                fraction, exponent = math.frexp(float(scale))
                scale = F32(math.ldexp(1.0, exponent - 1 if fraction == 0.5 else exponent))
            scales[i, j] = scale
            for r, c in np.ndindex(*block.shape):
                with np.errstate(all="ignore"):
                    scaled = block[r, c] * (F32(1) / scale) if reciprocal else block[r, c] / scale
                value = float(scaled) if np.isfinite(block[r, c]) else math.nan
                codes[i * rows + r, j * columns + c] = rounded_code(value, dtype)
    return codes, scales


def codes_of(q: Tensor) -> Any:
    codes = q.view(torch.uint8).numpy().copy()
    codes[q.float().isnan().numpy()] = NAN_CODE
    return codes


def check(x: Tensor, block: tuple[int, int] = (1, 128), dtype: torch.dtype = E4M3, name: str = "deepseek") -> None:
    q, scale = numerics.quantize(x, numerics.format_of(block, dtype, name))
    codes, scales = naive(x.float().numpy(), *block, dtype, name)
    assert q.is_contiguous() and scale.is_contiguous() and scale.dtype == torch.float32
    np.testing.assert_array_equal(scale.numpy(), scales)
    np.testing.assert_array_equal(codes_of(q), codes)


awkward = st.one_of(
    st.floats(width=32),
    st.floats(-1e3, 1e3, width=32),
    st.sampled_from(
        [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-45, 3e38, 448.0, 464.0, 1.0625, 17.0, 2.0**-10]
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(awkward, min_size=1, max_size=40), st.integers(1, 7), st.integers(1, 3), st.integers(1, 9),
    st.sampled_from([E4M3, E5M2]), st.sampled_from(sorted(numerics.PROFILES)),
)  # fmt: skip
def test_any_content_shape_and_block(
    values: list[float], width: int, rows: int, columns: int, dtype: torch.dtype, name: str
) -> None:
    values = values + [0.5] * (-len(values) % width)
    check(torch.tensor(values).view(-1, width), (rows, columns), dtype, name)


@pytest.mark.parametrize("name", sorted(numerics.PROFILES))
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(3, 256), (5, 200), (1, 128), (2, 1)])
def test_ordinary_values(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    check(x, (1, 128), dtype, name)
    check(x.bfloat16(), (2, 128), dtype, name)
    check(x.half(), (128, 128), dtype, name)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_code_every_tie_and_their_neighbours(dtype: torch.dtype) -> None:
    # With the largest value in the block the scale is 1, and x / scale is x: this is the rounding itself.
    table = np.array(TABLES[dtype])
    ties = (table[1:] + table[:-1]) / 2
    points = np.concatenate([table, ties]).astype(F32)
    near = np.concatenate([points, np.nextafter(points, F32(np.inf)), np.nextafter(points, F32(-np.inf))])
    values = np.minimum(np.concatenate([near, -near]), F32(table[-1])).clip(-F32(table[-1]))
    x = torch.from_numpy(np.concatenate([values, [F32(table[-1])]]))[None]
    q, scale = numerics.quantize(x, numerics.format_of((1, x.shape[1]), dtype))
    assert scale.item() == 1.0
    assert codes_of(q)[0].tolist() == [rounded_code(float(v), dtype) for v in x[0]]


def test_a_zero_block_gives_zeros_and_a_positive_scale() -> None:
    for name, rule in numerics.PROFILES.items():
        q, scale = numerics.quantize(torch.zeros(2, 128), numerics.format_of((1, 128), profile=name))
        assert bool((q.view(torch.uint8) == 0).all()) and bool((scale > 0).all())
        if rule.scale_format == "f32":
            assert scale[0, 0].item() == float(F32(rule.amax_floor(ir_dtype(E4M3))) / F32(448))


@pytest.mark.parametrize("name", sorted(numerics.PROFILES))
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_tile_with_nan_or_infinity_is_nan_and_no_other_is(odd: float, name: str) -> None:
    x = torch.randn(3, 256)
    clean_q, clean_scale = numerics.quantize(x, numerics.format_of((1, 128), profile=name))
    x[1, 133] = odd
    q, scale = numerics.quantize(x, numerics.format_of((1, 128), profile=name))
    assert scale.isnan().tolist() == [[False, False], [False, True], [False, False]]
    assert bool(q[1, 128:].float().isnan().all()) and bool(numerics.dequantize(q, scale)[1, 128:].isnan().all())
    q[1, 128:], scale[1, 1] = clean_q[1, 128:], clean_scale[1, 1]
    assert torch.equal(q.view(torch.uint8), clean_q.view(torch.uint8)) and torch.equal(scale, clean_scale)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_block_of_several_rows_has_nan_where_it_is_not_finite(odd: float) -> None:
    x = torch.randn(128, 128).clamp(-2, 2)
    x[3, 7] = 2.0
    clean_q, clean_scale = numerics.quantize(x, numerics.format_of((128, 128)))
    x[5, 9] = odd
    q, scale = numerics.quantize(x, numerics.format_of((128, 128)))
    assert torch.equal(scale, clean_scale)
    assert q.float().isnan().nonzero().tolist() == [[5, 9]]
    q[5, 9] = clean_q[5, 9]
    assert torch.equal(q.view(torch.uint8), clean_q.view(torch.uint8))


def test_ue8m0_rounds_the_scale_up_and_quantizes_with_it() -> None:
    amax = torch.tensor([448.0, 448.0 * (1 + 2**-20), 447.9, 896.0, 1e-3, 3e38])
    x = amax[:, None] * torch.ones(1, 128)
    q, scale = numerics.quantize(x, numerics.format_of((1, 128), profile="ue8m0"))
    _, exact = numerics.quantize(x)
    assert scale[:, 0].tolist() == [2.0 ** math.ceil(math.log2(s)) for s in exact[:, 0].tolist()]
    assert bool((scale >= exact).all())
    assert bool((numerics.dequantize(q, scale) - x).abs().div(x).max() <= 2**-4)


@pytest.mark.parametrize("shape", [(0, 256), (1, 256), (0, 3, 128), (2, 0, 128), (4, 0), (0, 100)])
def test_empty_and_single_rows(shape: tuple[int, ...]) -> None:
    q, scale = numerics.quantize(torch.randn(shape))
    assert q.shape == shape and scale.shape == (*shape[:-1], -(-shape[-1] // 128))
    assert numerics.dequantize(q, scale).shape == shape
    assert numerics.quantize(torch.randn(shape), numerics.format_of((128, 128)))[0].shape == shape


def test_a_vector_is_one_row() -> None:
    x = torch.randn(300)
    q, scale = numerics.quantize(x)
    row_q, row_scale = numerics.quantize(x[None])
    assert q.shape == (300,) and torch.equal(scale, row_scale[0])
    assert torch.equal(q.view(torch.uint8), row_q[0].view(torch.uint8))
    assert torch.equal(numerics.dequantize(q, scale), numerics.dequantize(row_q, row_scale)[0])
    assert numerics.quantize(x, numerics.format_of((128, 128)))[1].shape == (3,)


def test_leading_dimensions_are_a_batch() -> None:
    x = torch.randn(2, 3, 200, 300)
    for block in ((1, 128), (128, 128)):
        q, scale = numerics.quantize(x, numerics.format_of(block))
        one_q, one_scale = numerics.quantize(x[1, 2], numerics.format_of(block))
        assert torch.equal(q[1, 2].view(torch.uint8), one_q.view(torch.uint8)) and torch.equal(scale[1, 2], one_scale)


def test_strides_do_not_matter() -> None:
    x = torch.randn(256, 384)
    for view in (
        x.T,
        x[:, ::2],
        x[::3, 100:228],
        x.view(2, 128, 384).transpose(0, 1),
        torch.randn(1, 128).expand(5, 128),
    ):
        for block in ((1, 128), (128, 128)):
            q, scale = numerics.quantize(view, numerics.format_of(block))
            want_q, want_scale = numerics.quantize(view.contiguous(), numerics.format_of(block))
            assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8)) and torch.equal(scale, want_scale)
            strided = torch.empty(*scale.shape[:-2], *scale.shape[:-3:-1]).mT.copy_(scale)
            assert torch.equal(
                numerics.dequantize(q, strided, format=numerics.format_of(block, q.dtype)),
                numerics.dequantize(q, scale, format=numerics.format_of(block, q.dtype)),
            )


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_dequantize_is_exact_for_every_code(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    got = numerics.dequantize(codes, torch.ones(2), format=numerics.format_of((1, 128), dtype))
    assert torch.equal(got.nan_to_num(nan=-1.0), codes.float().nan_to_num(nan=-1.0))
    assert torch.equal(got.isnan(), codes.float().isnan())
    tiny = numerics.dequantize(codes, torch.full((2,), 2.0**-100), format=numerics.format_of((1, 128), dtype))
    assert torch.equal(tiny.nan_to_num(nan=-1.0), (codes.float() * 2.0**-100).nan_to_num(nan=-1.0))


def test_dequantize_ragged_blocks() -> None:
    q, _ = numerics.quantize(torch.randn(130, 200), numerics.format_of((64, 128)))
    scale = torch.rand(3, 2)
    want = q.float() * scale.repeat_interleave(64, 0)[:130].repeat_interleave(128, 1)[:, :200]
    assert torch.equal(numerics.dequantize(q, scale, format=numerics.format_of((64, 128), q.dtype)), want)
    assert torch.equal(
        numerics.dequantize(q, scale, format=numerics.format_of((64, 128), q.dtype), out_dtype=torch.bfloat16),
        want.bfloat16(),
    )


@pytest.mark.parametrize("name", sorted(numerics.PROFILES))
def test_round_trip_error(name: str) -> None:
    x = torch.randn(64, 512)
    back = numerics.dequantize(*numerics.quantize(x, numerics.format_of((1, 128), profile=name)))
    assert float((back - x).norm() / x.norm()) < 0.03


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_scaled_linear(lead: tuple[int, ...], out_dtype: torch.dtype) -> None:
    x, w, bias = torch.randn(*lead, 300), torch.randn(200, 300), torch.randn(200)
    x_q, x_s = numerics.quantize(x)
    w_q, w_s = numerics.quantize(w, numerics.format_of((128, 128)))
    got = numerics.scaled_linear(x_q, x_s, w_q, w_s, bias, out_dtype=out_dtype)
    left = x_q.double() * x_s.double().repeat_interleave(128, -1)[..., :300]
    right = w_q.double() * w_s.double().repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    want = left @ right.T + bias.double()
    assert got.dtype == out_dtype and got.shape == (*lead, 200)
    tolerance = 1e-6 if out_dtype == torch.float32 else 2.5e-3
    assert 0 in lead or float((got.double() - want).norm() / want.norm()) < tolerance


def test_meta_tensors() -> None:
    for shape in ((7, 300), (300,), (2, 7, 256), (0, 128)):
        for block in ((1, 128), (128, 128)):
            q, scale = numerics.quantize(
                torch.empty(shape, device="meta", dtype=torch.bfloat16), numerics.format_of(block)
            )
            real_q, real_scale = numerics.quantize(torch.zeros(shape), numerics.format_of(block))
            assert (q.shape, q.dtype, scale.shape) == (real_q.shape, real_q.dtype, real_scale.shape)
            assert numerics.dequantize(q, scale, format=numerics.format_of(block, q.dtype)).shape == shape


def test_fake_tensors_keep_the_number_of_rows_symbolic() -> None:
    shapes = ShapeEnv()
    context: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    with FakeTensorMode(shape_env=shapes) as mode:
        x = mode.from_tensor(torch.randn(37, 300), symbolic_context=context)
        w = mode.from_tensor(torch.randn(200, 300))
        for block in ((1, 128), (128, 128)):
            q, scale = numerics.quantize(x, numerics.format_of(block))
            w_q, w_s = numerics.quantize(w, numerics.format_of((128, 128)))
            out = numerics.scaled_linear(q, scale, w_q, w_s, x_format=numerics.format_of(block, q.dtype))
            assert str(q.shape[0]) == str(x.shape[0]) and str(out.shape[0]) == str(x.shape[0])
    assert not shapes.replacements, "the number of rows became a constant"


def test_errors_say_what_was_got() -> None:
    with pytest.raises(QCompilerError, match="Did you mean 'deepseek'"):
        numerics.profile("deepseak")
    with pytest.raises(QCompilerError, match="unknown quantization profile: got 'x'"):
        numerics.quantize(torch.ones(1, 128), numerics.format_of((1, 128), profile="x"))
    with pytest.raises(QCompilerError, match=r"the dtype is not an 8-bit code type: got torch\.bfloat16"):
        numerics.quantize(torch.ones(1, 128), numerics.format_of((1, 128), torch.bfloat16))
    for block in ((128,), (0, 128), (1, -2)):
        with pytest.raises(QCompilerError, match="two positive sizes"):
            numerics.quantize(torch.ones(1, 128), numerics.format_of(block))
    for bad in (torch.tensor(1.0), torch.ones(2, 2, dtype=torch.int32)):
        with pytest.raises(QCompilerError, match="cannot quantize this tensor"):
            numerics.quantize(bad)
    q, scale = numerics.quantize(torch.ones(2, 256))
    with pytest.raises(
        QCompilerError, match=r"one entry for each \[1, 128\] block .*got float32\[2, 1\]; need \[2, 2\]"
    ):
        numerics.dequantize(q, scale[:, :1])
    with pytest.raises(QCompilerError, match="do not match"):
        numerics.scaled_linear(q, scale, *numerics.quantize(torch.ones(4, 128), numerics.format_of((128, 128))))


def test_the_input_is_not_changed() -> None:
    x = torch.randn(4, 256)
    x[0, 0] = math.nan
    before = x.clone()
    q, scale = numerics.quantize(x)
    codes = q.view(torch.uint8).clone()
    numerics.dequantize(q, scale)
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))
    assert torch.equal(q.view(torch.uint8), codes)


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (1, numerics.ALL)])
@pytest.mark.parametrize("dtype", numerics.FORMAT_MAX)
def test_a_large_stack_of_matrices_goes_one_by_one(
    monkeypatch: pytest.MonkeyPatch, block: tuple[int, int], dtype: torch.dtype
) -> None:
    x = torch.randn(3, 2, 200, 150, generator=torch.Generator().manual_seed(0))
    factors = torch.rand(150) + 0.5
    whole = numerics.quantize(x, numerics.format_of(block, dtype), prescale=factors)
    monkeypatch.setattr(numerics, "MOST_AT_ONCE", 1000)
    parts = numerics.quantize(x, numerics.format_of(block, dtype), prescale=factors)
    assert parts[0].is_contiguous() and parts[0].dtype == dtype
    assert torch.equal(parts[0].view(torch.uint8), whole[0].view(torch.uint8)) and torch.equal(parts[1], whole[1])
