"""Labels: the factor of each element of a scaled value, and how labels pass through operations that move data.

A *scaled value* is one that the rewritten graph holds multiplied by a positive factor per channel. Its labels are an
integer array of the same rank, of size 1 on each axis along which the factor does not vary (always so on axes of
symbolic size). Labels are channel numbers; UNSCALED means the factor 1.

Most operations need only `Site.join`: it runs the operation on the positions of a source to find which source element
each image element is. Labels then propagate both ways.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul

import numpy as np
import numpy.typing as npt

from qcompiler.ir import Argument, Op, Size, TensorType, Value
from qcompiler.ir.op import Path
from qcompiler.ir.traits import traits_of

Labels = npt.NDArray[np.intp]
Slot = Path | int
"""A value at an operation: the path of an operand, or the index of a result."""

UNSCALED = -1
"""The label of elements with factor 1."""

Pick = Callable[[Labels], Labels]
"""Positions in a source -> positions in its image; an axis along which nothing varies has size 1 in both."""


class Refused(Exception):
    """The scale cannot pass here: the reason and the value that prevents it."""

    def __init__(self, why: str, value: Value) -> None:
        super().__init__(why)
        self.why, self.value = why, value
        self.depth = 0
        """Number of values that were scaled before this refusal."""


class Site(ABC):
    """One operation while a region is being solved: labels of its operands and results, and how to join them."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.chosen: Path | None = None
        """Which option of a Fork to take."""

    @abstractmethod
    def labels(self, slot: Slot) -> Labels | None:
        """The labels of a value; None if it is not scaled."""

    @abstractmethod
    def assign(self, slot: Slot, labels: Labels) -> None:
        """Adds labels to a value; ties channels that meet existing labels."""

    def path(self, name: str) -> Path:
        """The path of the argument that torch's schema calls `name`."""
        return self.op.path(name)

    def argument(self, name: str) -> Argument:
        """The argument that torch's schema calls `name`, or its default."""
        return self.op.argument(name)

    def name_at(self, path: Path) -> str:
        """The name in torch's schema of the argument at `path`."""
        if isinstance(path[0], str):
            return path[0]
        positions = traits_of(self.op.name).positions
        return next(name for name, index in positions.items() if index == path[0])

    def value(self, slot: Slot) -> Value | None:
        """The tensor at a slot; None for a literal or a number."""
        if isinstance(slot, int):
            return self.op.results[slot]
        arg: Argument = self.op.args[slot[0]] if isinstance(slot[0], int) else self.op.attrs.get(slot[0])
        for index in slot[1:]:
            arg = arg[int(index)] if isinstance(arg, tuple) else None
        return arg if isinstance(arg, Value) and isinstance(arg.type, TensorType) else None

    def shape(self, slot: Slot) -> tuple[Size, ...]:
        """The shape of the tensor at a slot; raises Refused if it is not a tensor."""
        if (value := self.value(slot)) is None:
            raise self.refused(f"{self.op.name} has an operand that is not a tensor")
        return value.tensor.shape

    def varies(self, slot: Slot, axis: int) -> bool:
        """Whether the factor varies along an axis."""
        labels = self.labels(slot)
        return labels is not None and labels.shape[axis] > 1

    def refused(self, why: str) -> Refused:
        """A refusal at this operation."""
        return Refused(why, self.op.results[0] if self.op.results else next(value for _, value in self.op.operands()))

    def axis(self, name: str = "dim", slot: Slot = (0,)) -> int:
        """An argument that is an axis of the value at `slot`, as a nonnegative index."""
        axis = self.argument(name)
        if not isinstance(axis, int):
            raise self.refused(f"the axis of {self.op.name} is not fixed")
        return axis % max(1, len(self.shape(slot)))

    def integer(self, arg: object) -> int:
        """A literal that must be known if the factor varies."""
        if not isinstance(arg, int):
            raise self.refused(f"{self.op.name} moves channels by an amount that is not fixed")
        return arg

    def join(
        self,
        source: Slot,
        image: Slot,
        axes: Sequence[int | None] | None = None,
        pick: Pick = lambda at: at,
        along: Sequence[int] = (),
    ) -> None:
        """Declares that `image` equals the elements of `source` chosen by `pick`, times unscaled factors.

        Args:
            source: The slot that the elements come from.
            image: The slot that holds them; it may be larger through broadcasting.
            axes: The source axis of each image axis; None where the source broadcasts. Default: aligned on the
                right, as in broadcasting.
            pick: Positions in the source to positions in the image.
            along: Source axes along which the factor must be able to vary although no labels say so yet.
        """
        sizes, rank = self.shape(source), len(self.shape(image))
        if axes is None:
            axes = [None if at < 0 else at for at in range(len(sizes) - rank, len(sizes))]
        varying = {axis for axis in range(len(sizes)) if self.varies(source, axis)}.union(along)
        varying |= {axis for at, axis in enumerate(axes) if axis is not None and self.varies(image, at)}
        self.link(source, image, [self.full(n) if axis in varying else 1 for axis, n in enumerate(sizes)], pick)

    def full(self, size: Size) -> int:
        """The size of an axis along which the factor varies; raises Refused if it is symbolic."""
        if not isinstance(size, int):
            raise self.refused(f"{self.op.name} mixes the channels with an axis of symbolic size {size}")
        return size

    def link(self, source: Slot, image: Slot, shape: Sequence[int], pick: Pick) -> None:
        """Like `join`, with the source sizes given: 1 for each axis along which nothing varies."""
        rank = len(self.shape(image))
        positions = pick(np.arange(prod(shape), dtype=np.intp).reshape(shape))
        positions = positions.reshape((1,) * (rank - positions.ndim) + positions.shape)
        old, seen = self.labels(source), self.labels(image)
        labels = np.full(shape, UNSCALED) if old is None else np.broadcast_to(old, shape).copy()
        flat = labels.reshape(-1)
        if seen is not None:
            seen, positions = np.broadcast_arrays(seen, positions)
            new = flat.copy()
            new[positions[seen >= 0]] = seen[seen >= 0]
            flat = np.where(flat >= 0, flat, new)  # where both have labels, `assign` ties them
        self.assign(source, flat.reshape(shape))
        self.assign(image, flat[positions])


@dataclass(frozen=True)
class Fork:
    """A choice that is still open: the operand that carries the factor, or ALL versus PART.

    When part of a value is scaled, either all of it is scaled alike along the cut axis, or only that part is.
    """

    options: tuple[Path, ...]


ALL: Path = ("all",)
PART: Path = ("part",)


@dataclass(frozen=True)
class Commutes:
    """One row of the table.

    Attributes:
        proof: Why a positive factor passes through.
        carries: Parameters, by torch schema name, that may be scaled; the others must not be.
        relate: Joins the labels; returns a Fork if there is a choice and none has been made.
    """

    proof: str
    carries: tuple[str, ...]
    relate: Callable[[Site], Fork | None]


def last_axis(labels: Labels, size: Size) -> Labels:
    """Labels that vary along the last axis only, as a vector; raises ValueError if its size is symbolic."""
    if not isinstance(size, int):
        raise ValueError(f"an axis of symbolic size {size} has no vector of labels")
    return np.broadcast_to(labels.reshape(-1), (size,))


def runs(old: Sequence[Size], new: Sequence[Size]) -> list[tuple[range, range]]:
    """The axes of two shapes in the smallest groups with equal sizes: the groups that a reshape keeps apart.

    [s0, s1, 64] and [s0*s1, 4, 16]  ->  ([0, 1], [0]), ([2], [1, 2])
    """
    one: Size = 1
    left, right = ([*accumulate(shape, mul, initial=one)] for shape in (old, new))
    groups, a, b = [], 0, 0
    for i in range(1, len(left)):
        if 0 not in (*old, *new) and (j := next((j for j in range(b, len(right)) if right[j] == left[i]), None)):
            groups.append((range(a, i), range(b, j)))
            a, b = i, j
    if not groups:
        return [(range(len(old)), range(len(new)))]
    first, last = groups[-1]
    groups[-1] = (range(first.start, len(old)), range(last.start, len(new)))  # axes of size 1 may be left over
    return groups
