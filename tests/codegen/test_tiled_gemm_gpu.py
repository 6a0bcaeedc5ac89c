"""GEMMs with scales inside the sum, on a Hopper GPU, against float64 on the same operands."""

import math
from collections.abc import Sequence

import pytest
import torch
from gpu_checks import assert_compiled_and_captured, assert_compiles_nothing_new, relative_error
from hopper_kernels import all_configs, launch_gemm, refusal
from torch import Tensor

from codegen.kernels.narrow_gemm import narrow_gemm, sum_splits
from codegen.kernels.quantize import quantize_tiles
from codegen.kernels.scaled_gemm import scaled_gemm_pointers, scaled_gemm_tma
from codegen.kernels.warp_gemm import warp_gemm
from codegen.operators.quantize import SCALE_LAYOUTS
from codegen.templates.gemm import GemmConfig, GemmProblem
from qcompiler.errors import CodegenError

pytestmark = pytest.mark.gpu

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
X_BLOCKS = (32, 64, 256, 512, -1)
ROWS = (0, 1, 2, 3, 15, 63, 64, 65, 127, 129, 4095)


def quantize(
    x: Tensor,
    layout: str = "row_major",
    profile: str = "deepseek",
    dtype: torch.dtype = E4M3,
    block: Sequence[int] = (1, 128),
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.qcompiler.quantize(x, list(block), dtype, profile, layout)
    return result


def linear(
    x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16,
    x_block: Sequence[int] = (1, 128),
) -> Tensor:  # fmt: skip
    result: Tensor = torch.ops.qcompiler.scaled_linear(x, xs, w, ws, bias, list(x_block), [128, 128], out_dtype)
    return result


def operands(
    m: int, n: int, k: int, layout: str = "col_major", seed: int = 0, x_block: Sequence[int] = (1, 128)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantized operands whose scales differ from block to block by factors of up to 100."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(rows: int) -> Tensor:
        spread = torch.rand(rows, -(-k // 32), generator=generator, device="cuda").mul(4.6).exp()
        return torch.randn(rows, k, generator=generator, device="cuda") * spread.repeat_interleave(32, 1)[:, :k]

    x, xs = quantize(draw(m).bfloat16(), layout, block=x_block)
    w, ws = quantize(draw(n), block=(128, 128))
    return x, xs, w, ws


def exact(x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None = None) -> Tensor:
    """The matmul of the quantized operands in float64."""
    k = x.shape[1]
    width = next(b for b in (32, 64, 128, 256, 512, k) if -(-k // b) == xs.shape[1])
    left = x.double() * xs.double().repeat_interleave(width, 1)[:, :k]
    spread = ws.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    result = left @ (w.double() * spread[: w.shape[0], : w.shape[1]]).T
    return result if bias is None else result + bias.double()


@pytest.mark.parametrize("config", all_configs(), ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_every_configuration_on_a_large_and_on_a_ragged_shape(config: GemmConfig, out_dtype: torch.dtype) -> None:
    for m, n, k in ((2048, 2048, 4096), (333, 464, 1104), (1, 144, 144)):
        x, xs, w, ws = operands(m, n, k)
        if refusal(config, GemmProblem(m, n, k, out_bytes=out_dtype.itemsize)) is not None:
            assert out_dtype == torch.float32 and config.variant == "warp"
            continue
        want = exact(x, xs, w, ws)
        out = torch.full((m, n), math.nan, dtype=out_dtype, device="cuda")
        launch_gemm(config, x, w, out, xs, ws, None)
        assert relative_error(out, want) <= (2e-3 if out_dtype == torch.bfloat16 else F32_TOLERANCE)
        again = torch.full_like(out, math.nan)
        for _ in range(5):
            launch_gemm(config, x, w, again, xs, ws, None)
            assert torch.equal(out, again), "a repeated run gave other bits: a race"


@pytest.mark.parametrize("x_block", X_BLOCKS)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_every_configuration_for_other_tiles(x_block: int, out_dtype: torch.dtype) -> None:
    for config in all_configs("tiles", x_block):
        for m, n, k in ((1100, 1024, 4096), (333, 464, 1104), (1, 144, 144)):
            x, xs, w, ws = operands(m, n, k, x_block=(1, x_block))
            problem = GemmProblem(m, n, k, out_bytes=out_dtype.itemsize, x_block=x_block)
            if refusal(config, problem) is not None:
                assert out_dtype == torch.float32 and config.variant == "warp"
                continue
            out = torch.full((m, n), math.nan, dtype=out_dtype, device="cuda")
            launch_gemm(config, x, w, out, xs, ws, None, x_block)
            assert relative_error(out, exact(x, xs, w, ws)) <= (2e-3 if out_dtype == torch.bfloat16 else F32_TOLERANCE)
            again = torch.full_like(out, math.nan)
            launch_gemm(config, x, w, again, xs, ws, None, x_block)
            assert torch.equal(out, again), "a repeated run gave other bits: a race"


@pytest.mark.parametrize("x_block", [(1, x_block) for x_block in X_BLOCKS] + [(-1, -1)])
def test_other_tiles_of_any_size(x_block: tuple[int, int]) -> None:
    for m, n, k in ((3, 129, 257), (63, 7, 100), (64, 256, 512), (127, 1000, 1000), (4095, 256, 640), (0, 8, 64)):
        layout = "col_major" if x_block[0] == 1 and m % 2 else "row_major"
        x, xs, w, ws = operands(m, n, k, layout, x_block=x_block)
        bias = torch.randn(n, device="cuda")
        out = linear(x, xs, w, ws, bias, torch.float32, x_block)
        scales = xs.expand(m, -1)
        # A mean over three rows is too noisy.
        assert m == 0 or relative_error(out, exact(x, scales, w, ws, bias)) <= 4e-4


F32_TOLERANCE = 3e-4
"""Within a block of 128, tensor cores keep about 14 bits; promoted sums are added in FP32."""


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_gemm_with_any_number_of_rows(rows: int, layout: str) -> None:
    x, xs, w, ws = operands(rows, 768, 1024, layout)
    out = linear(x, xs, w, ws)
    assert out.shape == (rows, 768)
    assert rows == 0 or relative_error(out, exact(x, xs, w, ws)) <= 2e-3


@pytest.mark.parametrize(
    ("n", "k"), [(1, 128), (7, 100), (129, 257), (576, 7168), (200, 1), (384, 8), (1000, 1000), (4, 4)]
)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gemm_of_any_width_and_depth(n: int, k: int, out_dtype: torch.dtype) -> None:
    for m in (5, 200):
        x, xs, w, ws = operands(m, n, k)
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
        want = exact(x, xs, w, ws, bias)
        if want.abs().max() < 6e4:  # the float16 maximum is 65504
            tolerance = {torch.bfloat16: 2.5e-3, torch.float16: 5e-4, torch.float32: F32_TOLERANCE}[out_dtype]
            assert relative_error(linear(x, xs, w, ws, bias, out_dtype), want) <= tolerance


def test_garbage_beyond_the_last_row_is_ignored() -> None:
    x, xs, w, ws = operands(77, 256, 512)
    rows = torch.full((256, 512), 0x7F, dtype=torch.uint8, device="cuda").view(E4M3)  # NaN everywhere
    scales = torch.full((4, 256), math.nan, device="cuda").T
    rows[:77], scales[:77] = x, xs
    for configured in all_configs():
        out = torch.full((256, 256), 7.0, device="cuda", dtype=torch.bfloat16)
        launch_gemm(configured, rows[:77], w, out[:77], scales[:77], ws, None)
        assert relative_error(out[:77], exact(x, xs, w, ws)) <= 2e-3
        assert bool((out[77:] == 7.0).all()), f"{configured} wrote beyond the last row"


def test_unaligned_operands_take_the_pointer_kernel() -> None:
    x, xs, w, ws = operands(130, 256, 256)
    moved = torch.empty(130 * 256 + 3, dtype=torch.uint8, device="cuda")[3:].view(130, 256)
    moved.copy_(x.view(torch.uint8))
    assert relative_error(linear(moved.view(E4M3), xs, w, ws), exact(x, xs, w, ws)) <= 2e-3


def test_sums_are_promoted_every_128_of_k() -> None:
    # Equal signs make the sum grow, so an accumulator with 14 bits loses ever more of each addend. The vendor's fast
    # accumulation on the same operands shows the error of an unpromoted sum.
    m = n = 256
    k = 32768
    x = (torch.rand(m, k, device="cuda") * 0.5 + 0.5).to(E4M3)
    w = (torch.rand(n, k, device="cuda") * 0.5 + 0.5).to(E4M3)
    xs, ws = torch.ones(m, k // 128, device="cuda"), torch.ones(n // 128, k // 128, device="cuda")
    want = exact(x, xs, w, ws)
    one = torch.ones((), device="cuda")
    fast = torch._scaled_mm(x, w.T, one, one, out_dtype=torch.float32, use_fast_accum=True)
    ours = relative_error(linear(x, xs, w, ws, out_dtype=torch.float32), want)
    assert ours <= 5e-4
    assert ours * 5 < relative_error(fast, want)


def test_batches_and_bias() -> None:
    x = torch.randn(2, 3, 40, 512, dtype=torch.bfloat16, device="cuda")
    w, ws = quantize(torch.randn(640, 512, device="cuda"), block=(128, 128))
    bias = torch.randn(640, device="cuda")
    for layout in SCALE_LAYOUTS:
        q, s = quantize(x, layout)
        out = linear(q, s, w, ws, bias, torch.float32)
        want = exact(q.view(-1, 512), s.reshape(-1, 4), w, ws, bias).view(2, 3, 40, 640)
        assert relative_error(out, want) <= F32_TOLERANCE


def test_problems_that_the_kernels_cannot_run_are_refused() -> None:
    x, xs, w, ws = operands(8, 256, 256)
    op = torch.ops.qcompiler.scaled_linear
    with pytest.raises(CodegenError, match=r"a weight needs \[128, 128\], \[1, -1\] or \[-1, -1\], not \[1, 128\]"):
        op(x, xs, w, ws, None, [1, 128], [1, 128], torch.bfloat16)
    with pytest.raises(CodegenError, match="shape of the activation scales"):
        op(x, xs[:4], w, ws, None, [1, 128], [128, 128], torch.bfloat16)
    with pytest.raises(CodegenError, match="layout of the weights"):
        op(x, xs, w.T, ws, None, [1, 128], [128, 128], torch.bfloat16)
    with pytest.raises(CodegenError, match="write this dtype"):
        op(x, xs, w, ws, None, [1, 128], [128, 128], torch.float64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch uses its own deprecated functions
def test_compiled_and_captured_in_a_cuda_graph() -> None:
    w, ws = quantize(torch.randn(512, 384, device="cuda"), block=(128, 128))

    def layer(x: Tensor) -> Tensor:
        return linear(*quantize(x, "col_major"), w, ws)

    assert_compiled_and_captured(layer, columns=384, rows=(5, 64, 300))


def test_a_new_number_of_rows_compiles_nothing() -> None:
    w, ws = quantize(torch.randn(512, 384, device="cuda"), block=(128, 128))

    def call(rows: int) -> None:
        for layout in SCALE_LAYOUTS:
            linear(*quantize(torch.randn(rows, 384, dtype=torch.bfloat16, device="cuda"), layout), w, ws)

    kernels = (quantize_tiles, scaled_gemm_pointers, scaled_gemm_tma, warp_gemm, narrow_gemm, sum_splits)
    assert_compiles_nothing_new(call, kernels)
