"""The operator `fused_quantize`: quantization of rows computed by a fused expression from other tensors.

On a GPU one kernel does both. Problems that it does not support (see `why_not_fused`) are computed by torch's
operators, then quantized.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codegen.cpu.expressions import evaluate
from codegen.launching.launch import FLOATS, as_rows, on
from codegen.launching.replay import empty, replayed
from codegen.operators.operator import Operator, declare
from codegen.operators.quantize import check_layout, quantize_fake, quantize_on_cpu, quantize_on_gpu, scale_sizes
from codegen.targets.cuda import gpu_at
from codegen.templates.fused_quantize import (
    FUSED_QUANTIZE,
    FusedQuantizeOperands,
    FusedQuantizeProblem,
    RankSum,
    why_not_fused_quantize,
)
from qcompiler import numerics
from qcompiler.dialects.fused_expression import FusedExpression, parse


class FusedQuantize(NamedTuple):
    """The arguments of the operator."""

    operands: Sequence[Tensor]
    expression: str
    keep: Sequence[str]
    block: Sequence[int]
    dtype: torch.dtype
    profile: str
    scale_layout: str


def fused_quantize_on_gpu(*arguments: Any) -> list[Tensor]:
    """The meaning of `kernel.fused_quantize` on a CUDA device, with the scales in the given layout."""
    operands, expression, keep, block, *rest = arguments
    what = ("fused_quantize", expression, *keep, *block, *rest)
    return list(replayed(run_fused, what, operands, operands, expression, tuple(keep), block, *rest))


def why_not_fused(
    operands: Sequence[Tensor], made: FusedExpression, keep: Sequence[str], block: Sequence[int]
) -> str | None:
    """Why the kernel does not support it, in one sentence without a final period, or None if it does."""
    x = operands[0]
    if x.dim() == 0 or any(y.shape not in (x.shape, x.shape[-1:]) for y in operands):
        return "its operands are neither of one shape nor vectors of the last dimension"
    if any(y.dtype not in FLOATS or y.device != x.device for y in operands):
        return "its operands are not all bfloat16, float16 or float32 on one device"
    return why_not_fused_quantize(problem_of(operands, made, keep, block))


def run_fused(*arguments: Any, rank_sum: RankSum | None = None) -> tuple[Tensor, ...]:
    """Launches the kernel; for problems that it does not support, torch's operators, which sum over no ranks."""
    operands, expression, keep, block, dtype, profile, scale_layout = FusedQuantize(*arguments)
    made, x = parse(expression), operands[0]
    family = FUSED_QUANTIZE.family(gpu_at(x.device))
    check_layout(block, scale_layout)
    numerics.profile(profile)
    if dtype not in numerics.FORMAT_MAX or x.numel() == 0 or why_not_fused(operands, made, keep, block):
        result, *others = made.run({f"x{place}": y for place, y in enumerate(operands)}, keep)
        return (*quantize_on_gpu(result, block, dtype, profile, scale_layout, None), *others)
    q = empty(x.shape, dtype, x.device)
    sizes, strides = scale_sizes(x.shape, block[1], scale_layout)
    scale = empty(sizes, torch.float32, x.device, strides)
    residuals = [empty(x.shape, made.dtype(name), x.device) for name in keep]
    rows = [y.contiguous() if y.dim() == 1 else as_rows(y) for y in operands]
    with on(x.device):
        config = family.choose(problem_of(operands, made, keep, block))
        given = FusedQuantizeOperands(expression, tuple(keep), rows, residuals, q, scale, profile, None, rank_sum)
        family.launch(config, given)
    return q, scale, *residuals


def problem_of(
    operands: Sequence[Tensor], made: FusedExpression, keep: Sequence[str], block: Sequence[int]
) -> FusedQuantizeProblem:
    """The problem of the kernel."""
    x, widest = operands[0], max(y.element_size() for y in operands)
    m, k = x.shape[:-1].numel(), x.shape[-1]
    return FusedQuantizeProblem(m, k, (block[0], block[1]), made.across, len(operands), widest, len(keep))


def fused_quantize_on_cpu(*arguments: Any) -> list[Tensor]:
    """The same on the CPU."""
    operands, expression, keep, block, dtype, profile, scale_layout = FusedQuantize(*arguments)
    check_layout(block, scale_layout)
    result, *residuals = evaluate(expression, {f"x{place}": y for place, y in enumerate(operands)}, keep)
    return [*quantize_on_cpu(result, block, dtype, profile, scale_layout), *residuals]


def fused_quantize_fake(*arguments: Any) -> list[Tensor]:
    """The results without data."""
    operands, expression, keep, block, dtype, profile, scale_layout = FusedQuantize(*arguments)
    made, x = parse(expression), operands[0]
    codes = quantize_fake(x, block, dtype, profile, scale_layout)
    return [*codes, *(x.new_empty(x.shape, dtype=made.dtype(name)) for name in keep)]


FUSED_QUANTIZE_SCHEMA = (
    "fused_quantize(Tensor[] operands, str expression, str[] keep, int[] block, ScalarType dtype, str profile, "
    "str scale_layout) -> Tensor[]"
)
declare(Operator(FUSED_QUANTIZE_SCHEMA, fused_quantize_on_cpu, fused_quantize_on_gpu, fused_quantize_fake))
