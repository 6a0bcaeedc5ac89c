"""Each configuration of the Gluon kernels on a Hopper GPU, against float64 on the same operands."""

import math
from collections.abc import Sequence

import pytest
import torch
from hopper_kernels import GLUON, all_configs, choose, gemm_template, launch_gemm, refusal
from torch import Tensor

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.templates.gemm import GemmConfig, GemmProblem
from codegen.templates.hopper import has_scale_columns
from codegen.templates.template import ceil_div
from qcompiler.numerics import ALL

pytestmark = pytest.mark.gpu

E4M3 = torch.float8_e4m3fn
CONFIGS = [config for config in all_configs() if config.variant in GLUON]
configs = pytest.mark.parametrize("config", CONFIGS, ids=str)
ROWS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 191, 193, 257, 4095)
TOLERANCE = {torch.bfloat16: 2e-3, torch.float16: 5e-4, torch.float32: 4e-4}


def operands(m: int, n: int, k: int, x_block: int = 128, garbage: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distinct codes and scales; `garbage` rows of NaN follow the rows of x, and NaN scales follow its scales."""
    generator = torch.Generator("cuda").manual_seed(m + n + k)

    def codes(rows: int) -> Tensor:
        return torch.randn(rows, k, generator=generator, device="cuda").to(E4M3)

    blocks, padded = 1 if x_block == ALL else ceil_div(k, x_block), (m + 3) // 4 * 4 + 4 * garbage
    x = torch.full((m + garbage, k), 0x7F, dtype=torch.uint8, device="cuda").view(E4M3)
    x[:m] = codes(m)
    columns = torch.full((blocks, padded), math.nan, device="cuda")
    columns[:, :m] = torch.rand(blocks, m, generator=generator, device="cuda").mul(4.6).exp()
    w_scale = torch.rand(ceil_div(n, 128), ceil_div(k, 128), generator=generator, device="cuda").mul(4.6).exp()
    return x[:m], columns.as_strided((m, blocks), (1, padded)), codes(n), w_scale


def exact(x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, x_block: int = 128, bias: Tensor | None = None) -> Tensor:
    k = x.shape[1]
    left = x.double() * xs.double().repeat_interleave(k if x_block == ALL else x_block, 1)[:, :k]
    spread = ws.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    result = left @ (w.double() * spread[: w.shape[0], :k]).T
    return result if bias is None else result + bias.double()


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def can_run(config: GemmConfig, m: int, n: int, k: int, dtype: torch.dtype, x_block: int = 128) -> bool:
    return refusal(config, GemmProblem(m, n, k, out_bytes=dtype.itemsize, x_block=x_block)) is None


@configs
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ragged_shapes_garbage_beyond_the_rows_and_equal_bits(config: GemmConfig, dtype: torch.dtype) -> None:
    for m, n, k in ((333, 464, 1104), (1, 144, 16), (200, 8, 128), (2000, 2048, 1040), (70, 1000, 7168)):
        if not can_run(config, m, n, k, dtype):
            assert dtype == torch.float32 and config.variant == "warp"
            continue
        x, xs, w, ws = operands(m, n, k, garbage=60)
        bias = torch.randn(n, device="cuda")
        want = exact(x, xs, w, ws, bias=bias)
        whole = torch.full((m + 60, n), 7.0, dtype=dtype, device="cuda")
        out = whole[:m].fill_(math.nan)
        launch_gemm(config, x, w, out, xs, ws, bias)
        if want.abs().max() < 6e4 or dtype != torch.float16:  # the float16 maximum is 65504
            assert relative_error(out, want) <= TOLERANCE[dtype]
        assert bool((whole[m:] == 7.0).all()), "wrote beyond the last row"
        again = torch.full_like(out, math.nan)
        for _ in range(10):
            launch_gemm(config, x, w, again, xs, ws, bias)
            assert torch.equal(out.view(torch.uint8), again.view(torch.uint8)), "a repeated run gave other bits: a race"


@configs
def test_any_number_of_rows(config: GemmConfig) -> None:
    for m in ROWS:
        x, xs, w, ws = operands(m, 264, 640, garbage=5)
        out = torch.full((m, 264), math.nan, dtype=torch.bfloat16, device="cuda")
        launch_gemm(config, x, w, out, xs, ws, None)
        assert relative_error(out, exact(x, xs, w, ws)) <= 2.2e-3, m


@configs
def test_nan_codes_and_scales_poison_only_their_row(config: GemmConfig) -> None:
    # In the weight: a code poisons the outputs of its row, a scale the outputs of its block.
    m, n, k = 12, 264, 640
    x, xs, w, ws = operands(m, n, k)
    clean, out = torch.empty(2, m, n, dtype=torch.bfloat16, device="cuda")
    launch_gemm(config, x, w, clean, xs, ws, None)
    x.view(torch.uint8)[2, 639], x.view(torch.uint8)[4, 0], xs[9, 4] = 0x7F, 0xFF, math.nan
    w.view(torch.uint8)[7, 130], ws[1, 2] = 0x7F, math.nan
    launch_gemm(config, x, w, out, xs, ws, None)
    want = torch.zeros(m, n, dtype=torch.bool, device="cuda")
    want[[2, 4, 9]], want[:, 7], want[:, 128:256] = True, True, True
    assert torch.equal(out.isnan(), want) and torch.equal(out[~want], clean[~want])


def gluon_configs(x_blocks: Sequence[int]) -> list[tuple[int, GemmConfig]]:
    return [(x_block, c) for x_block in x_blocks for c in all_configs("tiles", x_block) if c.variant in GLUON]


@pytest.mark.parametrize(("x_block", "config"), gluon_configs((32, 64, 256, 512, ALL)), ids=str)
def test_other_tiles_of_the_activation(config: GemmConfig, x_block: int) -> None:
    for m, n, k in ((65, 256, 1296), (300, 144, 400), (129, 136, 16)):
        assert can_run(config, m, n, k, torch.bfloat16, x_block)
        x, xs, w, ws = operands(m, n, k, x_block)
        assert has_scale_columns(xs)
        out = torch.full((m, n), math.nan, dtype=torch.bfloat16, device="cuda")
        launch_gemm(config, x, w, out, xs, ws, None, x_block)
        assert relative_error(out, exact(x, xs, w, ws, x_block)) <= 2e-3
        again = torch.full_like(out, math.nan)
        for _ in range(5):
            launch_gemm(config, x, w, again, xs, ws, None, x_block)
            assert torch.equal(out, again), "a repeated run gave other bits: a race"


@pytest.mark.parametrize(("x_block", "config"), gluon_configs((32, 64)), ids=str)
def test_each_narrow_tile_has_its_own_scale(config: GemmConfig, x_block: int) -> None:
    # One tile in each row, not always the same, has a nonzero scale: the result is the sum over that tile.
    m, n, k = 80, 136, 1024
    x, _, w, _ = operands(m, n, k)
    chosen = torch.arange(m, device="cuda") % (k // x_block)
    columns = torch.zeros(k // x_block, m, device="cuda")
    columns[chosen, torch.arange(m, device="cuda")] = torch.arange(1.0, m + 1, device="cuda")
    ws = torch.rand(2, k // 128, device="cuda") + 0.5
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    launch_gemm(config, x, w, out, columns.T, ws, None, x_block)
    want = exact(x, columns.T, w, ws, x_block)
    assert bool((((out.double() - want).norm(dim=1) / want.norm(dim=1)) <= 4e-3).all())


@configs
def test_sums_are_promoted_every_128_of_k(config: GemmConfig) -> None:
    # Equal signs make the sum grow, so an accumulator with 14 bits loses ever more of each addend. The vendor's fast
    # accumulation on the same operands shows the error of an unpromoted sum.
    m = n = 256
    k = 32768
    x = (torch.rand(m, k, device="cuda") * 0.5 + 0.5).to(E4M3)
    w = (torch.rand(n, k, device="cuda") * 0.5 + 0.5).to(E4M3)
    xs, ws = torch.ones(k // 128, m, device="cuda").T, torch.ones(n // 128, k // 128, device="cuda")
    want = exact(x, xs, w, ws)
    one = torch.ones((), device="cuda")
    fast = relative_error(torch._scaled_mm(x, w.T, one, one, out_dtype=torch.float32, use_fast_accum=True), want)
    dtype = torch.float32 if can_run(config, m, n, k, torch.float32) else torch.float16
    out = torch.empty(m, n, device="cuda", dtype=dtype)
    scale = 2.0**-4  # the sums are near 18000, and the float16 maximum is 65504
    launch_gemm(config, x, w, out, xs * scale, ws, None)
    assert relative_error(out.double() / scale, want) <= 5e-4
    assert fast > 5 * 5e-4


@configs
def test_operands_and_outputs_beyond_32_bits(config: GemmConfig) -> None:
    for m, n, k in ((2**31 // 4096 + 200, 136, 4096), (2**31 // 2048 + 100, 2048, 128)):
        x, w = torch.zeros(m, k, dtype=torch.uint8, device="cuda").view(E4M3), torch.randn(n, k, device="cuda").to(E4M3)
        x[-300:] = torch.randn(300, k, device="cuda").to(E4M3)
        xs = torch.rand(k // 128, (m + 3) // 4 * 4, device="cuda")[:, :m].T
        ws = torch.rand(ceil_div(n, 128), k // 128, device="cuda") + 0.5
        out = torch.full((m, n), math.nan, dtype=torch.bfloat16, device="cuda")
        launch_gemm(config, x, w, out, xs, ws, None)
        assert relative_error(out[-300:], exact(x[-300:], xs[-300:], w, ws)) <= 2e-3
        assert bool((out[: m - 300] == 0).all())
        del x, out


def test_scales_in_rows_select_a_portable_kernel() -> None:
    for m in (16, 1024):
        x, xs, w, ws = operands(m, 4096, 4096)
        rows = xs.contiguous()
        assert has_scale_columns(xs) and not has_scale_columns(rows)
        chosen = {columns: choose(GemmProblem(m, 4096, 4096, scale_columns=columns)) for columns in (True, False)}
        assert chosen[True].variant in GLUON and chosen[False].variant not in GLUON
        op = torch.ops.qcompiler.scaled_linear
        for scales in (xs, rows):
            out = op(x, scales, w, ws, None, [1, 128], [128, 128], torch.bfloat16)
            assert relative_error(out, exact(x, xs, w, ws)) <= 2e-3


@pytest.mark.parametrize("variant", ["narrow", "split"])
def test_any_number_of_k_splits_is_added(variant: str) -> None:
    config = next(config for config in CONFIGS if config.variant == variant)
    seen = set()
    for k in (128, 640, 1040, 2048, 4096, 7168, 8208):
        x, xs, w, ws = operands(9, 136, k)
        bias = torch.randn(136, device="cuda", dtype=torch.bfloat16)
        out = torch.full((9, 136), math.nan, device="cuda")
        launch_gemm(config, x, w, out, xs, ws, bias)
        assert relative_error(out, exact(x, xs, w, ws, bias=bias)) <= 4e-4
        seen.add(ceil_div(ceil_div(k, 128), gemm_template(config).split_depth(config, 9, 136, k, 132)))
    assert min(seen) == 1 and len(seen) > 4
