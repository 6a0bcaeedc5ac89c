"""Compiles the kernels of `codegen.templates.inboxes` without a GPU."""

import torch

from codegen.machine_code import MachineCode
from codegen.targets.hopper import HOPPER
from codegen.templates.inboxes import (
    OPEN_INBOXES,
    SUM_INBOX,
    OpenOperands,
    OpenProblem,
    SumOperands,
    SumProblem,
    Ways,
)

MULTIPROCESSORS = 132


def _ways(ranks: int) -> Ways:
    numbers = torch.empty(ranks, dtype=torch.int64, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    return Ways(*numbers, 0, 600 * 10**9)


def compile_open(ranks: int) -> MachineCode:
    family = OPEN_INBOXES.family(HOPPER)
    (call,) = family.calls(family.choose(OpenProblem(ranks)), OpenOperands(_ways(ranks), 1))
    return HOPPER.compile(call)


def compile_sum(ranks: int, rows: int, columns: int, stored: int | None = None) -> MachineCode:
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")
    family = SUM_INBOX.family(HOPPER)
    operands = SumOperands(out, _ways(ranks), 1, 1 << 26, out.nbytes, (rows if stored is None else stored) * columns)
    (call,) = family.calls(family.choose(SumProblem(out.nbytes, MULTIPROCESSORS)), operands)
    return HOPPER.compile(call)
