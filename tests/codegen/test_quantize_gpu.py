"""Quantization on a Hopper GPU matches `numerics` bit for bit, for every granularity, format and profile."""

import math
from collections.abc import Sequence
from itertools import cycle

import pytest
import torch
from gpu_checks import assert_same_codes
from torch import Tensor

from codegen.operators.quantize import SCALE_LAYOUTS
from qcompiler import numerics

pytestmark = pytest.mark.gpu

E4M3, E5M2, I8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
ROWS = (0, 1, 2, 3, 15, 63, 65, 129, 4095)


def quantize(
    x: Tensor,
    layout: str = "row_major",
    profile: str = "deepseek",
    dtype: torch.dtype = E4M3,
    block: Sequence[int] = (1, 128),
    prescale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.qcompiler.quantize(x, list(block), dtype, profile, layout, prescale)
    return result


def assert_same_scales(got: Tensor, want: Tensor) -> None:
    """Compares bits; any NaN equals any other NaN."""
    torch.testing.assert_close(got.cpu(), want.cpu(), rtol=0, atol=0, equal_nan=True)


def messy(rows: int, columns: int, dtype: torch.dtype, finite: bool = False) -> Tensor:
    """Ordinary values, and blocks of zeros, subnormals, tiny and huge values and exact ties.

    Unless `finite`, row 1 is NaN, row 2 is infinite, and one row in six has one NaN or infinity.
    """
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    x *= torch.rand(rows, 1, generator=torch.Generator().manual_seed(1)).mul(20).sub(10).exp()
    kinds = (0.0, -0.0, 1e-40, -1e-44, 1e-6, 3e4, 448.0, 1.0625)
    for row in range(0, rows, 3):
        for place in range(0, columns, 7):
            x[row, place] = kinds[(row // 3 + place // 7) % len(kinds)]
    x[rows // 2 :: 4] = 0.0
    x.clamp_(-6e4, 6e4)  # the float16 maximum is 65504
    if rows > 2 and not finite:
        x[1], x[2] = math.nan, math.inf
        for at, row in enumerate(range(4, rows, 6)):
            x[row, (row * 37) % columns] = (math.nan, math.inf, -math.inf)[at % 3]
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("profile", sorted(numerics.PROFILES))
@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_quantization_equals_numerics_bit_for_bit(dtype: torch.dtype, profile: str, layout: str) -> None:
    for rows, columns in ((37, 384), (5, 129), (700, 1000), (3, 77), (1, 128)):
        x = messy(rows, columns, dtype)
        q, scale = quantize(x.cuda(), layout, profile)
        want_q, want_scale = numerics.quantize(x, numerics.format_of((1, 128), profile=profile))
        assert_same_scales(scale, want_scale)
        assert_same_codes(q, want_q)


@pytest.mark.parametrize("profile", sorted(numerics.PROFILES))
def test_quantization_of_many_random_blocks(profile: str) -> None:
    # 67 million quotients reveal rounding errors that occur once in a million. numerics on the GPU must match the CPU.
    x = torch.randn(8192, 8192, device="cuda") * torch.rand(8192, 1, device="cuda").mul(12).sub(6).exp()
    q, scale = quantize(x, "col_major", profile)
    want_q, want_scale = numerics.quantize(x, numerics.format_of((1, 128), profile=profile))
    assert torch.equal(scale, want_scale) and torch.equal(q.view(torch.uint8), want_q.view(torch.uint8))
    cpu_q, cpu_scale = numerics.quantize(x[:512].cpu(), numerics.format_of((1, 128), profile=profile))
    assert torch.equal(want_scale[:512].cpu(), cpu_scale)
    assert torch.equal(want_q[:512].cpu().view(torch.uint8), cpu_q.view(torch.uint8))


@pytest.mark.parametrize("rows", ROWS)
def test_quantization_of_any_number_of_rows(rows: int) -> None:
    x = torch.randn(rows, 512, dtype=torch.bfloat16)
    for layout in SCALE_LAYOUTS:
        q, scale = quantize(x.cuda(), layout)
        want_q, want_scale = numerics.quantize(x)
        assert q.shape == want_q.shape and torch.equal(scale.cpu(), want_scale)
        assert_same_codes(q, want_q)
        if layout == "col_major" and rows:
            assert scale.stride() == (1, (rows + 3) // 4 * 4)


@pytest.mark.parametrize("block_k", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [E4M3, E5M2, I8])
def test_quantization_in_other_blocks_and_formats(block_k: int, dtype: torch.dtype) -> None:
    for rows in (3, 600):
        x = messy(rows, 1056, torch.bfloat16)
        q, scale = quantize(x.cuda(), block=(1, block_k), dtype=dtype)
        want_q, want_scale = numerics.quantize(x, numerics.format_of((1, block_k), dtype))
        assert_same_scales(scale, want_scale)
        assert_same_codes(q, want_q)


def test_quantization_of_views_and_batches() -> None:
    base = torch.randn(96, 1024, dtype=torch.bfloat16, device="cuda")
    batch = torch.randn(2, 3, 5, 256, dtype=torch.bfloat16, device="cuda")
    for x in (
        base[:, 128:640],
        base[::3],
        base.T,
        base[:, ::2],
        base[3:4, :100],
        batch,
        batch.transpose(0, 2),
        base[0],
    ):
        for layout in SCALE_LAYOUTS:
            q, scale = quantize(x, layout)
            want_q, want_scale = numerics.quantize(x.cpu())
            assert q.is_contiguous() and torch.equal(scale.cpu(), want_scale)
            assert_same_codes(q, want_q)


def test_rows_outside_a_view_are_neither_read_nor_written() -> None:
    base = torch.full((64, 256), math.nan, device="cuda")
    base[16:33] = torch.randn(17, 256, device="cuda")
    q, scale = quantize(base[16:33], "col_major")
    assert q.float().isfinite().all() and scale.isfinite().all()


def test_quantization_beyond_32_bit_offsets() -> None:
    rows, columns = 2**19 + 3, 4096 + 128
    x = torch.randn(64, columns, dtype=torch.bfloat16, device="cuda").repeat(rows // 64 + 1, 1)[:rows]
    assert x.numel() > 2**31
    q, scale = quantize(x, "col_major")
    want_q, want_scale = numerics.quantize(x[-67:])
    assert torch.equal(q[-67:].view(torch.uint8), want_q.view(torch.uint8)) and torch.equal(scale[-67:], want_scale)


WHOLE = ((1, -1), (-1, -1))
KINDS = [(block, dtype, profile) for block in WHOLE for dtype in (E4M3, E5M2, I8) for profile in numerics.PROFILES]
SOURCES = cycle((torch.bfloat16, torch.float16, torch.float32))


def static(
    x: Tensor, scale: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, prescale: Tensor | None = None
) -> Tensor:
    result: Tensor = torch.ops.qcompiler.quantize_static(x, scale, list(block), dtype, profile, prescale)
    return result


@pytest.mark.parametrize(
    ("block", "dtype", "profile", "source"), [(*kind, source) for kind, source in zip(KINDS, SOURCES, strict=False)]
)
def test_whole_rows_and_tensors(block: tuple[int, int], dtype: torch.dtype, profile: str, source: torch.dtype) -> None:
    for at, (rows, columns) in enumerate(((37, 384), (700, 1000), (3, 77), (2, 20000), (520, 128))):
        # A per-tensor INT8 scale is NaN if one element is NaN; the test would then check nothing else.
        x = messy(rows, columns, source, finite=block == (-1, -1) and at % 2 == 0)
        prescale = None if at % 2 == 0 else torch.rand(columns).mul(8).sub(4).exp().to((source, torch.float32)[at // 2])
        factors = None if prescale is None else prescale.cuda()
        q, scale = quantize(x.cuda(), "row_major", profile, dtype, block, factors)
        want_q, want_scale = numerics.quantize(x, numerics.format_of(block, dtype, profile), prescale)
        assert_same_scales(scale, want_scale)
        assert_same_codes(q, want_q)
        known = want_scale.nan_to_num(nan=1.0) * 0.37
        want_q = numerics.quantize_static(x, known, numerics.format_of(block, dtype, profile), prescale)
        assert_same_codes(static(x.cuda(), known.cuda(), block, dtype, profile, factors), want_q)


@pytest.mark.parametrize("block_k", [32, 128, 512])
@pytest.mark.parametrize("profile", ["deepseek", "ue8m0"])
def test_tiles_with_a_prescale_and_with_known_scales(block_k: int, profile: str) -> None:
    for dtype, rows in ((E4M3, 37), (I8, 37), (I8, 600)):
        x, block = messy(rows, 1000, torch.bfloat16), (1, block_k)
        prescale = torch.rand(1000).mul(8).sub(4).exp()
        for layout in SCALE_LAYOUTS:
            q, scale = quantize(x.cuda(), layout, profile, dtype, block, prescale.cuda())
            want_q, want_scale = numerics.quantize(x, numerics.format_of(block, dtype, profile), prescale)
            assert_same_scales(scale, want_scale)
            assert_same_codes(q, want_q)
            assert_same_codes(static(x.cuda(), scale, block, dtype, profile, prescale.cuda()), want_q)


@pytest.mark.parametrize("profile", sorted(numerics.PROFILES))
@pytest.mark.parametrize("block", [(1, 128), (1, -1), (-1, -1)])
def test_int8_of_many_random_numbers(profile: str, block: tuple[int, int]) -> None:
    # Like the FP8 test above; FP32 input, so quotients can be anywhere, including next to ties.
    x = torch.randn(8192, 4096, device="cuda") * torch.rand(8192, 1, device="cuda").mul(2).sub(1).exp()
    q, scale = quantize(x, "row_major", profile, I8, block)
    want_q, want_scale = numerics.quantize(x, numerics.format_of(block, I8, profile))
    assert torch.equal(scale, want_scale) and torch.equal(q, want_q)
    cpu_q, cpu_scale = numerics.quantize(x[:512].cpu(), numerics.format_of(block, I8, profile))
    gpu_q, gpu_scale = quantize(x[:512], "row_major", profile, I8, block)
    assert torch.equal(gpu_scale.cpu(), cpu_scale) and torch.equal(gpu_q.cpu(), cpu_q)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("block", WHOLE)
@pytest.mark.parametrize("dtype", [E4M3, I8])
def test_whole_rows_and_tensors_of_any_number_of_rows(rows: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    for columns in (512, 0):
        x = torch.randn(rows, columns, dtype=torch.bfloat16)
        for layout in SCALE_LAYOUTS if block[0] == 1 else ("row_major",):
            q, scale = quantize(x.cuda(), layout, dtype=dtype, block=block)
            want_q, want_scale = numerics.quantize(x, numerics.format_of(block, dtype))
            assert_same_scales(scale, want_scale)
            assert_same_codes(q, want_q)
        assert_same_codes(static(x.cuda(), scale, block, dtype, "deepseek"), want_q)


@pytest.mark.parametrize("block", WHOLE)
def test_whole_rows_and_tensors_of_views_and_batches(block: tuple[int, int]) -> None:
    base = torch.randn(96, 1024, dtype=torch.bfloat16, device="cuda")
    batch = torch.randn(2, 3, 5, 256, dtype=torch.bfloat16, device="cuda")
    views = (base[:, 128:640], base[::3], base.T, base[:, ::2], base[3:4, :100], batch, batch.transpose(0, 2), base[0])
    for x in views:
        for layout in SCALE_LAYOUTS if block[0] == 1 else ("row_major",):
            q, scale = quantize(x, layout, block=block)
            want_q, want_scale = numerics.quantize(x.cpu(), numerics.format_of(block))
            assert q.is_contiguous() and torch.equal(scale.cpu(), want_scale)
            assert_same_codes(q, want_q)
            assert_same_codes(static(x, scale, block, E4M3, "deepseek"), want_q)


@pytest.mark.parametrize("profile", ["deepseek", "deepgemm"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2, I8])
def test_known_scales_of_any_size(profile: str, dtype: torch.dtype) -> None:
    extremes = (1e-44, 1e-39, 1e-30, 2.0**-60, 2.0**-61, 1e-7, 1.0, 3.7, 1e20, 2.0**100, 2.0**101, 3e38)
    scales = torch.tensor(extremes).unsqueeze(1)
    x = messy(len(extremes), 640, torch.float32)
    x[:, 320:] *= scales  # ordinary codes next to extreme ones
    assert_same_codes(
        static(x.cuda(), scales.cuda(), (1, -1), dtype, profile),
        numerics.quantize_static(x, scales, numerics.format_of((1, -1), dtype, profile)),
    )
    for scale in scales:
        one = scale.view(1, 1)
        want = numerics.quantize_static(x, one, numerics.format_of((-1, -1), dtype, profile))
        assert_same_codes(static(x.cuda(), one.cuda(), (-1, -1), dtype, profile), want)


def test_whole_rows_and_tensors_beyond_32_bit_offsets() -> None:
    rows, columns = 2**19 + 3, 4096 + 128
    x = torch.randn(64, columns, dtype=torch.bfloat16, device="cuda").repeat(rows // 64 + 1, 1)[:rows]
    x[-1, -1] = 1000.0
    q, scale = quantize(x, block=(1, -1), dtype=I8)
    want_q, want_scale = numerics.quantize(x[-67:], numerics.format_of((1, -1), I8))
    assert torch.equal(q[-67:], want_q) and torch.equal(scale[-67:], want_scale)
    q, scale = quantize(x, block=(-1, -1), dtype=I8)
    want_q, want_scale = numerics.quantize(x[-67:], numerics.format_of((-1, -1), I8))
    assert torch.equal(scale, want_scale) and torch.equal(q[-67:], want_q)
    assert torch.equal(static(x, scale, (-1, -1), I8, "deepseek"), q)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_neither_dynamic_nor_static_scales_block_the_host() -> None:
    x = torch.randn(300, 512, dtype=torch.bfloat16, device="cuda")
    first = quantize(x, block=(-1, -1))
    try:
        torch.cuda.set_sync_debug_mode("error")
        q, scale = quantize(x, block=(-1, -1))
        again = static(x, scale, (-1, -1), E4M3, "deepseek")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first[0].view(torch.uint8), q.view(torch.uint8)) and torch.equal(first[1], scale)
    assert torch.equal(again.view(torch.uint8), q.view(torch.uint8))
