"""The operator `pointwise`: on a GPU one generated kernel for all results; elsewhere `kernel.pointwise`."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from codegen.launching.launch import on
from codegen.launching.replay import empty, replayed
from codegen.operators.operator import Operator, declare
from codegen.targets.cuda import gpu_at
from codegen.templates.pointwise import POINTWISE, PointwiseOperands, PointwiseProblem
from qcompiler.dialects.fused_expression import parse
from qcompiler.dialects.pointwise import pointwise, shape_of


def pointwise_on_gpu(operands: Sequence[Tensor], expressions: Sequence[str], shapes: Sequence[str]) -> list[Tensor]:
    """The meaning of `kernel.pointwise` on a CUDA device."""
    what = ("pointwise", *expressions, *shapes)
    return list(replayed(_run, what, operands, operands, tuple(expressions), tuple(shapes)))


def _run(operands: Sequence[Tensor], expressions: tuple[str, ...], shapes: tuple[str, ...]) -> tuple[Tensor, ...]:
    device = operands[0].device
    sizes = [shape_of(shape, operands) for shape in shapes]
    out = [empty(size, parse(text).dtype(), device) for size, text in zip(sizes, expressions, strict=True)]
    elements = sum(map(prod, sizes))
    if elements:
        family = POINTWISE.family(gpu_at(device))
        with on(device):
            config = family.choose(PointwiseProblem(elements, len(operands)))
            family.launch(config, PointwiseOperands(expressions, shapes, operands, out))
    return tuple(out)


def _on_cpu(operands: Sequence[Tensor], expressions: Sequence[str], shapes: Sequence[str]) -> list[Tensor]:
    return [*pointwise(*operands, expressions=expressions, shapes=shapes)]


def _fake(operands: Sequence[Tensor], expressions: Sequence[str], shapes: Sequence[str]) -> list[Tensor]:
    made: list[Any] = [
        (shape_of(shape, operands), parse(text)) for text, shape in zip(expressions, shapes, strict=True)
    ]
    return [torch.empty(shape, dtype=each.dtype(), device=operands[0].device) for shape, each in made]


POINTWISE_SCHEMA = "pointwise(Tensor[] operands, str[] expressions, str[] shapes) -> Tensor[]"
declare(Operator(POINTWISE_SCHEMA, _on_cpu, pointwise_on_gpu, _fake))
