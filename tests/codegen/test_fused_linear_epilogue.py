"""GEMMs with a fused expression: the dtype of the sums, the choice of a kernel form, and the separate kernels."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hopper_kernels import all_fused_configs, meta
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codegen.epilogues import handed_over, on_tensors
from codegen.launching.launch import KernelCall
from codegen.launching.replay import state
from codegen.operators import fused_linear as fused_product
from codegen.operators.quantize import scale_like
from codegen.targets.hopper import HOPPER
from codegen.templates.fused import (
    FUSED_GEMM,
    FusedGemm,
    FusedGemmConfig,
    FusedGemmProblem,
    FusedOperands,
    Separate,
    why_separate,
)
from codegen.templates.gemm import GemmOperands
from qcompiler import numerics
from qcompiler.dialects.fused_expression import parse
from qcompiler.dialects.kernel import fused_linear
from qcompiler.ir.formats import FP8_BLOCK, FP8_TILE

E4M3 = torch.float8_e4m3fn
SWIGLU = "bf16(bf16(silu(bf16(y0))) * bf16(y1))"


@pytest.mark.parametrize(
    ("expression", "dtype", "rest"),
    [
        ("bf16(silu(bf16(y0)) * bf16(y1))", torch.bfloat16, "bf16(silu(y0) * y1)"),
        ("h = f16(y0); f16(h * sigmoid(h) + x0)", torch.float16, "h = y0; f16(h * sigmoid(h) + x0)"),
        ("bf16(y0)", torch.bfloat16, "y0"),
        ("bf16(y0) + bf16(y0 * 2)", torch.float32, "bf16(y0) + bf16(y0 * 2.0)"),
        ("bf16(y0) + f16(y1)", torch.float32, "bf16(y0) + f16(y1)"),
        ("bf16(gelu(y0))", torch.float32, "bf16(gelu(y0))"),
        ("h = y0; bf16(h)", torch.float32, "h = y0; bf16(h)"),
        ("y0", torch.float32, "y0"),
        ("bf16(x0)", torch.float32, "bf16(x0)"),
        ("x0 + bf16(f16(y0))", torch.float16, "x0 + bf16(y0)"),
    ],
)
def test_sums_are_passed_in_the_dtype_that_the_expression_rounds_to(
    expression: str, dtype: torch.dtype, rest: str
) -> None:
    assert handed_over(expression) == (dtype, str(parse(rest)))


@pytest.mark.parametrize(
    ("expression", "others", "sums", "renamed"),
    [
        ("y0 * y1 + x0", 1, ("y0", "y1"), "x0 * x1 + x2"),
        ("h = y1 - x1; h * x0", 2, ("y1",), "h = x0 - x2; h * x1"),
        ("gelu(y0)", 0, ("y0",), "gelu(x0)"),
    ],
)
def test_a_tensor_expression_names_the_sums_first(
    expression: str, others: int, sums: tuple[str, ...], renamed: str
) -> None:
    assert on_tensors(expression, others) == (sums, str(parse(renamed)))


def expressions() -> st.SearchStrategy[str]:
    """Expressions of sums, each with or without rounding, and other operands."""
    sums = st.sampled_from(["y0", "y1", "bf16(y0)", "bf16(y1)", "f16(y0)"])
    leaves = sums | st.sampled_from(["x0", "x1", "bf16(x0 * 0.5)"])

    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        calls = st.tuples(st.sampled_from(["bf16", "silu", "relu", "tanh", "neg"]), inner).map(
            lambda t: f"{t[0]}({t[1]})"
        )
        pairs = st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
        return calls | pairs

    whole = st.recursive(leaves, grow, max_leaves=8)
    return st.tuples(whole, whole).map(lambda t: f"h = {t[0]}; bf16(h * {t[1]} + y0 * 0)" if len(t[0]) % 2 else t[0])


@given(expressions(), st.integers(0, 2**31))
def test_the_rest_of_an_expression_gives_the_same_bits(text: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    expression = parse(text)
    if not any(name[0] == "y" for name in expression.operands):
        return
    named = {name: torch.randn(3, 5, generator=generator) for name in ("x0", "x1", "y0", "y1")}
    (want,) = expression.run(named)
    dtype, rest = handed_over(text)
    handed = {name: each.to(dtype) if name[0] == "y" else each for name, each in named.items()}
    assert torch.equal(parse(rest).run(handed)[0].float(), want.float())
    sums, renamed = on_tensors(rest, 2)
    operands = [*(handed[name] for name in sums), named["x0"], named["x1"]]
    got = parse(renamed).run({f"x{place}": each for place, each in enumerate(operands)})[0]
    assert torch.equal(got.float(), want.float())


FINE = FusedGemmProblem(1024, 14336, 4096, 2)
GATED = FusedGemmConfig(2, 2, 3)


@pytest.mark.parametrize(
    ("config", "problem", "sentence"),
    [
        (GATED, replace(FINE, m=0), "has nothing to multiply"),
        (GATED, replace(FINE, n=2**30), "has a size beyond 32 bits"),
        (GATED, replace(FINE, parts=1), "its tiles use 2 parts of the weight, here there are 1"),
        (
            GATED,
            replace(FINE, n=14400),
            "each part of the weight must begin with a block of 128 rows, here they have 14400",
        ),
        (GATED, replace(FINE, others=3), "an epilogue may read 2 operands besides the sums, this one reads 3"),
        (GATED, replace(FINE, block=(1, -1)), "a tile of the result holds whole blocks of [1, 128], not of [1, -1]"),
        (GATED, replace(FINE, aligned=False), "operands that start at a multiple of 16 bytes"),
        (GATED, replace(FINE, k=4100), "the copy engine needs K to be a multiple of 16, got 4100"),
        (GATED, replace(FINE, scale_columns=False), "the activation's scales in columns"),
        (GATED, replace(FINE, handed_bytes=4), "sums of 4 bytes need 281088 bytes of shared memory"),
    ],
)
def test_refusals_say_why(config: FusedGemmConfig, problem: FusedGemmProblem, sentence: str) -> None:
    why = FUSED_GEMM.family(HOPPER).why_not(config, problem)
    assert why is not None and sentence in why and not why.endswith(".")
    assert FUSED_GEMM.family(HOPPER).why_not(config, FINE) is None


def test_every_form_fits_and_names_itself() -> None:
    assert len({str(config) for config in all_fused_configs()}) == len(all_fused_configs())
    for config in all_fused_configs():
        assert config.shared_memory() <= HOPPER.limits.shared_memory
        assert config.rows in (64, 128, 256)
    small = [config for config in all_fused_configs() if config.waves == 1]
    assert all(config.shared_memory(4) <= HOPPER.limits.shared_memory for config in small), "FP32 sums need a form"


def fused_gemm_template() -> FusedGemm:
    found = FUSED_GEMM.family(HOPPER).template(GATED)
    assert isinstance(found, FusedGemm)
    return found


@given(st.integers(1, 20000), st.integers(1, 30000), st.integers(1, 2000), st.sampled_from(all_fused_configs()))
def test_launches_compute_each_column_once(m: int, n: int, k: int, config: FusedGemmConfig) -> None:
    problem = FusedGemmProblem(m, n if config.parts == 1 else -(-n // 128) * 128, 16 * k, config.parts)
    launches = fused_gemm_template().launches(config, problem)
    ends = [first + width for _, first, width in launches]
    assert [first for _, first, _ in launches] == [0, *ends[:-1]] and ends[-1] == -(-problem.n // 128)
    assert all(width > 0 for _, _, width in launches) and launches[0][0] == config
    if len(launches) == 2:
        ((_, _, width), (finer, _, _)) = launches
        assert finer.rows == config.rows // 2 and finer.parts == config.parts
        unused = -width * -(-m // config.rows) % problem.sms  # in the last round of the first launch
        assert unused < -(-m // config.rows), "it has only full rounds"


def test_a_finer_form_ends_a_partial_round() -> None:
    """512 rows of Llama-3-8B: 448 tiles are 3.4 rounds; on an H200, 102 us instead of 110."""
    launches = fused_gemm_template().launches
    finer = FusedGemmConfig(2, 1, 4)
    assert launches(GATED, FusedGemmProblem(512, 14336, 4096, 2)) == ((GATED, 0, 99), (finer, 99, 13))
    assert launches(GATED, FusedGemmProblem(1000, 14336, 4096, 2)) == ((GATED, 0, 112),)  # 6.8 rounds
    assert launches(GATED, FusedGemmProblem(256, 4096, 4096, 2)) == ((GATED, 0, 32),)  # half of a round


def test_a_warm_up_compiles_the_finer_form_for_other_numbers_of_rows() -> None:
    calls: list[KernelCall] = []
    operands = FusedOperands(
        SWIGLU,
        GemmOperands(meta(256, 512, dtype=E4M3), meta(512, 512, dtype=E4M3), meta(256, 256, dtype=E4M3),
                     meta(4, 256).t(), meta(4, 4), None),
        (), meta(2, 256).t(),
    )  # fmt: skip
    with mock.patch.object(state, "planner", lambda key, call: calls.append(call)):
        FUSED_GEMM.family(HOPPER).launch(GATED, operands)
    assert [call.constants["WAVES"] for call in calls] == [2, 1]


@given(st.integers(1, 20000), st.integers(1, 300), st.integers(1, 2000), st.integers(1, 2), st.booleans())
def test_the_choice_is_valid_and_faster_by_the_estimate(m: int, n: int, k: int, parts: int, quantized: bool) -> None:
    problem = FusedGemmProblem(m, 128 * n, 16 * k, parts, block=(1, 128) if quantized else None)
    chosen = FUSED_GEMM.family(HOPPER).choose(problem)
    if isinstance(chosen, Separate):
        assert "us with separate kernels" in why_separate(FUSED_GEMM.family(HOPPER), problem)
    else:
        assert FUSED_GEMM.family(HOPPER).why_not(chosen, problem) is None
        assert FUSED_GEMM.family(HOPPER).time(chosen, problem) < FUSED_GEMM.family(HOPPER).time(Separate(), problem)


def test_a_refused_problem_gets_the_message_of_a_form_with_its_parts() -> None:
    reasons = {
        replace(FINE, k=4100): "the copy engine needs K to be a multiple of 16, got 4100",
        replace(FINE, parts=1, others=3): "an epilogue may read 2 operands besides the sums, this one reads 3",
    }
    for problem, reason in reasons.items():
        assert FUSED_GEMM.family(HOPPER).choose(problem) == Separate()
        assert why_separate(FUSED_GEMM.family(HOPPER), problem) == reason


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CPU references in place of the kernels that separate kernels call; returns the list of calls."""
    calls: list[str] = []

    def product(*operands: Any) -> Tensor:
        *tensors, x_block, w_block, dtype = operands
        calls.append(f"product {str(dtype).removeprefix('torch.')}")
        return numerics.scaled_linear(
            *tensors, x_format=numerics.format_of(x_block), w_format=numerics.format_of(w_block), out_dtype=dtype
        )

    def quantize(operands: Sequence[Tensor], expression: str, *rest: Any) -> list[Tensor]:
        _, block, dtype, profile, layout = rest
        calls.append(f"quantize {expression}")
        (result,) = parse(expression).run({f"x{place}": x for place, x in enumerate(operands)})
        q, scale = numerics.quantize(result, numerics.format_of(block, dtype, profile))
        return [q, scale_like(q, block[1], layout).copy_(scale)]

    def alone(expression: str, sums: Sequence[Tensor], others: Sequence[Tensor], out: Tensor) -> KernelCall:
        calls.append(f"expression {expression}")
        named = {f"y{place}": y for place, y in enumerate(sums)} | {f"x{place}": x for place, x in enumerate(others)}
        assert all(each.dim() == 1 or each.stride(-1) == 1 for each in named.values())
        out.copy_(parse(expression).run(named)[0])
        return KernelCall(None, 1, (out,), {}, {})

    monkeypatch.setattr(fused_product, "gpu_at", lambda device: HOPPER)
    monkeypatch.setattr(fused_product, "scaled_linear_on_gpu", product)
    monkeypatch.setattr(fused_product, "fused_quantize_on_gpu", quantize)
    monkeypatch.setattr(fused_product, "expression_call", alone)
    monkeypatch.setattr(fused_product, "launch", lambda call: None)
    monkeypatch.setattr(fused_product, "replayed", lambda run, what, operands, *arguments: run(*arguments))
    monkeypatch.setattr(fused_product, "_config", lambda *facts: fused_product.SEPARATE)
    monkeypatch.setattr(fused_product, "on", lambda device: torch.no_grad())
    return calls


@pytest.mark.parametrize("leading", [(6,), (2, 3)])
@pytest.mark.parametrize(
    ("expression", "parts", "vectors", "calls"),
    [
        (SWIGLU, 2, (), ["product bfloat16", "{} bf16(bf16(silu({0})) * {1})"]),
        ("f16(x0 + f16(y0))", 1, (False,), ["product float16", "{} f16({1} + {0})"]),
        ("bf16(gelu(y0) * x1 + x0)", 1, (False, True), ["product float32", "{} bf16(gelu({0}) * {2} + {1})"]),
        ("bf16(bf16(y1) - x0)", 2, (True,), ["product bfloat16", "{} bf16({0} - {1})"]),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_separate_kernels_match_the_reference(
    on_cpu: list[str], expression: str, parts: int, vectors: tuple[bool, ...], calls: list[str],
    leading: tuple[int, ...],
    quantized: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    n, k = 64, 144
    x, xs = numerics.quantize(torch.randn(*leading, k), numerics.format_of([1, 128], E4M3))
    w, ws = numerics.quantize(torch.randn(n * parts, k), numerics.format_of([128, 128], E4M3))
    bias = torch.randn(n * parts).bfloat16()
    others = [torch.randn(n) if vector else torch.randn(*leading, n).bfloat16() for vector in vectors]
    options: dict[str, Any] = {"x_block": [1, 128], "w_block": [128, 128], "expression": expression, "parts": parts}
    last: dict[str, Any] = {"block": [1, 128], "dtype": E4M3, "profile": "deepseek"} if quantized else {}
    format = FP8_TILE if quantized else None
    want = fused_linear(
        x,
        xs,
        w,
        ws,
        bias,
        *others,
        expression=expression,
        parts=parts,
        x_format=FP8_TILE,
        w_format=FP8_BLOCK,
        format=format,
    )
    layout: dict[str, Any] = {"scale_layout": "row_major"} if quantized else {}
    given = fused_product.FusedLinear(x, xs, w, ws, bias, others, **options, **last, **layout)
    got = fused_product.fused_linear_on_gpu(*given)
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine.float(), theirs.float())
    assert len(on_cpu) == 2 and on_cpu[0] == calls[0]
    assert on_cpu[1].startswith("quantize" if quantized else "expression")


def test_separate_kernels_with_many_operands_and_with_no_rows(on_cpu: list[str]) -> None:
    x, xs = numerics.quantize(torch.randn(4, 128), numerics.format_of([1, 128], E4M3))
    w, ws = numerics.quantize(torch.randn(16, 128), numerics.format_of([128, 128], E4M3))
    others = [torch.randn(4, 16) for _ in range(3)]
    call = fused_product.fused_linear_on_gpu
    options = ("bf16(bf16(y0) + x0 * x1 - x2)", 1, [1, 128], [128, 128])
    (got,) = call(x, xs, w, ws, None, others, *options)
    (want,) = fused_linear(
        x, xs, w, ws, None, *others, expression=options[0], parts=1, x_format=FP8_TILE, w_format=FP8_BLOCK
    )
    assert torch.equal(got, want)
    (none,) = call(x[:0], xs[:0], w, ws, None, [other[:0] for other in others[:2]], "bf16(y0 + x0 * x1)", *options[1:])
    assert none.shape == (0, 16) and none.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"x_block": [1, 64]}, False),
        ({"w_block": [1, -1]}, False),
        ({"parts": 3}, False),
        ({"others": [torch.zeros(5, 64)]}, False),
        ({"others": [torch.zeros(6, 128)[:, ::2]]}, False),
        ({"others": [torch.zeros(6, 128)[:, :64], torch.zeros(64)]}, True),
        ({"bias": torch.zeros(64)}, False),
        ({"bias": torch.zeros(128)}, True),
    ],
)
def test_problems_that_fit_one_kernel(change: dict[str, Any], fits: bool) -> None:
    x, xs = numerics.quantize(torch.randn(6, 256), numerics.format_of([1, 128], E4M3))
    w, ws = numerics.quantize(torch.randn(128, 256), numerics.format_of([128, 128], E4M3))
    given = fused_product.FusedLinear(x, xs, w, ws, None, [], SWIGLU, 2, [1, 128], [128, 128])
    assert fused_product.fits(given._replace(**change)) == fits
