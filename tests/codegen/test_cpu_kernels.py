"""The kernels of the target cpu: equal to numerics and the dialects in every bit, at every size."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codegen.cpu import cache, expressions, quantize
from codegen.direct import kernels, unobserved
from qcompiler import QCompilerError, numerics
from qcompiler.dialects import state
from qcompiler.dialects.fused_expression import parse
from qcompiler.errors import InputError
from qcompiler.ir import CacheType, DType
from qcompiler.ir.formats import FP8_ROW, FP8_TENSOR, INT8_ROW
from qcompiler.numerics import ALL
from qcompiler.runtime.caches import allocate

CODES = (torch.float8_e4m3fn, torch.int8)


def same(got: Tensor, want: Tensor) -> bool:
    """Whether two tensors have equal shapes, dtypes and bits, and one order in memory; any two NaN are equal."""
    alike = (got.shape, got.dtype, got.is_contiguous()) == (want.shape, want.dtype, want.is_contiguous())
    left, right = got.float(), want.float()
    equal = (left == right) & (left.signbit() == right.signbit()) | left.isnan() & right.isnan()
    return alike and bool(equal.all())


@st.composite
def activations(draw: st.DrawFn) -> Tensor:
    shape = draw(st.sampled_from([(1, 576), (1, 1, 576), (3, 2, 128), (5, 1), (200,), (2, 3, 4, 64), (0, 64), (2, 0)]))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 10.0 ** draw(
        st.integers(-12, 12)
    )
    for value in draw(st.lists(st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, -0.0]), max_size=3)):
        if x.numel():
            x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    return x.to(dtype)


@given(
    activations(), st.sampled_from([(1, 128), (1, ALL), (1, 32), (128, 128), (ALL, ALL), (ALL, 1)]),
    st.sampled_from(CODES), st.sampled_from(sorted(numerics.PROFILES)), st.booleans(),
)  # fmt: skip
def test_quantizing_equals_the_reference(
    x: Tensor, block: tuple[int, int], dtype: torch.dtype, profile: str, prescaled: bool
) -> None:
    prescale = torch.linspace(0.5, 2, x.shape[-1]).to(x.dtype) if prescaled else None
    before = x.clone()
    got = quantize.quantize(x, block, dtype, profile, prescale, for_matmul=True)
    want = numerics.quantize(x, numerics.format_of(block, dtype, profile), prescale)
    assert same(x, before) and len(got) == len(want) == 2
    assert same(got[0], want[0]) and same(got[1], want[1])
    if block[0] == 1:
        values = quantize.dequantize_rows(*got, block[1])
        assert same(values, numerics.dequantize(*want, format=numerics.format_of(block, dtype, profile)))


def test_what_is_remembered_is_valid_as_long_as_codes_and_scales_are_unchanged() -> None:
    for columns in (128, 200):
        for change in ("codes", "scale", "others"):
            x, laid = torch.randn(2, columns), torch.empty(-(-columns // 128), 4).t()[:2]
            codes, scale = quantize.quantize(x, (1, 128), CODES[0], "deepseek", None, laid, for_matmul=True)
            assert scale is laid and quantize._remembered(codes, scale) is not None
            if change == "codes":
                codes.copy_(-codes.float())
            elif change == "scale":
                scale.mul_(2)
            else:
                codes, scale = codes.clone(), scale.clone()
            assert quantize._remembered(codes, scale) is None
            values = quantize.dequantize_rows(codes, scale, 128)
            assert same(values, numerics.dequantize(codes, scale, format=numerics.format_of((1, 128))))


def test_every_code_has_its_value_at_every_size() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for count in (1, quantize.FEW // 256 + 1, quantize.MANY // 256 + 1):
        many = codes.repeat(count)
        assert same(quantize.decoded(many), many.to(torch.float32))
    assert same(quantize.decoded(codes.repeat(64).view(64, 256)[:, ::2]), codes[::2].float().repeat(64, 1))


def test_wrong_operands_raise_the_errors_of_the_reference() -> None:
    with pytest.raises(QCompilerError, match="cannot quantize this tensor"):
        quantize.quantize(torch.ones(3, dtype=torch.int64), (1, 128), CODES[0], "deepseek")
    with pytest.raises(QCompilerError, match="the prescale does not have one number for each channel"):
        quantize.quantize(torch.ones(3, 4), (1, 128), CODES[0], "deepseek", torch.ones(3))
    with pytest.raises(QCompilerError, match="the scale does not have one entry for each"):
        quantize.dequantize_rows(torch.ones(2, 256).to(CODES[0]), torch.ones(2, 1), 128)


EXPRESSIONS = [
    "bf16(x1 * bf16(x0 * rsqrt(mean(x0 * x0) + 1e-05)))",
    "h = bf16(x0 + x2); n = rsqrt(mean(h * h) + 1e-06); bf16(x1 * bf16(h * n))",
    "bf16(silu(bf16(x0)) * bf16(x2))",
    "bf16(x0 - x2)", "f16(x0 * x2)", "bf16(f16(x0 + x2))", "bf16(bf16(x0))", "x0", "bf16(x1)", "h = x1; x0 + h",
    "x0 / 3.0", "3.0 / x0 - -1.0", "bf16(x0 * 1.001)", "standardize(x0, 1e-05) * x1", "neg(x0) * 2.0",
]  # fmt: skip


@pytest.mark.parametrize("text", EXPRESSIONS)
@pytest.mark.parametrize("dtypes", [("bfloat16",) * 3, ("float32",) * 3, ("float16", "bfloat16", "float32")])
def test_expressions_equal_their_definition(text: str, dtypes: tuple[str, ...]) -> None:
    made = parse(text)
    drawn = (torch.randn(3, 70) * 100, torch.randn(70), torch.randn(3, 70))
    given_ = {f"x{place}": x.to(getattr(torch, dtypes[place])) for place, x in enumerate(drawn)}
    operands = {name: given_[name] for name in made.operands}
    keep = [name for name, _ in made.definitions][:1]
    for got, want in zip(expressions.evaluate(text, operands, keep), made.run(operands, keep), strict=True):
        assert same(got, want)


def test_a_sum_of_two_bf16_tensors_is_one_call() -> None:
    operands = {name: torch.randn(2, 8).bfloat16() for name in ("x0", "x1")}
    with torch.autograd.profiler.profile() as profile:
        expressions.evaluate("bf16(x0 + x1)", operands)
    assert [event.name for event in profile.function_events] == ["aten::add"]


@pytest.mark.parametrize("element", [DType.bf16, DType.f32, FP8_ROW, INT8_ROW])
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize(
    ("window", "softcap", "sinks", "slopes", "chunk"),
    [
        (None, None, False, False, None),
        (5, 4.0, True, False, None),
        (None, None, False, True, 6),
        (5, 4.0, True, True, 6),
    ],
)
def test_caches_equal_the_state_dialect(
    element: Any, rows: int, window: int | None, softcap: float | None, sinks: bool, slopes: bool, chunk: int | None
) -> None:
    kind = CacheType(element, slots=rows + 1, heads=2, capacity=40, key=16, value=16)
    mine, theirs = allocate(kind, "cpu").tensors, allocate(kind, "cpu").tensors
    dtype = torch.bfloat16 if element is DType.bf16 else torch.float32
    slots, lengths = torch.arange(rows) + 1, torch.arange(rows) % 7
    sink, slope = torch.randn(6) if sinks else None, torch.rand(6) if slopes else None
    for tokens in (4, 1, 1, 9, 1):
        key, value = (torch.randn(rows, tokens, 2, 16).to(dtype).transpose(1, 2) for _ in range(2))
        query = torch.randn(rows, tokens, 6, 16).to(dtype).transpose(1, 2)
        cache.append(mine, key, value, slots, lengths)
        state.append(theirs, key, value, slots, lengths)
        got = cache.attend(mine, query, slots, lengths, sink, None, slope, 0.3, window, softcap, chunk)
        forms: dict[str, Any] = {"scale": 0.3, "window": window, "softcap": softcap, "chunk": chunk}
        want = state.attend(theirs, query, slots, lengths, sink, None, slope, **forms)
        assert same(got, want)
        lengths = lengths + tokens
    assert all(same(one, other) for one, other in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("element", [DType.bf16, FP8_ROW, INT8_ROW, FP8_TENSOR])
@pytest.mark.parametrize("rows", [3, 20])
def test_values_within_the_keys_equal_the_state_dialect(element: Any, rows: int) -> None:
    kind = CacheType(element, slots=rows, heads=1, capacity=20, key=20, value=16, within=True)
    static = [torch.tensor([0.02])] * 2 if kind.is_static else []
    mine, theirs = ([*allocate(kind, "cpu").tensors, *static] for _ in range(2))
    slots, lengths = torch.arange(rows), torch.arange(rows) % 7
    for tokens in (4, 1, 1):
        key, query = (torch.randn(rows, heads, tokens, 20).bfloat16() for heads in (1, 4))
        cache.append(mine, key, key[..., :16], slots, lengths)
        state.append(theirs, key, key[..., :16], slots, lengths)
        got = cache.attend(mine, query, slots, lengths, None, None, None, 0.3, None, None, None)
        assert same(got, state.attend(theirs, query, slots, lengths, scale=0.3))
        lengths = lengths + tokens
    assert all(same(one, other) for one, other in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(("slot", "length"), [(2, 0), (-1, 0), (0, 4), (0, -1)])
def test_rows_outside_the_cache_are_named(slot: int, length: int) -> None:
    tensors = allocate(CacheType(DType.f32, slots=2, heads=1, capacity=4, key=4, value=4), "cpu").tensors
    new, rest = torch.ones(1, 1, 1, 4), (torch.tensor([slot]), torch.tensor([length]))
    with pytest.raises(InputError, match="row 0"):
        cache.append(tensors, new, new, *rest)
    with pytest.raises(InputError, match="row 0"):
        cache.attend(tensors, new, *rest, None, None, None, 1.0, None, None, None)
    assert not any(tensor.any() for tensor in tensors)


def test_calls_bypass_the_dispatcher_unless_they_are_observed() -> None:
    x = torch.randn(2, 128)
    arguments = ([1, 128], torch.float8_e4m3fn, "deepseek", "row_major")
    assert unobserved(x) and not unobserved(x.clone().requires_grad_())
    with torch.autograd.profiler.profile() as profile:
        assert not unobserved(x)
        observed = kernels.quantize(x, *arguments)
    assert any(event.name == "qcompiler::quantize" for event in profile.function_events)
    assert all(same(one, other) for one, other in zip(kernels.quantize(x, *arguments), observed, strict=True))
