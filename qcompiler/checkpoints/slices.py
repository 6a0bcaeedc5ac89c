"""Weights of a model as sources that read any part of themselves from the files of a checkpoint, and nothing else.

    source = FileSlice(files, "model.layers.0.mlp.down_proj.weight", …)    [4096, 14336]
    source.part(1, 7168, 7168)()                                           reads columns 7168 to 14335

Experts that the model stacks are rows of several tensors:

    mlp.experts.gate_up_proj [E, 2 I, K]    row (e, i) is row i of experts.e.gate_proj.weight, or row i - I of up_proj
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qcompiler.checkpoints.conversion import EXACT, Plan, plans
from qcompiler.checkpoints.files import TensorFiles
from qcompiler.checkpoints.fitting import ties_of
from qcompiler.checkpoints.quantized_weight import not_finite
from qcompiler.checkpoints.reading import Checkpoint
from qcompiler.errors import QCompilerError
from qcompiler.files.freed_memory import before_allocating

FAR = 1 << 40
"""From the number of the first row of one tensor to the next tensor's."""


@dataclass(frozen=True)
class Place:
    """How tensors of the files become a weight.

    Attributes:
        files: The files.
        dtype: The element type of the weight in the model.
        device: Where the weight is needed.
    """

    files: TensorFiles
    dtype: torch.dtype
    device: torch.device

    def read(self, name: str, ranges: tuple[slice, ...]) -> Tensor:
        """A part of one tensor of the files. Raises QCompilerError if an FP8 code in it is not finite."""
        before_allocating(math.prod(each.stop - each.start for each in ranges) * self.dtype.itemsize)
        found = self.files.part(name, ranges)
        if (why := not_finite(found)) is not None:
            where, fix = self.files.place(name), "The file may be damaged: copy it again."
            raise QCompilerError("a code of a quantized weight is not a number", got=why, where=where, fix=fix)
        return found


@dataclass(frozen=True)
class FileSlice:
    """A weight that is one tensor of the files, or a part of it.

    Attributes:
        place: How it becomes a weight.
        name: The name in the files.
        ranges: One range of each axis in the files.
        turned: Whether the model has the last two axes in the other order.
    """

    place: Place
    name: str
    ranges: tuple[slice, ...]
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        sizes = [each.stop - each.start for each in self.ranges]
        return tuple(sizes[at] for at in self._order)

    @property
    def dtype(self) -> torch.dtype:
        """The element type of the weight."""
        return self.place.dtype

    @property
    def _order(self) -> list[int]:
        order = list(range(len(self.ranges)))
        return [*order[:-2], order[-1], order[-2]] if self.turned else order

    def part(self, axis: int, start: int, size: int) -> "FileSlice":
        """A part along an axis of the weight."""
        at = self._order[axis]
        begin = self.ranges[at].start + start
        ranges = (*self.ranges[:at], slice(begin, begin + size), *self.ranges[at + 1 :])
        return replace(self, ranges=ranges)

    def __call__(self) -> Tensor:
        """Reads the weight into new memory."""
        found = self.place.read(self.name, self.ranges).permute(self._order)
        made = torch.empty(self.shape, dtype=self.dtype, device=self.place.device)
        return made.copy_(found)


@dataclass(frozen=True, eq=False)
class StackedRows:
    """A weight `[…, N, K]` with rows of several matrices of the files, or a part of it.

    Attributes:
        place: How it becomes a weight.
        names: The matrices in the files.
        rows: For each row, the number of its matrix times `FAR`, plus the row there.
        columns: The columns, the same of all matrices.
    """

    place: Place
    names: tuple[str, ...]
    rows: Tensor
    columns: slice

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (*self.rows.shape, self.columns.stop - self.columns.start)

    @property
    def dtype(self) -> torch.dtype:
        """The element type of the weight."""
        return self.place.dtype

    def part(self, axis: int, start: int, size: int) -> "StackedRows":
        """A part along an axis of the weight."""
        if axis < self.rows.dim():
            return replace(self, rows=self.rows.narrow(axis, start, size))
        begin = self.columns.start + start
        return replace(self, columns=slice(begin, begin + size))

    def __call__(self) -> Tensor:
        """Reads the weight into new memory, one run of rows at a time."""
        made = torch.empty(self.shape, dtype=self.dtype, device=self.place.device)
        flat, at = made.view(-1, self.shape[-1]), 0
        for name, rows in self._runs():
            size = rows.stop - rows.start
            flat[at : at + size].copy_(self.place.read(name, (rows, self.columns)))
            at += size
        return made

    def _runs(self) -> Iterator[tuple[str, slice]]:
        """Consecutive rows of one matrix."""
        numbers = self.rows.reshape(-1)
        ends = [*((numbers.diff() != 1).nonzero().flatten() + 1).tolist(), len(numbers)]
        for start, end in zip([0, *ends], ends, strict=False):
            matrix, row = divmod(int(numbers[start]), FAR)
            yield self.names[matrix], slice(row, row + end - start)


Slices = FileSlice | StackedRows


class Sources(NamedTuple):
    """The matrices of a checkpoint that can be read in parts.

    Attributes:
        by_target: Name in the model -> source.
        names: Their names in the files.
        whole: Names in the files of other matrices of the model, which each rank reads whole.
    """

    by_target: Mapping[str, Slices]
    names: frozenset[str]
    whole: tuple[str, ...]

    def notes(self) -> Iterator[str]:
        """A sentence about matrices that each rank reads whole."""
        if self.whole:
            yield (
                f"each rank reads {len(self.whole)} matrices of the checkpoint whole, such as '{self.whole[0]}': "
                "transformers reorders their elements, or the model ties two of them"
            )


def sources(model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> Sources:
    """The sources of a model's matrices and stacks, codes included.

    Not of vectors, scales and buffers, which are small; of weights that transformers computes in another way than by
    joining rows or transposing; and of two tensors for weights that the model ties, because they must be compared.

    Args:
        model: The model; its tensors need no data.
        checkpoint: The checkpoint.
        device: The device for the weights.
    """
    files, state = checkpoint.tensors, dict(model.named_parameters(remove_duplicate=False))
    beside = checkpoint.beside
    matrices = [name for name in files if len(files.shape(name)) > 1 and name not in beside]
    found: dict[str, Slices] = {}
    taken: dict[str, tuple[str, ...]] = {}
    wanted: set[str] = set()
    for plan in plans(model, matrices):
        names = tuple(name for name, _ in plan.sources)
        quantized = any(name in checkpoint.stored for name in names)
        wanted |= {*names} if plan.target in state else set()
        for target, source in _of_plan(model, plan, files, device, quantized).items():
            if target in state and source.shape == tuple(state[target].shape):
                dtype = source.dtype if quantized else state[target].dtype
                found[target] = replace(source, place=replace(source.place, dtype=dtype))
                taken[target] = names
    doubled = {name for group in ties_of(model).values() if len(group & found.keys()) > 1 for name in group}
    whole = {name for target in doubled & found.keys() for name in taken[target]}
    kept = {target for target, names in taken.items() if not whole & {*names}}
    sliced = frozenset(name for target in kept for name in taken[target])
    return Sources({target: found[target] for target in kept}, sliced, tuple(sorted(wanted - sliced)))


def _of_plan(
    model: nn.Module, plan: Plan, files: TensorFiles, device: torch.device, quantized: bool
) -> Mapping[str, Slices]:
    """The weights that one conversion makes, if it joins rows or transposes."""
    names = tuple(name for name, _ in plan.sources)
    place = Place(files, files.dtype(names[0]), device)
    if len({(files.dtype(name), files.shape(name)[-1]) for name in names}) > 1:
        return {}
    given = {name: torch.empty(files.shape(name), dtype=place.dtype, device="meta") for name in names}
    if len(names) == 1 and not plan.operations:
        shape = files.shape(names[0])
        return {target: FileSlice(place, names[0], _all(shape)) for target in plan.convert(model, given)}
    if plan.operations == ("Transpose",) and not quantized:
        return _turned(place, names[0], plan.convert(model, given))
    if any(step not in EXACT for step in plan.operations) or any(len(files.shape(name)) != 2 for name in names):
        return {}
    numbers = {name: (torch.arange(files.shape(name)[0]) + at * FAR).unsqueeze(1) for at, name in enumerate(names)}
    columns = slice(0, files.shape(names[0])[-1])
    made = plan.convert(model, numbers)
    return {target: StackedRows(place, names, rows.squeeze(-1), columns) for target, rows in made.items()}


def _turned(place: Place, name: str, made: Mapping[str, Tensor]) -> dict[str, Slices]:
    """One matrix, or a stack of matrices, that may be transposed; a square one does not show whether it is."""
    (target, tensor), shape = next(iter(made.items())), place.files.shape(name)
    if shape[-1] == shape[-2] or len(made) > 1:
        return {}
    turned = tuple(tensor.shape) != shape
    return {target: FileSlice(place, name, _all(shape), turned)}


def _all(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)
