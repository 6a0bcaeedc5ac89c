"""The operator `fused_reduce_quantize`: as `fused_quantize`, with an operand that is first summed over ranks.

GPUs of one host add a small sum in the kernel that reads it (see `codegen.kernels.peers`): each program exchanges its
tile with the others. Elsewhere, a collective comes first.

The memory that the kernel writes belongs to the process's communicator and is not an argument, so the schema declares a
function of tensors. What torch.compile does with it is the same on all ranks, because they run the same program.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from codegen.launching.replay import replayed, state
from codegen.operators.fused_quantize import (
    fused_quantize_fake,
    fused_quantize_on_cpu,
    fused_quantize_on_gpu,
    problem_of,
    run_fused,
    why_not_fused,
)
from codegen.operators.operator import Operator, declare
from codegen.targets.cuda import gpu_at
from codegen.templates.fused_quantize import FUSED_QUANTIZE, RankSum
from codegen.templates.peers import PROGRAMS, REGION_BYTES
from codegen.templates.template import ceil_div
from qcompiler import numerics
from qcompiler.dialects.coll_fused import reduced
from qcompiler.dialects.fused_expression import parse
from qcompiler.distributed.communicator import current

Kind = tuple[torch.Size, torch.dtype, torch.device]
"""The shape, the element type and the device of an operand."""

SHAPES = 1024
"""Number of problems for which it is remembered whether the kernel supports them."""


def _on_gpu(operands: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    *rest, mesh, summed = arguments
    expression, keep, block, dtype, *_ = rest
    peers = current().peers(operands[summed], mesh)
    kinds = tuple((y.shape, y.dtype, y.device) for y in operands)
    if peers is None or not _fits(kinds, summed, expression, tuple(keep), tuple(block), dtype):
        whole = reduced(operands, summed, mesh) if state.planner is None else operands  # a warm-up sends nothing
        return fused_quantize_on_gpu(whole, *rest)
    what = ("fused_reduce_quantize", peers.rank, peers.patience, summed, expression, *keep, *block, *rest[3:])
    found = RankSum(summed, peers.memories, peers.steps, peers.rank, peers.patience)
    tensors = (*operands, peers.memories, peers.steps)
    return list(
        replayed(partial(run_fused, rank_sum=found), what, tensors, operands, expression, tuple(keep), *rest[2:])
    )


@lru_cache(maxsize=SHAPES)
def _fits(
    kinds: tuple[Kind, ...],
    summed: int,
    expression: str,
    keep: tuple[str, ...],
    block: tuple[int, ...],
    dtype: torch.dtype,
) -> bool:
    """Whether the kernel supports operands of these kinds, and its tiles fit into the memory that ranks share."""
    made, device = parse(expression), kinds[summed][2]
    operands = [torch.empty(shape, dtype=held, device="meta") for shape, held, _ in kinds]
    together = all(where == device for *_, where in kinds)
    if not together or dtype not in numerics.FORMAT_MAX or why_not_fused(operands, made, keep, block):
        return False
    problem = problem_of(operands, made, keep, block)
    config = FUSED_QUANTIZE.family(gpu_at(device)).choose(problem)
    programs = ceil_div(problem.m, config.block_m) * ceil_div(problem.k, config.block_k)
    return programs <= PROGRAMS and config.block_m * config.block_k * operands[summed].element_size() <= REGION_BYTES


def _on_cpu(operands: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    *rest, mesh, summed = arguments
    return fused_quantize_on_cpu(reduced(operands, summed, mesh), *rest)


def _fake(*arguments: Any) -> list[Tensor]:
    return fused_quantize_fake(*arguments[:-2])


FUSED_REDUCE_QUANTIZE_SCHEMA = (
    "fused_reduce_quantize(Tensor[] operands, str expression, str[] keep, int[] block, ScalarType dtype, str profile, "
    "str scale_layout, str mesh, int summed) -> Tensor[]"
)
declare(Operator(FUSED_REDUCE_QUANTIZE_SCHEMA, _on_cpu, _on_gpu, _fake, runs="coll.fused_reduce_quantize"))
