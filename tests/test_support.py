"""Which products the GPU kernels say that they run, and the sentence for each of the others."""

import subprocess
import sys
from itertools import product

import pytest
import torch

from codegen.support import is_tiled, why_not

E4M3, E5M2, I8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
ROWS = [(1, -1), (-1, -1)]


@pytest.mark.parametrize("x_block", [*((1, b) for b in (32, 64, 128, 256, 512)), *ROWS])
def test_tiles_and_whole_rows_beside_weight_blocks(x_block: tuple[int, int]) -> None:
    assert why_not(x_block, (128, 128), E4M3, E4M3) is None
    assert why_not(list(x_block), [128, 128], E4M3, E4M3) is None
    assert is_tiled((128, 128)) and not is_tiled((1, -1))


@pytest.mark.parametrize(("x_block", "w_block", "dtype"), list(product(ROWS, ROWS, [E4M3, I8])))
def test_whole_rows_of_both_operands(x_block: tuple[int, int], w_block: tuple[int, int], dtype: torch.dtype) -> None:
    assert why_not(x_block, w_block, dtype, dtype) is None


@pytest.mark.parametrize(
    ("x_block", "w_block", "x_dtype", "w_dtype", "sentence"),
    [
        ((-1, 1), (1, -1), I8, I8, "varies along K, inside the accumulation, where no tensor core can apply it; use S"),
        ((1, 1), (128, 128), E4M3, E4M3, "the scale of an activation in [1, 1] blocks varies along K"),
        ((1, -1), (-1, 1), E4M3, E4M3, "the scale of a weight in [-1, 1] blocks varies along K"),
        ((1, 128), (128, 128), I8, I8, "INT8 sums are scaled once, at their end, so x and w need [1, -1] or [-1, -1]"),
        ((1, -1), (128, 128), I8, I8, "here they have [1, -1] and [128, 128]"),
        ((1, -1), (1, -1), E5M2, E5M2, "the kernels multiply float8_e4m3fn or int8, not float8_e5m2"),
        ((1, -1), (1, -1), E4M3, I8, "both operands in one format, here x is float8_e4m3fn and w is int8"),
        ((1, 128), (1, -1), E4M3, E4M3, "beside a weight in [1, -1] blocks x needs [1, -1] or [-1, -1], not [1, 128]"),
        ((2, 128), (128, 128), E4M3, E4M3, "x needs [1, b] with b in 32, 64, 128, 256, 512, or [1, -1] or [-1, -1]"),
        ((1, 48), (128, 128), E4M3, E4M3, "not [1, 48]"),
        ((1, 128), (64, 64), E4M3, E4M3, "a weight needs [128, 128], [1, -1] or [-1, -1], not [64, 64]"),
    ],
)  # fmt: skip
def test_each_refusal_is_a_sentence(
    x_block: tuple[int, int], w_block: tuple[int, int], x_dtype: torch.dtype, w_dtype: torch.dtype, sentence: str
) -> None:
    why = why_not(x_block, w_block, x_dtype, w_dtype)
    assert why is not None and sentence in why and not why.endswith(".")


def test_the_question_needs_no_triton() -> None:
    code = "import sys; import codegen.support; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
