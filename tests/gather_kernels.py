"""The kernel that gathers rows of codes: launched under the interpreter, or compiled for Hopper without a GPU."""

import torch
from torch import Tensor

from codegen.machine_code import MachineCode
from codegen.operators.quantize import scale_sizes
from codegen.targets.hopper import HOPPER
from codegen.templates.gather_codes import GATHER_CODES, GatherCodesOperands, GatherCodesProblem


def gather_operands(data: Tensor, scale: Tensor, rows: Tensor, block_k: int = 128) -> GatherCodesOperands:
    """The operands, with new results and column-major scales."""
    q = torch.empty(len(rows), data.shape[1], dtype=data.dtype, device=data.device)
    sizes, strides = scale_sizes(q.shape, block_k, "col_major")
    assert strides is not None
    return GatherCodesOperands(data, scale, rows, q, torch.empty_strided(sizes, strides, device=data.device))


def launch_gather_codes(data: Tensor, scale: Tensor, rows: Tensor, block_k: int = 128) -> tuple[Tensor, Tensor]:
    family, operands = GATHER_CODES.family(HOPPER), gather_operands(data, scale, rows, block_k)
    family.launch(family.choose(GatherCodesProblem(*operands.q.shape)), operands)
    return operands.q, operands.out_scale


def compile_gather_codes(tokens: int, experts: int, k: int, block_k: int = 128) -> MachineCode:
    data = torch.empty(tokens, k, dtype=torch.float8_e4m3fn, device="meta")
    sizes, strides = scale_sizes(data.shape, block_k, "col_major")
    assert strides is not None
    rows = torch.empty(tokens * experts, dtype=torch.int64, device="meta")
    operands = gather_operands(data, torch.empty_strided(sizes, strides, device="meta"), rows, block_k)
    family = GATHER_CODES.family(HOPPER)
    (call,) = family.calls(family.choose(GatherCodesProblem(*operands.q.shape)), operands)
    return HOPPER.compile(call)
