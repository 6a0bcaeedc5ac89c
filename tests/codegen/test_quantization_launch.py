"""Launches of the quantization kernels: arguments and constants in the kernels' order."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from codegen.launching.launch import KernelCall
from codegen.operators.quantize import scale_like
from codegen.targets.hopper import HOPPER
from codegen.templates.quantize import LONGEST_ROW, QUANTIZE, QuantizeOperands, QuantizeProblem

E4M3 = torch.float8_e4m3fn
BLOCKS = {"tiles": (1, 64), "tokens": (1, -1), "tensor": (-1, -1), "known": (1, 64)}
kinds = pytest.mark.parametrize("kind", BLOCKS)


def calls(kind: str, x: Tensor) -> Sequence[KernelCall]:
    q, block = torch.empty(x.shape, dtype=E4M3), BLOCKS[kind]
    scale = torch.empty(1, 1) if kind == "tensor" else scale_like(x, block[1], "col_major")
    config = QUANTIZE.family(HOPPER).choose(QuantizeProblem(x.shape[0], x.shape[1], block, kind == "known"))
    return QUANTIZE.family(HOPPER).calls(config, QuantizeOperands(x, q, scale, block))


@kinds
@pytest.mark.parametrize("rows", [8, 2000])
def test_constants_come_last_and_in_order(kind: str, rows: int) -> None:
    launched = calls(kind, torch.zeros(rows, 256))
    assert len(launched) == (3 if kind == "tensor" else 1)
    for kernel, programs, arguments, constants, options in launched:
        assert kernel.arg_names == [*kernel.arg_names[: len(arguments)], *constants]
        tensors = [name for name, each in zip(kernel.arg_names, arguments, strict=False) if isinstance(each, Tensor)]
        assert tensors == [name for name in ("x", "partial", "q", "scale") if name in kernel.arg_names]
        assert programs >= 1 and options.keys() - {"launch_pdl"} == {"num_warps"}


@kinds
def test_compiled_kernels_do_not_depend_on_the_number_of_rows(kind: str) -> None:
    keys = [[call.key() for call in calls(kind, torch.zeros(rows, 256))] for rows in (600, 601, 1000)]
    assert keys[0] == keys[1] == keys[2]


@kinds
def test_compiled_kernels_depend_on_depth_and_stride(kind: str) -> None:
    matrices = (torch.zeros(8, 256), torch.zeros(8, 192), torch.zeros(8, 300)[:, :256], torch.zeros(8, 2 * LONGEST_ROW))
    assert len({calls(kind, x)[0].key() for x in matrices}) == 4
