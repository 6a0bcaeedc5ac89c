"""The operator `fused_sum_quantize` on a CPU: its definition's bits, its fake results, and what the kernel rejects."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.operators.fused_sum_quantize import FusedSumQuantize
from qcompiler import numerics
from qcompiler.dialects.terms import fused_sum_quantize
from qcompiler.ir.formats import FP8_TILE, INT8_ROW, Format

E4M3 = torch.float8_e4m3fn
NORM = "h = bf16(x0 + bf16(y0)); bf16(h * rsqrt(mean(h * h) + 1e-06) * x1)"


def arguments(format: Format, layout: str, shape: tuple[int, ...] = (2, 5, 300)) -> tuple[Any, ...]:
    torch.manual_seed(0)
    codes, scales = numerics.quantize(torch.randn(3, *shape), format)
    operands = [torch.randn(shape).bfloat16(), torch.randn(shape[-1])]
    return codes, scales, operands, NORM, ["h"], list(format.block), [1, 128], E4M3, "deepseek", layout


@pytest.mark.parametrize("format", [FP8_TILE, INT8_ROW])
@pytest.mark.parametrize("layout", ["row_major", "col_major"])
def test_the_bits_of_the_definition(format: Format, layout: str) -> None:
    given = arguments(format, layout)
    found = torch.ops.qcompiler.fused_sum_quantize(*given)
    codes, scales, operands = given[:3]
    wanted = fused_sum_quantize(
        codes, scales, *operands, expression=NORM, keep=["h"], term_format=format, format=FP8_TILE
    )
    assert len(found) == len(wanted) == 3
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype is want.dtype and torch.equal(got.float(), want.float())
    assert (found[1].stride(-1) == 1) == (layout == "row_major")
    with FakeTensorMode() as mode:
        moved = [mode.from_tensor(each) for each in (codes, scales, *operands)]
        for fake, real in zip(
            torch.ops.qcompiler.fused_sum_quantize(moved[0], moved[1], moved[2:], *given[3:]), found, strict=True
        ):
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_what_the_kernel_does_not_run() -> None:
    codes, scales, operands, *rest = arguments(FP8_TILE, "col_major")
    assert FusedSumQuantize(codes, scales, operands, *rest).why_not() is None
    other = FusedSumQuantize(codes, scales, [operands[0][0], operands[1]], *rest).why_not()
    assert other == "its operands have neither the shape of the sum nor one number for each column"
    wrong = FusedSumQuantize(codes, scales, [operands[0].double(), operands[1]], *rest).why_not()
    assert wrong == "its operands are not all bfloat16, float16 or float32 on one device"
    blocks = FusedSumQuantize(codes, scales, operands, *rest)._replace(term_block=[1, 100])
    assert blocks.why_not() == "its terms are quantized in [1, 100] blocks"
    assert blocks._replace(term_block=[1, 128], block=[128, 128]).why_not() == "it is quantized in [128, 128] blocks"
