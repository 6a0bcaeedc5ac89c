"""GEMMs with a fused expression on a Hopper GPU: each form of the kernel, and each path of the operator."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hopper_kernels import all_fused_configs, launch_fused
from torch import Tensor

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.launching.launch import launch
from codegen.operators import fused_linear as fused_product
from codegen.operators.quantize import scale_like
from codegen.targets.hopper import HOPPER
from codegen.templates.fused import FINER, FUSED_GEMM, FusedGemm, FusedGemmConfig, FusedGemmProblem, FusedOperands
from codegen.templates.fused_expression import expression_call
from codegen.templates.gemm import GemmOperands
from codegen.templates.template import ceil_div
from qcompiler import numerics
from qcompiler.dialects.fused_expression import parse

pytestmark = pytest.mark.gpu

E4M3 = torch.float8_e4m3fn
SWIGLU = "bf16(bf16(silu(bf16(y0))) * bf16(y1))"
RESIDUAL = "bf16(x0 + bf16(y0))"
SCALED = "f16(x0 + f16(f16(y0) * x1))"
GELU = "bf16(gelu(bf16(y0)))"
FORMS = all_fused_configs()
forms = pytest.mark.parametrize("config", FORMS, ids=str)
ROWS = (1, 63, 64, 65, 127, 129, 300, 4095)
RELATIVE = {torch.bfloat16: 4e-3, torch.float16: 2e-3, torch.float32: 5e-4}


def operands(m: int, n: int, k: int, garbage: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distinct codes and scales, for sums of about 1; `garbage` rows of NaN follow x and its scales."""
    generator = torch.Generator("cuda").manual_seed(m + n + k)

    def codes(rows: int) -> Tensor:
        return torch.randn(rows, k, generator=generator, device="cuda").to(E4M3)

    blocks, padded = ceil_div(k, 128), (m + 3) // 4 * 4 + 4 * garbage
    x = torch.full((m + garbage, k), 0x7F, dtype=torch.uint8, device="cuda").view(E4M3)
    x[:m] = codes(m)
    columns = torch.full((blocks, padded), math.nan, device="cuda")
    columns[:, :m] = torch.rand(blocks, m, generator=generator, device="cuda") + 0.5
    w_scale = (torch.rand(ceil_div(n, 128), blocks, generator=generator, device="cuda") + 0.5) / k**0.5
    return x[:m], columns.as_strided((m, blocks), (1, padded)), codes(n), w_scale


def exact(x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None) -> Tensor:
    """The sums in FP32, rounded once from float64."""
    k = x.shape[1]
    left = x.double() * xs.double().repeat_interleave(128, 1)[:, :k]
    spread = ws.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    result = left @ (w.double() * spread[: w.shape[0], :k]).T
    return (result if bias is None else result + bias.double()).float()


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def expression_of(config: FusedGemmConfig) -> tuple[str, int]:
    """An expression for a form, and its number of operands other than the sums."""
    return (SWIGLU, 0) if config.parts == 2 else (SCALED, 2)


def others_of(count: int, m: int, n: int) -> list[Tensor]:
    """Rows with a stride larger than their length, and a vector."""
    made = [torch.randn(m, n + 24, device="cuda", dtype=torch.bfloat16)[:, :n], torch.randn(n, device="cuda")]
    return made[:count]


@forms
@pytest.mark.parametrize("m", ROWS)
def test_rows_and_garbage_and_equal_bits(config: FusedGemmConfig, m: int) -> None:
    n, k = 384, 1040
    x, xs, w, ws = operands(m, n * config.parts, k)
    expression, count = expression_of(config)
    bias = torch.randn(n * config.parts, device="cuda", dtype=torch.bfloat16)
    others = others_of(count, m, n)
    made = parse(expression)
    whole = torch.full((m + 9, n), 7.0, dtype=made.dtype(), device="cuda")
    out = whole[:m].fill_(math.nan)
    launch_fused(config, expression, x, w, xs, ws, bias, others, out)
    sums = exact(x, xs, w, ws, bias).chunk(config.parts, -1)
    named = {f"y{place}": y for place, y in enumerate(sums)} | {f"x{place}": x for place, x in enumerate(others)}
    assert relative_error(out, made.run(named)[0]) <= RELATIVE[made.dtype()]
    assert bool((whole[m:] == 7.0).all()), "wrote beyond the last row"
    again = torch.empty_like(out)
    for _ in range(5):
        launch_fused(config, expression, x, w, xs, ws, bias, others, again.fill_(math.nan))
        assert torch.equal(out, again), "a repeated run gave other bits: a race"


@forms
@pytest.mark.parametrize(
    ("dtype", "profile", "layout"),
    [
        (E4M3, "deepseek", "col_major"),
        (E4M3, "deepgemm", "row_major"),
        (torch.float8_e5m2, "ue8m0", "row_major"),
        (torch.int8, "vllm", "col_major"),
    ],
)
def test_codes_match_the_quantized_result(
    config: FusedGemmConfig, layout: str, dtype: torch.dtype, profile: str
) -> None:
    for m, n, k in ((1, 128, 128), (129, 512, 400), (1000, 1408, 2048)):
        x, xs, w, ws = operands(m, n * config.parts, k)
        expression, count = expression_of(config)
        others = others_of(count, m, n)
        result = torch.empty(m, n, dtype=parse(expression).dtype(), device="cuda")
        launch_fused(config, expression, x, w, xs, ws, None, others, result)
        want, want_scale = numerics.quantize(result, numerics.format_of((1, 128), dtype, profile))
        codes = torch.full((m + 3, n), 0x55, dtype=torch.uint8, device="cuda")
        scale = scale_like(torch.empty(m + 3, n, device="cuda"), 128, layout).fill_(-1.0)
        launch_fused(config, expression, x, w, xs, ws, None, others, codes[:m].view(dtype), scale[:m], profile)
        assert torch.equal(codes[:m], want.view(torch.uint8))
        assert torch.equal(scale[:m], want_scale)
        assert bool((codes[m:] == 0x55).all()) and bool((scale[m:] == -1.0).all()), "wrote beyond the last row"


@pytest.mark.parametrize("config", [form for form in FORMS if form.parts == 1], ids=str)
@pytest.mark.parametrize("n", [1, 8, 136, 200, 1000])
def test_columns_that_do_not_fill_a_tile(config: FusedGemmConfig, n: int) -> None:
    expression = "bf16(exp(bf16(y0) * 0.1) + x0)"  # not zero beyond the last column
    for m, k in ((65, 144), (300, 1104)):
        x, xs, w, ws = operands(m, n, k)
        other, bias = torch.randn(m, n, device="cuda"), torch.randn(n, device="cuda")
        out = torch.full((m * n + 64,), 7.0, dtype=torch.bfloat16, device="cuda")
        result = out[: m * n].view(m, n)
        launch_fused(config, expression, x, w, xs, ws, bias, [other], result)
        (want,) = parse(expression).run({"x0": other, "y0": exact(x, xs, w, ws, bias)})
        assert relative_error(result, want) <= 4e-3 and bool((out[m * n :] == 7.0).all())
        codes, scale = torch.empty(m, n, dtype=E4M3, device="cuda"), torch.empty(m, ceil_div(n, 128), device="cuda")
        launch_fused(config, expression, x, w, xs, ws, bias, [other], codes, scale)
        want_codes, want_scale = numerics.quantize(result, numerics.format_of((1, 128), E4M3))
        assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8)) and torch.equal(scale, want_scale)


@pytest.mark.parametrize(
    ("config", "m", "n"), [(FusedGemmConfig(2, 2, 3), 500, 14336), (FusedGemmConfig(1, 2, 3), 1500, 4100)], ids=str
)
def test_two_forms_compute_the_bits_of_one(config: FusedGemmConfig, m: int, n: int) -> None:
    """The last columns of tiles have another form; their rows and columns do not fill all tiles."""
    template, k = FUSED_GEMM.family(HOPPER).template(config), 512
    assert isinstance(template, FusedGemm)
    x, xs, w, ws = operands(m, n * config.parts, k)
    expression, count = expression_of(config)
    others = others_of(count, m, n)
    results = []
    for columns in (((config, 0, ceil_div(n, 128)),), ((config, 0, 31), (FINER[config], 31, ceil_div(n, 128) - 31))):
        codes = torch.full((m + 3, n), 0x55, dtype=torch.uint8, device="cuda")
        scale = torch.full((m + 3, ceil_div(n, 128)), -1.0, device="cuda")
        gemm = GemmOperands(x, w, codes[:m].view(E4M3), xs, ws, None)
        with mock.patch.object(FusedGemm, "launches", return_value=columns):
            FUSED_GEMM.family(HOPPER).launch(config, FusedOperands(expression, gemm, others, scale[:m]))
        results.append((codes, scale))
    (codes, scale), (other_codes, other_scale) = results
    assert torch.equal(codes, other_codes) and torch.equal(scale, other_scale)
    assert bool((scale[:m] > 0).all()) and bool((codes[m:] == 0x55).all())


@pytest.mark.parametrize("parts", [1, 2])
def test_sums_that_the_expression_does_not_round(parts: int) -> None:
    config = next(form for form in FORMS if form.parts == parts and form.waves == 1)
    expression = "y0 * 2" if parts == 1 else "y0 - y1 * 0.5"
    problem = FusedGemmProblem(200, 256, 512, parts, handed_bytes=4, block=None)
    assert FUSED_GEMM.family(HOPPER).why_not(config, problem) is None
    x, xs, w, ws = operands(200, 256 * parts, 512)
    out = torch.full((200, 256), math.nan, device="cuda")
    launch_fused(config, expression, x, w, xs, ws, None, [], out)
    sums = exact(x, xs, w, ws, None).chunk(parts, -1)
    assert relative_error(out, parse(expression).run({f"y{place}": y for place, y in enumerate(sums)})[0]) <= 5e-4


@forms
@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
def test_nonfinite_values_poison_their_tile_of_the_result(config: FusedGemmConfig, dtype: torch.dtype) -> None:
    """A NaN code or NaN scale of a row makes its results NaN; a non-finite column makes one tile of each row NaN."""
    m, n, k = 70, 256, 256
    x, xs, w, ws = operands(m, n * config.parts, k)
    expression = SWIGLU if config.parts == 2 else GELU
    bias = torch.zeros(n * config.parts, device="cuda")
    for columns in (False, True):
        x.view(torch.uint8)[5, 200], xs[9, 0] = 0x7F, math.nan
        if columns:
            bias[3] = math.inf
        result = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        launch_fused(config, expression, x, w, xs, ws, bias, [], result)
        codes, scale = torch.empty(m, n, dtype=dtype, device="cuda"), torch.empty(m, n // 128, device="cuda")
        launch_fused(config, expression, x, w, xs, ws, bias, [], codes, scale)
        want, want_scale = numerics.quantize(result, numerics.format_of((1, 128), dtype))
        assert result.isnan().all(1).nonzero().flatten().tolist() == [5, 9]
        poisoned = scale.isnan()
        assert poisoned.all(1).nonzero().flatten().tolist() == [5, 9] and bool(poisoned[:, 0].all()) == columns
        torch.testing.assert_close(scale, want_scale, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(codes.float().isnan(), want.float().isnan())
        assert torch.equal(codes.float().nan_to_num(), want.float().nan_to_num())


CASES: dict[str, tuple[str, int, tuple[str, ...], dict[str, Any]]] = {
    "swiglu": (SWIGLU, 2, (), {"block": [1, 128], "dtype": E4M3, "profile": "deepseek", "scale_layout": "col_major"}),
    "swiglu rows": (SWIGLU, 2, (), {"block": [1, -1], "dtype": E4M3, "profile": "vllm", "scale_layout": "row_major"}),
    "residual": (RESIDUAL, 1, ("tensor",), {}),
    "gelu": (GELU, 1, (), {}),
    "scaled": (SCALED, 1, ("tensor", "vector"), {}),
    "unrounded": ("bf16(gelu(y0))", 1, (), {
        "block": [1, 128], "dtype": E4M3, "profile": "vllm", "scale_layout": "row_major"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [(1,), (3, 5), (2, 150), (2048,)])
def test_the_operator_on_every_path(case: str, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    expression, parts, kinds, options = CASES[case]
    n, k = 768, 1024
    m = math.prod(rows)
    x, xs, w, ws = operands(m, n * parts, k, garbage=0)
    x, xs = x.view(*rows, k), xs if len(rows) == 1 else xs.unflatten(0, rows)
    bias = torch.randn(n * parts, device="cuda", dtype=torch.bfloat16)
    others = [
        torch.randn(*rows, n, device="cuda") if kind == "tensor" else torch.randn(n, device="cuda") for kind in kinds
    ]
    arguments = (x, xs, w, ws, bias, others, expression, parts, [1, 128], [128, 128])
    results = {"chosen": torch.ops.qcompiler.fused_linear(*arguments, **options)}
    again = torch.ops.qcompiler.fused_linear(*arguments, **options)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(results["chosen"], again, strict=True))
    monkeypatch.setattr(fused_product, "_config", lambda *facts: fused_product.SEPARATE)
    results["separate"] = torch.ops.qcompiler.fused_linear(*arguments, **options)
    waves = 1 if expression == "bf16(gelu(y0))" else 2
    form = next(form for form in FORMS if (form.parts, form.waves) == (parts, waves))
    if options.get("block") != [1, -1]:
        monkeypatch.setattr(fused_product, "_config", lambda *facts: form)
        monkeypatch.setattr(fused_product, "replayed", lambda run, what, operands, *given: run(*given))
        results["one kernel"] = torch.ops.qcompiler.fused_linear(*arguments, **options)
    sums = exact(x.view(m, k), xs.reshape(m, -1), w, ws, bias).view(*rows, -1).chunk(parts, -1)
    named = {f"y{place}": y for place, y in enumerate(sums)} | {f"x{place}": x for place, x in enumerate(others)}
    (want,) = parse(expression).run(named)
    for way, result in results.items():
        got = (
            numerics.dequantize(result[0], result[1], format=numerics.format_of(options["block"], result[0].dtype))
            if options
            else result[0]
        )
        assert got.shape == want.shape, way
        assert relative_error(got, want) <= (0.04 if options else RELATIVE[want.dtype]), way


@pytest.mark.parametrize("m", [1, 5, 4099])
@pytest.mark.parametrize("expression", ["bf16(silu(y0) * y1)", "bf16(x0 + y0)", "f16(y0 * x0 + x1)", "y0 / 3"])
def test_an_expression_alone(expression: str, m: int) -> None:
    made, n = parse(expression), 520
    both = torch.randn(m, 2 * n, device="cuda", dtype=torch.bfloat16)
    sums = list(both.chunk(2, -1)) if "y1" in made.operands else [both[:, :n]]
    others = others_of(sum(name[0] == "x" for name in made.operands), m, n)
    whole = torch.full((m + 2, n), 7.0, dtype=made.dtype(), device="cuda")
    launch(expression_call(expression, sums, others, whole[:m]))
    named = {f"y{place}": y for place, y in enumerate(sums)} | {f"x{place}": x for place, x in enumerate(others)}
    (want,) = made.run(named)
    if made.dtype() == torch.float32 or "silu" not in expression:
        assert torch.equal(whole[:m], want)
    assert relative_error(whole[:m], want) <= 1e-4
    assert bool((whole[m:] == 7.0).all())
