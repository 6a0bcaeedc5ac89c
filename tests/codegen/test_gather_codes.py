"""The operator and kernel `gather_codes`: on a CPU, on meta tensors, and compiled for Hopper without a GPU."""

import pytest
import torch
from gather_kernels import compile_gather_codes
from torch import Tensor

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.operators.quantize import SCALE_LAYOUTS, scale_like
from qcompiler import numerics
from qcompiler.dialects.gather import gather_codes
from qcompiler.errors import CodegenError
from qcompiler.ir import Format
from qcompiler.ir.formats import FP8_TILE, INT8_ROW

ROWS = torch.tensor([4, 0, 4, -1, 2, 3, 1])


def bits(x: Tensor) -> Tensor:
    return x.flatten().view(torch.int8)


def gather(
    data: Tensor, scale: Tensor, rows: Tensor, block: tuple[int, int], layout: str = "col_major"
) -> tuple[Tensor, Tensor]:
    made: tuple[Tensor, Tensor] = torch.ops.qcompiler.gather_codes(data, scale, rows, list(block), layout)
    return made


@pytest.mark.parametrize("format", [FP8_TILE, INT8_ROW])
@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_codes_of_gathered_rows_are_gathered_codes(format: Format, layout: str) -> None:
    x = torch.randn(5, 300).bfloat16()
    data, scale = numerics.quantize(x, format)
    want = numerics.quantize(x[ROWS], format)
    got = gather(data, scale_like(x, format.block[1], "col_major").copy_(scale), ROWS, format.block, layout)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and torch.equal(bits(one), bits(other))
    assert got[1].stride() == scale_like(x[ROWS], format.block[1], layout).stride()
    meta = gather(data.to("meta"), scale.to("meta"), ROWS.to("meta"), format.block, layout)
    assert [(each.shape, each.dtype, each.stride()) for each in meta] == [
        (each.shape, each.dtype, each.stride()) for each in got
    ]
    for one, other in zip(gather_codes(data, scale, ROWS, format=format), want, strict=True):
        assert torch.equal(bits(one), bits(other))


def test_operands_that_do_not_fit() -> None:
    data, scale = numerics.quantize(torch.randn(5, 256), FP8_TILE)
    why = "the operands of a gather of codes do not fit"
    for wrong in (
        (data, scale[:4], ROWS, (1, 128)),
        (data, scale.double(), ROWS, (1, 128)),
        (data.float(), scale, ROWS, (1, 128)),
        (data, scale, ROWS.float(), (1, 128)),
        (data, scale, ROWS.view(1, -1), (1, 128)),
        (data.view(5, 2, 128), scale, ROWS, (1, 128)),
    ):
        with pytest.raises(CodegenError, match=why):
            gather(*wrong)
    with pytest.raises(CodegenError, match=why):
        gather(data, scale, ROWS, (128, 128), "row_major")
    with pytest.raises(CodegenError, match="unknown scale layout"):
        gather(data, scale, ROWS, (1, 128), "cool_major")


@pytest.mark.parametrize(("tokens", "experts", "k"), [(4096, 8, 2048), (4096, 2, 4096), (64, 8, 2048), (3, 4, 7168)])
def test_the_kernel_moves_16_bytes_at_once(tokens: int, experts: int, k: int) -> None:
    code = compile_gather_codes(tokens, experts, k)
    assert (code.local_loads, code.local_stores) == (0, 0)
    assert code.wide_loads == code.wide_stores == (8 if tokens == 4096 else 1)
    assert code.registers <= 128
    assert "ACQBULK" in code.sass and "PREEXIT" in code.sass, "it overlaps with other kernels"
    assert "PREEXIT" not in compile_gather_codes(tokens, experts, k, block_k=-1).sass, (
        "scales of rows may be a weight's"
    )
