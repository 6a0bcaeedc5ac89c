"""Kernels in Triton's interpreter on a CPU, where it is exact: indexing, masks, scales, quantized GEMMs.

The interpreter is chosen when Triton is imported, so all cases run in a separate process. It rounds FP32 to FP8
incorrectly, so codes are checked only where no rounding is needed.
"""

import math

import pytest
from triton_interpreter import needs_interpreter, prepare_interpreter, run_interpreted


def _operands(m: int, n: int, k: int, padded: bool, x_block: int = 128) -> "tuple[Tensor, Tensor, Tensor, Tensor]":
    x, xs = numerics.quantize(torch.randn(m, k) * torch.rand(m, 1).mul(4).exp(), numerics.format_of((1, x_block)))
    w, ws = numerics.quantize(torch.randn(n, k), numerics.format_of((128, 128)))
    if padded:
        scale = quantization.scale_like(x, x_block, "col_major")
        rows = torch.full((m + 70, k), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
        rows[:m] = x
        return rows[:m], scale.copy_(xs), w, ws
    return x, xs, w, ws


def _gemm(config: "GemmConfig", m: int, n: int, k: int, dtype: "torch.dtype", bias: bool, x_block: int = 128) -> None:
    x, xs, w, ws = _operands(m, n, k, m % 2 == 1, x_block)
    addend = torch.randn(n) if bias else None
    store = torch.full((m + 3, n), 7.0, dtype=dtype)
    launch_gemm(config, x, w, store[:m], xs, ws, addend, x_block)
    want = numerics.scaled_linear(
        x, xs, w, ws, addend, x_format=numerics.format_of((1, x_block), x.dtype), out_dtype=torch.float32
    )
    error = float((store[:m].float() - want).norm() / want.norm())
    # The interpreter truncates to bfloat16; the GPU rounds.
    assert error < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype], (config, m, n, k, error)
    assert bool((store[m:] == 7.0).all()), (config, "wrote beyond the last row")


def _quantize(m: int, k: int, name: str, layout: str, block_k: int) -> None:
    rule = numerics.profile(name)
    # Sums of two powers of two: dividing them by the power-of-two scales below needs no rounding.
    base = torch.randint(0, 8, (m, k + 5)).float().add(8).mul(torch.randint(0, 2, (m, k + 5)).mul(2).sub(1))
    base[:, ::block_k] = 14.0
    if m > 1:
        base[1], base[1, 0] = 0.0, math.nan
    x = base[:, :k]
    x[0, k - 1] = math.inf
    q = torch.full((m + 2, k), 7.0).to(torch.float8_e4m3fn)
    scale = quantization.scale_like(x, block_k, layout).fill_(-1.0)
    tile = quantize_config(m, block_k)
    quantize_tiles[(-(-m // tile.block_m) * -(-k // block_k),)](
        x, q, scale, None, m, k, x.stride(0), *scale.stride(), AMAX_FLOOR=rule.amax_floor(ir_dtype(q.dtype)), TOP=448.0,
        RECIPROCAL=rule.division == "reciprocal", UE8M0=rule.scale_format == "ue8m0", BLOCK_M=tile.block_m,
        BLOCK_K=block_k, num_warps=tile.warps,
    )  # fmt: skip
    want_q, want_scale = numerics.quantize(x, numerics.format_of((1, block_k), profile=name))
    assert torch.allclose(scale, want_scale, rtol=0, atol=0, equal_nan=True), (m, k, name, layout)
    assert bool(want_scale[0, -1].isnan()) and bool(want_scale[1:2, 0].isnan().all())
    assert bool((q[m:].float() == 7.0).all()), "wrote beyond the last row"
    kept = want_q.float().isfinite() & (x != 0)  # the interpreter encodes NaN differently
    got, want = q[:m].float()[kept], want_q.float()[kept]
    assert torch.allclose(got, want, rtol=0.07), (m, k, name, layout)


def _row_gemm(config: "GemmConfig", dtype: "torch.dtype", m: int, n: int, k: int, wholes: tuple[int, int]) -> None:
    x_block, w_block = ((-1 if whole else 1, -1) for whole in wholes)
    x, xs = numerics.quantize(torch.randn(m, k) * torch.rand(m, 1).mul(4).exp(), numerics.format_of(x_block, dtype))
    w, ws = numerics.quantize(torch.randn(n, k), numerics.format_of(w_block, dtype))
    addend = torch.randn(n)
    store = torch.full((m + 3, n), 7.0)
    launch_row_gemm(config, x, w, store[:m], xs, ws, addend)
    x_format, w_format = numerics.format_of(x_block, dtype), numerics.format_of(w_block, dtype)
    want = numerics.scaled_linear(x, xs, w, ws, addend, x_format=x_format, w_format=w_format, out_dtype=torch.float32)
    assert float((store[:m] - want).norm() / want.norm()) < 1e-5, (config, dtype, m, n, k)
    assert bool((store[m:] == 7.0).all()), (config, "wrote beyond the last row")


def _int8(block: tuple[int, int], m: int, k: int, name: str, prescaled: bool, odd: float = math.nan) -> None:
    x = torch.randn(m, k + 5)[:, :k] * torch.rand(m, 1).mul(4).exp() * 2.0**-80
    x[0, k // 2] = odd
    x[-1, 0] = 0.0
    prescale = torch.rand(k) + 0.5 if prescaled else None
    want_q, want_scale = numerics.quantize(x, numerics.format_of(block, torch.int8, name), prescale)
    q = torch.full((m + 2, k), 7, dtype=torch.int8)
    scale = torch.full(want_scale.shape, -1.0)
    launch_quantize(x, q[:m], scale, block, name, prescale)
    assert torch.allclose(scale, want_scale, rtol=0, atol=0, equal_nan=True), (block, m, k, name, odd)
    assert bool(want_scale.isnan().any()) == (not math.isfinite(odd))
    assert bool((q[m:] == 7).all()), "wrote beyond the last row"
    assert torch.equal(q[:m], want_q), (block, m, k, name, odd)
    for known in (scale, torch.full_like(scale, 2.0**-84)):
        again = torch.empty_like(q[:m])
        launch_quantize(x, again, known, block, name, prescale, known=True)
        want = numerics.quantize_static(x, known, numerics.format_of(block, torch.int8, name), prescale)
        assert torch.equal(again, want), (block, m, k, name, odd)


def _amax_of_finite(m: int, k: int) -> None:
    x = torch.randn(m, k)
    x[m // 2, :3], x[0, 0] = torch.tensor([math.nan, math.inf, -math.inf]), -9.0
    q, scale = torch.empty(m, k).to(torch.float8_e4m3fn), torch.empty(1, 1)
    launch_quantize(x, q, scale, (-1, -1))
    assert torch.equal(scale, numerics.quantize(x, numerics.format_of((-1, -1)))[1]), (m, k)


def _portable(x_block: int) -> "list[GemmConfig]":
    """The configurations that are not in Gluon, which has no interpreter."""
    return [config for config in all_configs("tiles", x_block) if config.variant not in GLUON]


def _gather_codes(m: int, n: int, k: int, block_k: int) -> None:
    """Rows of codes and scales; a row that does not exist has the code 0 and the scale NaN."""
    data, scale = (
        torch.randint(-128, 128, (m, k), dtype=torch.int8),
        torch.rand(m, 1 if block_k == -1 else -(-k // block_k)),
    )
    rows = torch.randint(-m, m, (n,))
    for kind in (torch.int64, torch.int32):
        for scales in (scale, scale.t().contiguous().t()):
            q, s = launch_gather_codes(data, scales, rows.to(kind), block_k)
            assert torch.equal(q, data[rows]) and torch.equal(s, scale[rows]), (m, n, k, block_k)
    q, s = launch_gather_codes(data, scale, torch.full((n,), m), block_k)
    assert not q.any() and bool(s.isnan().all())


def _run_all() -> None:
    for block in ((1, -1), (-1, -1), (1, 64)):
        for name, odd in zip(numerics.PROFILES, (math.nan, math.inf, -math.inf, 0.5), strict=True):
            _int8(block, 5, 300, name, True, odd)
        _int8(block, 1, 16, "ue8m0", prescaled=False)
        _int8(block, 520, 33, "deepgemm", prescaled=False)
    _int8((1, -1), 2, 20000, "deepgemm", prescaled=True)
    for m, k in ((1, 16), (520, 33)):
        _amax_of_finite(m, k)
    elements: dict[Kind, torch.dtype] = {"rows_f8": torch.float8_e4m3fn, "rows_i8": torch.int8}
    for kind, element in elements.items():
        for config in [config for config in all_configs(kind) if config.variant not in GLUON]:
            _row_gemm(config, element, 65, 144, 144, (0, 0))
            _row_gemm(config, element, 3, 16, 16, (1, 0))
            _row_gemm(config, element, 3, 35, 129, (0, 1))
    for x_block in (32, 64, 256, -1):
        for config in _portable(x_block):
            _gemm(config, 3, 48, 272, torch.float32, bias=True, x_block=x_block)
    for config in _portable(128):
        _gemm(config, 65, 144, 272, torch.bfloat16, bias=True)
        _gemm(config, 1, 16, 16, torch.float32, bias=False)
        _gemm(config, 130, 128, 128, torch.float16, bias=True)
        if config.variant == "pointers":
            for m, n, k in ((3, 1, 1), (67, 131, 129), (5, 7, 300)):
                _gemm(config, m, n, k, torch.float32, True)
    for layout in quantization.SCALE_LAYOUTS:
        for name in numerics.PROFILES:
            _quantize(5, 300, name, layout, 128)
        for m, k, block_k in ((1, 128, 128), (34, 129, 128), (3, 77, 32), (2, 600, 512)):
            _quantize(m, k, "deepseek", layout, block_k)
    for m, n, k, block_k in ((5, 7, 300, 128), (3, 70, 40, 32), (2, 3, 4200, 512), (4, 1, 16, -1)):
        _gather_codes(m, n, k, block_k)
    print("all cases ran")


@needs_interpreter
@pytest.mark.timeout(240)
def test_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


if __name__ == "__main__":
    import torch
    from gather_kernels import launch_gather_codes
    from hopper_kernels import GLUON, all_configs, launch_gemm, launch_quantize, launch_row_gemm
    from torch import Tensor

    from codegen.kernels.quantize import quantize_tiles
    from codegen.operators import quantize as quantization
    from codegen.templates.gemm import GemmConfig, Kind
    from codegen.templates.quantize import quantize_config
    from qcompiler import numerics
    from qcompiler.numerics.dtypes import ir_dtype

    prepare_interpreter()
    torch.manual_seed(0)
    _run_all()
