"""GEMMs that the GPU kernels report as supported, and the error message for each other one."""

import subprocess
import sys
from itertools import product

import pytest

from codegen.support import is_tiled, why_not
from qcompiler.ir import DType, Format
from qcompiler.ir.formats import FP8_BLOCK

E4M3, E5M2, I8 = DType.f8e4m3fn, DType.f8e5m2, DType.i8
ROWS = [(1, -1), (-1, -1)]


@pytest.mark.parametrize("x_block", [*((1, b) for b in (32, 64, 128, 256, 512)), *ROWS])
def test_tiles_and_whole_rows_beside_weight_blocks(x_block: tuple[int, int]) -> None:
    assert why_not(Format(E4M3, x_block), FP8_BLOCK) is None
    assert is_tiled((128, 128)) and not is_tiled((1, -1))


@pytest.mark.parametrize(("x_block", "w_block", "dtype"), list(product(ROWS, ROWS, [E4M3, I8])))
def test_whole_rows_of_both_operands(x_block: tuple[int, int], w_block: tuple[int, int], dtype: DType) -> None:
    assert why_not(Format(dtype, x_block), Format(dtype, w_block)) is None


@pytest.mark.parametrize(
    ("x_block", "w_block", "x_dtype", "w_dtype", "sentence"),
    [
        ((-1, 1), (1, -1), I8, I8, "varies along K, inside the accumulation, where no tensor core can apply it; use S"),
        ((1, 1), (128, 128), E4M3, E4M3, "the scale of an activation in [1, 1] blocks varies along K"),
        ((1, -1), (-1, 1), E4M3, E4M3, "the scale of a weight in [-1, 1] blocks varies along K"),
        ((1, 128), (128, 128), I8, I8, "INT8 sums are scaled once, at their end, so x and w need [1, -1] or [-1, -1]"),
        ((1, -1), (128, 128), I8, I8, "here they have [1, -1] and [128, 128]"),
        ((1, -1), (1, -1), E5M2, E5M2, "the kernels multiply f8e4m3fn or i8, not f8e5m2"),
        ((1, -1), (1, -1), E4M3, I8, "both operands in one format, here x is f8e4m3fn and w is i8"),
        ((1, 128), (1, -1), E4M3, E4M3, "with a weight in [1, -1] blocks, x needs [1, -1] or [-1, -1], not [1, 128]"),
        ((2, 128), (128, 128), E4M3, E4M3, "x needs [1, b] with b in 32, 64, 128, 256, 512, or [1, -1] or [-1, -1]"),
        ((1, 48), (128, 128), E4M3, E4M3, "not [1, 48]"),
        ((1, 16), (1, 16), DType.f4e2m1fn, DType.f4e2m1fn, "the kernels multiply f8e4m3fn or i8, not f4e2m1fn"),
        ((1, 128), (64, 64), E4M3, E4M3, "a weight needs [128, 128], [1, -1] or [-1, -1], not [64, 64]"),
    ],
)
def test_each_refusal_is_a_sentence(
    x_block: tuple[int, int], w_block: tuple[int, int], x_dtype: DType, w_dtype: DType, sentence: str
) -> None:
    why = why_not(Format(x_dtype, x_block), Format(w_dtype, w_block))
    assert why is not None and sentence in why and not why.endswith(".")


def test_the_query_does_not_import_triton() -> None:
    code = "import sys; import codegen.support; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
