"""The operator `fused_append`: on a GPU one generated kernel, which also quantizes; elsewhere `state.fused_append`."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from codegen.launching.launch import on
from codegen.launching.replay import empty, replayed
from codegen.operators.cache_operands import cache_tensors, check_rows
from codegen.operators.operator import Operator, declare
from codegen.targets.cuda import gpu_at
from codegen.templates.pointwise import POINTWISE, Appended, PointwiseOperands, PointwiseProblem
from qcompiler.dialects import fused_append
from qcompiler.dialects.cache_positions import check_call
from qcompiler.dialects.fused_expression import parse
from qcompiler.dialects.pointwise import shape_of


def fused_append_on_gpu(
    cache: Sequence[Tensor], slots: Tensor, lengths: Tensor, operands: Sequence[Tensor], expressions: Sequence[str],
    shapes: Sequence[str], capacity: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """Computes keys, values and others; writes keys and values as `append_to_cache` does, and returns the others.

    Args:
        cache: As for `append_to_cache`; also `slots` and `lengths`.
        operands: In a floating dtype, any strides.
        expressions: Of keys `[batch, heads, tokens, size]`, values `[batch, heads, tokens, value size]`, and others.
        shapes: As in `kernel.pointwise`.
        capacity: As for `append_to_cache`.

    Raises:
        CodegenError: The keys do not fit the cache, or the GPU has no FP8.
        InputError: A row has more tokens than the ring of a cache.
    """
    what = ("fused_append", len(cache), capacity, *expressions, *shapes)
    given = (*cache, slots, lengths, *operands)
    rest = tuple(expressions), tuple(shapes), capacity
    return list(replayed(_run, what, given, cache, slots, lengths, operands, *rest))


def _run(
    cache: Sequence[Tensor], slots: Tensor, lengths: Tensor, operands: Sequence[Tensor], expressions: tuple[str, ...],
    shapes: tuple[str, ...], capacity: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    device, tensors = operands[0].device, cache_tensors(cache)
    sizes = [shape_of(shape, operands) for shape in shapes]
    made = [parse(text) for text in expressions]
    heads = tensors.key.shape[1]
    for size, each, stored in zip(sizes, made, tensors[:2], strict=False):
        check_rows(torch.empty(size, dtype=each.dtype(), device="meta"), heads, stored.shape[3], slots, lengths)
    check_call(tensors.key.shape[2], sizes[0][2], capacity)
    out = [empty(size, each.dtype(), device) for size, each in zip(sizes[2:], made[2:], strict=True)]
    elements = sum(map(prod, sizes))
    if elements:
        family = POINTWISE.family(gpu_at(device))
        appended = Appended(tensors, slots, lengths, capacity)
        with on(device):
            config = family.choose(PointwiseProblem(elements, len(operands)))
            family.launch(config, PointwiseOperands(expressions, shapes, operands, out, appended))
    return tuple(out)


def _on_cpu(
    cache: Sequence[Tensor], slots: Tensor, lengths: Tensor, operands: Sequence[Tensor], expressions: Sequence[str],
    shapes: Sequence[str], capacity: int | None = None,
) -> list[Tensor]:  # fmt: skip
    made = fused_append.fused_append(
        cache, slots, lengths, *operands, expressions=expressions, shapes=shapes, capacity=capacity
    )
    return [*made]


def _fake(
    cache: Sequence[Tensor], slots: Tensor, lengths: Tensor, operands: Sequence[Tensor], expressions: Sequence[str],
    shapes: Sequence[str], capacity: int | None = None,
) -> list[Tensor]:  # fmt: skip
    pairs = zip(expressions[2:], shapes[2:], strict=True)
    device = operands[0].device
    return [torch.empty(shape_of(shape, operands), dtype=parse(text).dtype(), device=device) for text, shape in pairs]


FUSED_APPEND_SCHEMA = (
    "fused_append(Tensor(a!)[] cache, Tensor slots, Tensor lengths, Tensor[] operands, str[] expressions, "
    "str[] shapes, int? capacity=None) -> Tensor[]"
)
declare(Operator(FUSED_APPEND_SCHEMA, _on_cpu, fused_append_on_gpu, _fake, runs="state.fused_append"))
