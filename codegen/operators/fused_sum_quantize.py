"""The operator `fused_sum_quantize`: as `fused_quantize`, of a sum of quantized terms and other tensors.

On a GPU one kernel does all of it. Problems that it does not support are computed by torch's operators.
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
from codegen.support import TILE_COLUMNS
from codegen.targets.cuda import gpu_at
from codegen.templates.fused_quantize import (
    FUSED_QUANTIZE,
    FusedQuantizeOperands,
    FusedQuantizeProblem,
    Terms,
    why_not_fused_quantize,
)
from qcompiler import numerics
from qcompiler.dialects.fused_expression import parse
from qcompiler.dialects.terms import sum_terms
from qcompiler.numerics import ALL


class FusedSumQuantize(NamedTuple):
    """The arguments of the operator."""

    terms: Tensor
    term_scale: Tensor
    operands: Sequence[Tensor]
    expression: str
    keep: Sequence[str]
    term_block: Sequence[int]
    block: Sequence[int]
    dtype: torch.dtype
    profile: str
    scale_layout: str

    @property
    def named(self) -> dict[str, Tensor]:
        """The operands of the expression, with the sum of the terms."""
        format = numerics.format_of((self.term_block[0], self.term_block[1]), self.terms.dtype)
        total = sum_terms(self.terms, self.term_scale, format=format, out_dtype=torch.float32)
        return {"y0": total} | {f"x{place}": x for place, x in enumerate(self.operands)}

    @property
    def problem(self) -> FusedQuantizeProblem:
        """The problem of the kernel."""
        _, *rows, k = self.terms.shape
        whole, block = parse(self.expression).across, (self.block[0], self.block[1])
        return FusedQuantizeProblem(torch.Size(rows).numel(), k, block, whole, len(self.operands), 4, len(self.keep))

    def why_not(self) -> str | None:
        """Why the kernel does not support it, in one sentence without a final period, or None if it does."""
        shape, device = self.terms.shape[1:], self.terms.device
        if any(x.shape not in (shape, shape[-1:]) for x in self.operands):
            return "its operands have neither the shape of the sum nor one number for each column"
        if any(x.dtype not in FLOATS or x.device != device for x in self.operands):
            return "its operands are not all bfloat16, float16 or float32 on one device"
        if self.term_block[0] != 1 or self.term_block[1] not in (ALL, *TILE_COLUMNS):
            return f"its terms are quantized in {list(self.term_block)} blocks"
        return why_not_fused_quantize(self.problem)


def _on_gpu(*arguments: Any) -> list[Tensor]:
    terms, term_scale, operands, expression, keep, term_block, block, *rest = arguments
    what = ("fused_sum_quantize", expression, *keep, *term_block, *block, *rest)
    tensors = (terms, term_scale, *operands)
    return list(replayed(_run, what, tensors, *arguments[:3], expression, tuple(keep), *arguments[5:]))


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    given = FusedSumQuantize(*arguments)
    made, shape, device = parse(given.expression), given.terms.shape[1:], given.terms.device
    family = FUSED_QUANTIZE.family(gpu_at(device))
    check_layout(given.block, given.scale_layout)
    numerics.profile(given.profile)
    if given.dtype not in numerics.FORMAT_MAX or given.terms.numel() == 0 or given.why_not():
        result, *others = made.run(given.named, given.keep)
        codes = quantize_on_gpu(result, given.block, given.dtype, given.profile, given.scale_layout, None)
        return (*codes, *others)
    q = empty(shape, given.dtype, device)
    sizes, strides = scale_sizes(shape, given.block[1], given.scale_layout)
    scale = empty(sizes, torch.float32, device, strides)
    residuals = [empty(shape, made.dtype(name), device) for name in given.keep]
    rows = [x.contiguous() if x.dim() == 1 else as_rows(x) for x in given.operands]
    terms = Terms(given.terms.contiguous(), given.term_scale.contiguous(), given.term_block[1])
    operands = FusedQuantizeOperands(
        given.expression, tuple(given.keep), rows, residuals, q, scale, given.profile, terms
    )  # fmt: skip
    with on(device):
        family.launch(family.choose(given.problem), operands)
    return q, scale, *residuals


def _on_cpu(*arguments: Any) -> list[Tensor]:
    given = FusedSumQuantize(*arguments)
    check_layout(given.block, given.scale_layout)
    result, *residuals = evaluate(given.expression, given.named, given.keep)
    return [*quantize_on_cpu(result, given.block, given.dtype, given.profile, given.scale_layout), *residuals]


def _fake(*arguments: Any) -> list[Tensor]:
    given = FusedSumQuantize(*arguments)
    made, shape = parse(given.expression), given.terms.shape[1:]
    like = given.terms.new_empty(shape, dtype=torch.float32)
    codes = quantize_fake(like, given.block, given.dtype, given.profile, given.scale_layout)
    return [*codes, *(like.new_empty(shape, dtype=made.dtype(name)) for name in given.keep)]


FUSED_SUM_QUANTIZE_SCHEMA = (
    "fused_sum_quantize(Tensor terms, Tensor term_scale, Tensor[] operands, str expression, str[] keep, "
    "int[] term_block, int[] block, ScalarType dtype, str profile, str scale_layout) -> Tensor[]"
)
declare(Operator(FUSED_SUM_QUANTIZE_SCHEMA, _on_cpu, _on_gpu, _fake))
