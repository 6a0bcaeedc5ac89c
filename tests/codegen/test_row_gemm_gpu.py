"""GEMMs with scales at the end of the sum, on a Hopper GPU: FP8 against float64, INT8 against exact integers."""

import math
from typing import Literal

import pytest
import torch
from gpu_checks import assert_compiled_and_captured, assert_compiles_nothing_new, relative_error
from hopper_kernels import all_configs, launch_row_gemm, refusal
from torch import Tensor

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.kernels.narrow_row_gemm import narrow_row_gemm, sum_row_splits
from codegen.kernels.quantize import quantize_tokens
from codegen.kernels.row_gemm import row_gemm_pointers
from codegen.kernels.warp_row_gemm import warp_row_gemm
from codegen.templates.gemm import GemmConfig, GemmProblem
from codegen.templates.gemm_template import DEEPEST_INT8
from qcompiler.errors import CodegenError

pytestmark = pytest.mark.gpu

Rows = Literal["rows_f8", "rows_i8"]
DTYPES: dict[Rows, torch.dtype] = {"rows_f8": torch.float8_e4m3fn, "rows_i8": torch.int8}
CONFIGS = [(kind, config) for kind in DTYPES for config in all_configs(kind)]
ROWS = (0, 1, 2, 3, 15, 63, 64, 65, 127, 129, 4095)
TOKEN, TENSOR = (1, -1), (-1, -1)
TOLERANCES = {
    "rows_f8": {torch.bfloat16: 2e-3, torch.float16: 5e-4, torch.float32: 3e-4},
    "rows_i8": {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1.2e-7},
}
"""Relative errors. Within 128 of K, FP8 tensor cores keep about 14 bits; INT8 sums are exact."""


def quantize(x: Tensor, block: tuple[int, int], dtype: torch.dtype, layout: str = "row_major") -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.qcompiler.quantize(x, list(block), dtype, "deepseek", layout)
    return result


def operands(
    m: int, n: int, k: int, kind: Rows, x_block: tuple[int, int] = TOKEN, w_block: tuple[int, int] = TOKEN
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantized operands whose rows differ in magnitude by factors of up to 100."""
    generator = torch.Generator("cuda").manual_seed(m + n + k)

    def draw(rows: int) -> Tensor:
        spread = torch.rand(rows, 1, generator=generator, device="cuda").mul(4.6).exp()
        return torch.randn(rows, k, generator=generator, device="cuda") * spread

    layout = "col_major" if x_block == TOKEN else "row_major"
    return (*quantize(draw(m).bfloat16(), x_block, DTYPES[kind], layout), *quantize(draw(n), w_block, DTYPES[kind]))


def linear(
    x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16,
    x_block: tuple[int, int] = TOKEN, w_block: tuple[int, int] = TOKEN,
) -> Tensor:  # fmt: skip
    result: Tensor = torch.ops.qcompiler.scaled_linear(x, xs, w, ws, bias, list(x_block), list(w_block), out_dtype)
    return result


def exact(x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None = None) -> Tensor:
    """The matmul in float64, which is exact for sums of products of INT8 codes."""
    result = (x.double() @ w.double().T) * xs.double() * ws.double().T
    return result if bias is None else result + bias.double()


@pytest.mark.parametrize(("kind", "config"), CONFIGS, ids=str)
def test_every_configuration_on_a_large_and_on_a_ragged_shape(kind: Rows, config: GemmConfig) -> None:
    for out_dtype in (torch.bfloat16, torch.float32):
        for m, n, k in ((2048, 2048, 4096), (333, 464, 1104), (1, 144, 144)):
            if refusal(config, GemmProblem(m, n, k, out_bytes=out_dtype.itemsize, kind=kind)) is not None:
                assert out_dtype == torch.float32 and config.variant == "warp"
                continue
            x, xs, w, ws = operands(m, n, k, kind)
            out = torch.full((m, n), math.nan, dtype=out_dtype, device="cuda")
            launch_row_gemm(config, x, w, out, xs, ws, None)
            assert relative_error(out, exact(x, xs, w, ws)) <= TOLERANCES[kind][out_dtype]
            again = torch.full_like(out, math.nan)
            for _ in range(5):
                launch_row_gemm(config, x, w, again, xs, ws, None)
                assert torch.equal(out, again), "a repeated run gave other bits: a race"


@pytest.mark.parametrize(("kind", "config"), CONFIGS, ids=str)
def test_nan_scales_and_codes_poison_only_their_row(kind: Rows, config: GemmConfig) -> None:
    m, n, k = 12, 272, 640
    x, xs, w, ws = operands(m, n, k, kind)
    clean, out = torch.empty(2, m, n, dtype=torch.bfloat16, device="cuda")
    launch_row_gemm(config, x, w, clean, xs, ws, None)
    want = torch.zeros(m, n, dtype=torch.bool, device="cuda")
    # Quantization of a non-finite row sets INT8 codes to zero.
    x.view(torch.uint8)[9], xs[9], w.view(torch.uint8)[7], ws[7] = 0, math.nan, 0, math.nan
    want[9], want[:, 7] = True, True
    if kind == "rows_f8":
        x.view(torch.uint8)[2, 639], w.view(torch.uint8)[30, 0] = 0x7F, 0xFF
        want[2], want[:, 30] = True, True
    launch_row_gemm(config, x, w, out, xs, ws, None)
    assert torch.equal(out.isnan(), want) and torch.equal(out[~want], clean[~want])


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("x_block", [TOKEN, TENSOR])
@pytest.mark.parametrize("w_block", [TOKEN, TENSOR])
def test_all_combinations_of_scales(kind: Rows, x_block: tuple[int, int], w_block: tuple[int, int]) -> None:
    for m, n, k in ((200, 320, 640), (1, 16, 64), (70, 33, 45)):
        x, xs, w, ws = operands(m, n, k, kind, x_block, w_block)
        bias = torch.randn(n, device="cuda", dtype=torch.float16)
        for out_dtype, tolerance in TOLERANCES[kind].items():
            want = exact(x, xs, w, ws, bias)
            if want.abs().max() < 6e4:  # the float16 maximum is 65504
                out = linear(x, xs, w, ws, bias, out_dtype, x_block, w_block)
                assert relative_error(out, want) <= tolerance * 1.25


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_gemm_with_any_number_of_rows(rows: int, kind: Rows) -> None:
    x, xs, w, ws = operands(rows, 768, 1024, kind)
    out = linear(x, xs, w, ws)
    assert out.shape == (rows, 768)
    assert rows == 0 or relative_error(out, exact(x, xs, w, ws)) <= 2e-3


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 128), (7, 100), (129, 257), (576, 7168), (200, 1), (384, 8), (1000, 1000)])
def test_gemm_of_any_width_and_depth(n: int, k: int, kind: Rows) -> None:
    for m in (5, 200):
        x, xs, w, ws = operands(m, n, k, kind)
        assert relative_error(linear(x, xs, w, ws, None, torch.float32), exact(x, xs, w, ws)) <= 3e-4


def test_int8_sums_are_exact() -> None:
    # Three roundings: of the integer to FP32, of the two scales' product, and of the result.
    for m, n, k in ((300, 272, 4096), (64, 48, 130000), (65, 31, 777)):
        x, xs, w, ws = operands(m, n, k, "rows_i8")
        want = exact(x, xs, w, ws)
        error = (linear(x, xs, w, ws, None, torch.float32).double() - want).abs()
        assert bool((error <= 3.001 * 2.0**-24 * want.abs()).all())
    top = torch.full((64, DEEPEST_INT8), 127, dtype=torch.int8, device="cuda")
    one = torch.ones(64, 1, device="cuda")
    largest = 127.0**2 * DEEPEST_INT8
    assert bool((linear(top, one, top, one, None, torch.float32).double() / largest - 1).abs().max() <= 2.0**-24)
    assert bool((linear(-top, one, top, one, None, torch.float32).double() / largest + 1).abs().max() <= 2.0**-24)


@pytest.mark.parametrize("config", all_configs("rows_f8"), ids=str)
def test_fp8_sums_are_promoted_every_128_of_k(config: GemmConfig) -> None:
    # Equal signs make the sum grow, so an accumulator with 14 bits loses ever more of each addend. The same kernel
    # without promotion shows that these operands reveal the difference.
    m = n = 256
    k = 32768
    x = (torch.rand(m, k, device="cuda") * 0.5 + 0.5).to(torch.float8_e4m3fn)
    w = (torch.rand(n, k, device="cuda") * 0.5 + 0.5).to(torch.float8_e4m3fn)
    one = torch.ones(256, 1, device="cuda")
    want = exact(x, one, w, one)
    fits = refusal(config, GemmProblem(m, n, k, out_bytes=4, kind="rows_f8")) is None
    dtype = torch.float32 if fits else torch.float16  # the sums are near 18000, and the float16 maximum is 65504
    errors = {}
    for promote in (True, False):
        out = torch.empty(m, n, device="cuda", dtype=dtype)
        launch_row_gemm(config, x, w, out, one, one, None, promote)
        errors[promote] = relative_error(out, want)
    assert errors[True] <= 5e-4
    assert errors[False] > 5 * errors[True], f"the unpromoted sum is as good: {errors}"


@pytest.mark.parametrize(("kind", "config"), CONFIGS, ids=str)
def test_every_configuration_for_any_number_of_rows(kind: Rows, config: GemmConfig) -> None:
    for m in ROWS[1:]:
        x, xs, w, ws = operands(m, 264, 640, kind)
        out = torch.full((m, 264), math.nan, dtype=torch.bfloat16, device="cuda")
        launch_row_gemm(config, x, w, out, xs, ws, None)
        assert relative_error(out, exact(x, xs, w, ws)) <= 2.2e-3, m


@pytest.mark.parametrize(("kind", "config"), CONFIGS, ids=str)
@pytest.mark.parametrize("x_block", [TOKEN, TENSOR])
@pytest.mark.parametrize("w_block", [TOKEN, TENSOR])
def test_every_configuration_with_a_scale_for_the_tensor_and_a_bias(
    kind: Rows, config: GemmConfig, x_block: tuple[int, int], w_block: tuple[int, int]
) -> None:
    for m, n, k in ((200, 320, 640), (7, 136, 4096)):
        x, xs, w, ws = operands(m, n, k, kind, x_block, w_block)
        bias = torch.randn(n, device="cuda") * exact(x, xs, w, ws).std().float()
        out = torch.full((m, n), math.nan, dtype=torch.bfloat16, device="cuda")
        launch_row_gemm(config, x, w, out, xs, ws, bias)
        assert relative_error(out, exact(x, xs, w, ws, bias)) <= 2.2e-3


@pytest.mark.parametrize("config", [config for kind, config in CONFIGS if kind == "rows_i8"], ids=str)
def test_int8_sums_of_every_configuration_are_exact(config: GemmConfig) -> None:
    for m, n, k in ((300, 272, 4096), (64, 48, 130000)):
        if refusal(config, GemmProblem(m, n, k, out_bytes=4, kind="rows_i8")) is not None:
            continue
        x, xs, w, ws = operands(m, n, k, "rows_i8")
        want = exact(x, xs, w, ws)
        out = torch.full((m, n), math.nan, device="cuda")
        launch_row_gemm(config, x, w, out, xs, ws, None)
        assert bool(((out.double() - want).abs() <= 3.001 * 2.0**-24 * want.abs()).all())


def test_strides_of_scales() -> None:
    for kind, config in CONFIGS:
        x, xs, w, ws = operands(77, 256, 1024, kind)
        spread = [torch.full((scale.shape[0], 3), math.nan, device="cuda") for scale in (xs, ws)]
        for wide, scale in zip(spread, (xs, ws), strict=True):
            wide[:, 1:2] = scale
        out = torch.empty(77, 256, device="cuda", dtype=torch.bfloat16)
        launch_row_gemm(config, x, w, out, spread[0][:, 1:2], spread[1][:, 1:2], None)
        assert relative_error(out, exact(x, xs, w, ws)) <= 2e-3, config


@pytest.mark.parametrize(("kind", "config"), [pair for pair in CONFIGS if pair[1].variant != "narrow"], ids=str)
def test_operands_and_outputs_beyond_32_bits(kind: Rows, config: GemmConfig) -> None:
    for m, n, k in ((2**31 // 4096 + 77, 136, 4096), (2**31 // 2048 + 77, 2048, 128)):
        x = torch.zeros(m, k, dtype=torch.uint8, device="cuda").view(DTYPES[kind])
        last, _, w, ws = operands(300, n, k, kind)
        x[-300:] = last
        xs = torch.rand(m, 1, device="cuda") + 0.5
        out = torch.full((m, n), math.nan, dtype=torch.bfloat16, device="cuda")
        launch_row_gemm(config, x, w, out, xs, ws, None)
        assert relative_error(out[-300:], exact(x[-300:], xs[-300:], w, ws)) <= 2e-3
        assert bool((out[: m - 300] == 0).all())
        del x, out


def test_garbage_beyond_the_last_row_is_ignored() -> None:
    for kind, config in CONFIGS:
        x, xs, w, ws = operands(77, 256, 512, kind)
        rows = torch.full((256, 512), 0x7F, dtype=torch.uint8, device="cuda").view(DTYPES[kind])  # NaN in FP8
        scales = torch.full((256, 1), math.nan, device="cuda")
        rows[:77], scales[:77] = x, xs
        out = torch.full((256, 256), 7.0, device="cuda", dtype=torch.bfloat16)
        launch_row_gemm(config, rows[:77], w, out[:77], scales[:77], ws, None)
        assert relative_error(out[:77], exact(x, xs, w, ws)) <= 2e-3
        assert bool((out[77:] == 7.0).all()), f"{config} wrote beyond the last row"


@pytest.mark.parametrize("kind", DTYPES)
def test_batches_vectors_and_unaligned_operands(kind: Rows) -> None:
    x = torch.randn(2, 3, 40, 512, dtype=torch.bfloat16, device="cuda")
    w, ws = quantize(torch.randn(640, 512, device="cuda"), TOKEN, DTYPES[kind])
    for layout in ("row_major", "col_major"):
        q, s = quantize(x, TOKEN, DTYPES[kind], layout)
        want = exact(q.view(-1, 512), s.reshape(-1, 1), w, ws)
        assert relative_error(linear(q, s, w, ws, None, torch.float32).view(-1, 640), want) <= 3e-4
        vector = linear(q[0, 0, 0], s[0, 0, 0], w, ws, None, torch.float32)
        assert vector.shape == (640,) and relative_error(vector, want[0]) <= 3e-4
    codes = q.view(torch.uint8).reshape(-1)
    moved = torch.empty(codes.numel() + 3, dtype=torch.uint8, device="cuda")[3:]
    moved.copy_(codes)
    assert relative_error(linear(moved.view(240, 512).view(DTYPES[kind]), s.reshape(-1, 1), w, ws), want) <= 2e-3


def test_problems_that_the_kernels_cannot_run_are_refused() -> None:
    x, xs, w, ws = operands(8, 256, 256, "rows_i8")
    with pytest.raises(CodegenError, match="INT8 sums are scaled once"):
        linear(x, xs, w, torch.ones(2, 2, device="cuda"), w_block=(128, 128))
    with pytest.raises(CodegenError, match=r"varies along K, .* use SmoothQuant"):
        linear(x, torch.ones(1, 256, device="cuda"), w, ws, x_block=(-1, 1))
    with pytest.raises(CodegenError, match="both operands in one format"):
        linear(x.view(torch.float8_e4m3fn), xs, w, ws)
    e5m2 = torch.float8_e5m2
    with pytest.raises(CodegenError, match="not f8e5m2"):
        linear(x.view(e5m2), xs, w.view(e5m2), ws)
    with pytest.raises(CodegenError, match=r"shape of the weight scales: got \[256, 1\]; need \[1, 1\]"):
        linear(x, xs, w, ws, w_block=TENSOR)
    deep = torch.ones(1, DEEPEST_INT8 + 1, dtype=torch.int8, device="cuda")
    one = torch.ones(1, 1, device="cuda")
    with pytest.raises(CodegenError, match="can exceed 32 bits"):
        linear(deep, one, deep, one)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch uses its own deprecated functions
@pytest.mark.parametrize("kind", DTYPES)
def test_compiled_and_captured_in_a_cuda_graph(kind: Rows) -> None:
    w, ws = quantize(torch.randn(512, 384, device="cuda"), TOKEN, DTYPES[kind])

    def layer(x: Tensor) -> Tensor:
        return linear(*quantize(x, TENSOR, DTYPES[kind]), w, ws, x_block=TENSOR)

    assert_compiled_and_captured(layer, columns=384, rows=(5, 300))


def test_a_new_number_of_rows_compiles_nothing() -> None:
    w, ws = quantize(torch.randn(512, 384, device="cuda"), TOKEN, torch.int8)

    def call(rows: int) -> None:
        x = torch.randn(rows, 384, dtype=torch.bfloat16, device="cuda")
        linear(*quantize(x, TOKEN, torch.int8), w, ws)

    kernels = (quantize_tokens, row_gemm_pointers, warp_row_gemm, narrow_row_gemm, sum_row_splits)
    assert_compiles_nothing_new(call, kernels)
