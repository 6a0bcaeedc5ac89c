"""Converts quantized weights between checkpoint files, one per matrix, and stacked weights of a model.

    experts.0.gate_proj.weight [I, K], experts.0.up_proj.weight [I, K], ...    <->    experts.gate_up_proj [E, 2 I, K]

Codes, scales and row numbers all go through transformers' own conversion; row numbers show where a part begins. If a
part begins inside a block, blocks are split into smaller ones that share a scale, which is exact.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qcompiler.checkpoints.conversion import Plan, check_exact, is_converted, operations_on, plans, to_files
from qcompiler.checkpoints.quantized_weight import QuantizedWeight
from qcompiler.errors import QCompilerError
from qcompiler.ir import Format
from qcompiler.numerics import ALL, scale_shape

TRANSPOSE = "Transpose"
USUAL = (128, 128)
"""Block sizes of the grouped kernels."""


@dataclass(frozen=True)
class Part:
    """A quantized weight under its name in the model.

    Attributes:
        codes: `[N, K]`, or `[E, N, K]`.
        scale: In the shape of `numerics.scale_shape`.
        format: The format of codes and scales, whose blocks may be smaller than in the files.
        sources: Names in the files.
        whole: Whether the files have one scale per matrix of a stack, repeated here for each of its blocks.
    """

    codes: Tensor
    scale: Tensor
    format: Format
    sources: tuple[str, ...]
    whole: bool = False


def stacked(
    model: nn.Module,
    weights: Iterable[str],
    codes: Callable[[str], Tensor],
    scales: Callable[[str], Tensor],
    format: Format,
) -> dict[str, Part]:
    """Converts quantized weights of the files, all in one format, to weights of the model.

    Args:
        model: A transformers model, or any other.
        weights: Names of weights in the files.
        codes: Returns the codes of a weight.
        scales: Returns the scales of a weight, in the shape of `numerics.scale_shape`.
        format: The format of codes and scales.

    Raises:
        QCompilerError: The model stores the elements in another order.
    """
    found: dict[str, Part] = {}
    for plan in plans(model, weights):
        names = [name for name, _ in plan.sources]
        parts, scale = {name: codes(name) for name in names}, {name: scales(name) for name in names}
        if plan.operations == (TRANSPOSE,):
            found |= _turned(model, plan, parts[names[0]], scale[names[0]], format)
            continue
        check_exact(plan.operations, plan.target)
        if len(names) == 1 and not plan.operations:
            made = plan.convert(model, parts)
            found |= {name: Part(tensor, scale[names[0]], format, (names[0],)) for name, tensor in made.items()}
        else:
            found |= _joined(model, plan, parts, scale, format)
    return {name: _for_grouped_kernels(part) for name, part in found.items()}


def _for_grouped_kernels(part: Part) -> Part:
    """Repeats per-matrix scales of a stack for the blocks of the grouped kernels, if those fit; exact."""
    rows, columns = part.format.block
    if part.codes.dim() != 3 or columns != ALL or rows == 1:
        return part
    size = part.codes.shape[-2]
    rows = size if rows == ALL else rows
    if rows % USUAL[0] and rows != size:
        return part
    groups, down, across = scale_shape(part.codes.shape, USUAL)
    tall = part.scale.expand(groups, -1, -1).repeat_interleave(-(-rows // USUAL[0]), -2)
    return replace(
        part, scale=tall.expand(groups, down, across).contiguous(), format=part.format.with_block(USUAL), whole=True
    )


def _joined(
    model: nn.Module, plan: Plan, codes: dict[str, Tensor], scale: dict[str, Tensor], format: Format
) -> dict[str, Part]:
    """The results of one conversion, in blocks that do not cross from one part into the next."""
    places = plan.convert(model, {name: _row_numbers(part) for name, part in codes.items()})
    block, sizes = format.block, {part.shape[-2] for part in codes.values()}
    rows = math.gcd(*(sizes if block[0] == ALL else (block[0],)), *(_starts(place) for place in places.values()))
    finer = {name: _refined(scale[name], part.shape[-2], block[0], rows) for name, part in codes.items()}
    made, scales = plan.convert(model, codes), plan.convert(model, finer)
    smaller = (rows, block[1])
    for name, tensor in made.items():
        if list(scales[name].shape) != scale_shape(tensor.shape, smaller):
            raise _shared(
                name,
                block,
                f"scales {list(scales[name].shape)} for {list(tensor.shape)}",
                scale_shape(tensor.shape, smaller),
            )
    return {name: Part(tensor, scales[name], format.with_block(smaller), tuple(codes)) for name, tensor in made.items()}


def _turned(model: nn.Module, plan: Plan, codes: Tensor, scale: Tensor, format: Format) -> dict[str, Part]:
    """The result for a stack that the files may store transposed."""
    ((name, made),) = plan.convert(model, {plan.sources[0][0]: codes}).items()
    sources, block = (plan.sources[0][0],), format.block
    if made.shape == codes.shape:
        return {name: Part(made, scale, format, sources)}
    if block[1] == ALL and scale.shape[-2] == 1:  # one scale per expert, or one for all
        whole = block if block[0] == ALL else (made.shape[-2], ALL)
        return {name: Part(made, scale, format.with_block(whole), sources)}
    if min(block) < 1:
        raise _shared(name, block, "a transposed stack", "blocks such as [128, 128]")
    turned = scale.transpose(-1, -2).clone(memory_format=torch.contiguous_format)
    return {name: Part(made, turned, format.with_block((block[1], block[0])), sources)}


def unstacked(model: nn.Module, name: str, weight: QuantizedWeight, whole: bool = False) -> dict[str, QuantizedWeight]:
    """Converts a quantized weight of the model to the weights that the files store for it.

    Args:
        model: A transformers model, or any other.
        name: The name of the weight in the model.
        weight: The quantized weight.
        whole: Whether a matrix whose blocks share one scale is written with a single scale.

    Raises:
        QCompilerError: The files store the elements in another order, or parts share a block.
    """
    if is_converted(model):
        operations = operations_on(model, name)
        check_exact(() if operations == (TRANSPOSE,) else operations, name)
        if operations == (TRANSPOSE,):  # transformers writes this stack as the model stores it
            return {name: weight}
    codes = to_files(model, {name: weight.codes})
    if [part.shape for part in codes.values()] == [weight.codes.shape]:
        return {file: replace(weight, codes=part) for file, part in codes.items()}
    places = to_files(model, {name: _row_numbers(weight.codes)})
    block, scale = weight.block, weight.scale
    if whole and bool((scale == scale[:, :1, :1]).all()):
        block, scale = (weight.codes.shape[-2], ALL), scale[:, :1, :1]
    if block[1] == ALL and block[0] > 1:  # can be split anywhere: parts with a single scale are usual
        rows = math.gcd(block[0], *map(_starts, places.values()))
        block, scale = (rows, ALL), _refined(scale, weight.codes.shape[-2], block[0], rows)
    for file, place in places.items():
        if block[0] == ALL or _starts(place) % block[0]:
            raise _shared(name, block, f"'{file}' begins inside a block", "whole blocks")
    scales = to_files(model, {name: scale})
    return {
        file: coarsened(replace(weight, codes=part, scale=scales[file], format=weight.format.with_block(block)), whole)
        for file, part in codes.items()
    }


def coarsened(weight: QuantizedWeight, whole: bool = False) -> QuantizedWeight:
    """Merges small blocks that share scales into usual blocks; returns other weights unchanged.

    Args:
        weight: A weight with any block size.
        whole: Whether a matrix whose blocks all share one scale gets a single scale.
    """
    rows, columns = weight.block
    if whole and bool((weight.scale == weight.scale[0, 0]).all()):
        return QuantizedWeight(weight.codes, weight.scale[:1, :1], weight.format.with_block((ALL, ALL)))
    usual = (ALL, ALL) if columns == ALL else (columns, columns)
    if rows in (1, ALL, usual[0]) or (usual[0] != ALL and usual[0] % rows):
        return weight
    count = len(weight.scale) if usual[0] == ALL else usual[0] // rows
    scale = weight.scale[::count].contiguous()
    if not torch.equal(scale.repeat_interleave(count, 0)[: len(weight.scale)], weight.scale):
        return weight
    return replace(weight, scale=scale, format=weight.format.with_block(usual))


def _row_numbers(codes: Tensor) -> Tensor:
    """The number of each row, in the shape of one column of a matrix or a stack of matrices."""
    return torch.arange(codes.shape[-2]).unsqueeze(1).expand(*codes.shape[:-1], 1)


def _starts(places: Tensor) -> int:
    """The greatest common divisor of the rows where parts begin, in both source and destination."""
    numbers: Sequence[int] = places.reshape(-1, places.shape[-2])[0].tolist()
    begin = [at for at, row in enumerate(numbers) if at == 0 or row != numbers[at - 1] + 1]
    return math.gcd(*begin, *(numbers[at] for at in begin))


def _refined(scale: Tensor, size: int, block: int, rows: int) -> Tensor:
    """Repeats the scales of `size` rows for blocks of `rows` rows instead of `block`; exact."""
    times = (size if block == ALL else block) // rows
    return scale.repeat_interleave(times, -2)[..., : -(-size // rows), :]


def _shared(name: str, block: tuple[int, int], got: object, need: object) -> QCompilerError:
    problem = f"'{name}' cannot be stacked or split: its parts share blocks of {list(block)}"
    return QCompilerError(problem, got=got, need=need)
