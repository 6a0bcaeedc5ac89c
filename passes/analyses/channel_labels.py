"""Labels: which factor each element of a scaled value has, and how they pass through the operations that move data.

A *scaled value* is one that a rewritten graph holds multiplied by a positive factor per channel. Its labels are an
integer array of its rank, of size 1 on every axis along which the factor does not vary (always so where the size is
symbolic). They are channel numbers; UNSCALED stands for the factor 1.

`Site.join` is all that most operations need: run on the positions of a source, the operation tells which element of
the source each element of its image is, and labels then go both ways.
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
"""The label of elements whose factor is 1."""

Pick = Callable[[Labels], Labels]
"""Positions in a source -> positions in its image; an axis along which nothing varies has size 1 in both."""


class Refused(Exception):
    """The scale cannot pass here: why, and the value at fault."""

    def __init__(self, why: str, value: Value) -> None:
        super().__init__(why)
        self.why, self.value = why, value
        self.depth = 0
        """How many values were scaled before this came up."""


class Site(ABC):
    """One operation while a region is solved: the labels of its operands and results, and how to join them."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.chosen: Path | None = None
        """Which option of a Fork is to be taken."""

    @abstractmethod
    def labels(self, slot: Slot) -> Labels | None:
        """The labels of a value, or None while it is not scaled."""

    @abstractmethod
    def assign(self, slot: Slot, labels: Labels) -> None:
        """Adds to the labels of a value; ties channels where they meet others."""

    def path(self, name: str) -> Path:
        """Where the argument that torch's schema calls `name` stands."""
        return self.op.path(name)

    def argument(self, name: str) -> Argument:
        """The argument that torch's schema calls `name`, or its default."""
        return self.op.argument(name)

    def name_at(self, path: Path) -> str:
        """What torch's schema calls the argument at `path`."""
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
        """The shape of the tensor at a slot; Refused where there is none."""
        if (value := self.value(slot)) is None:
            raise self.refused(f"{self.op.name} has an operand that is no tensor")
        return value.tensor.shape

    def varies(self, slot: Slot, axis: int) -> bool:
        """Whether the factor varies along an axis."""
        labels = self.labels(slot)
        return labels is not None and labels.shape[axis] > 1

    def refused(self, why: str) -> Refused:
        """A refusal with this operation at fault."""
        return Refused(why, self.op.results[0] if self.op.results else next(value for _, value in self.op.operands()))

    def axis(self, name: str = "dim", slot: Slot = (0,)) -> int:
        """An argument that is an axis of the value at `slot`, counted from the front."""
        axis = self.argument(name)
        if not isinstance(axis, int):
            raise self.refused(f"{self.op.name} works along no fixed axis")
        return axis % max(1, len(self.shape(slot)))

    def integer(self, arg: object) -> int:
        """A literal that must be known where the factor varies."""
        if not isinstance(arg, int):
            raise self.refused(f"{self.op.name} moves channels by a number that is not fixed")
        return arg

    def join(
        self,
        source: Slot,
        image: Slot,
        axes: Sequence[int | None] | None = None,
        pick: Pick = lambda at: at,
        along: Sequence[int] = (),
    ) -> None:
        """States that each element of `image` is the one of `source` that `pick` says, times what is not scaled.

        Args:
            source: The slot whose elements appear in the other one.
            image: The slot whose elements they are; it may be larger by broadcasting.
            axes: For each axis of the image, the one of the source; aligned on the right, as in broadcasting, when
                left out. None for an axis along which the source has one element for all.
            pick: Positions in the source to positions in the image.
            along: Axes of the source along which the factor is to vary although no labels say so yet.
        """
        sizes, rank = self.shape(source), len(self.shape(image))
        if axes is None:
            axes = [None if at < 0 else at for at in range(len(sizes) - rank, len(sizes))]
        varying = {axis for axis in range(len(sizes)) if self.varies(source, axis)}.union(along)
        varying |= {axis for at, axis in enumerate(axes) if axis is not None and self.varies(image, at)}
        self.link(source, image, [self.full(n) if axis in varying else 1 for axis, n in enumerate(sizes)], pick)

    def full(self, size: Size) -> int:
        """The size of an axis along which the factor varies; Refused when it is symbolic."""
        if not isinstance(size, int):
            raise self.refused(f"{self.op.name} mixes the channels with an axis of the symbolic size {size}")
        return size

    def link(self, source: Slot, image: Slot, shape: Sequence[int], pick: Pick) -> None:
        """As `join`, with the sizes of the source given: 1 for each axis along which nothing varies."""
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
            flat = np.where(flat >= 0, flat, new)  # where both say something, `assign` ties them
        self.assign(source, flat.reshape(shape))
        self.assign(image, flat[positions])


@dataclass(frozen=True)
class Fork:
    """What is known leaves a choice: an operand that is to carry the factor, or the words ALL and PART.

    A part of a value is scaled: so may be all of it, alike along the axis of the cut, or nothing else of it.
    """

    options: tuple[Path, ...]


ALL: Path = ("all",)
PART: Path = ("part",)


@dataclass(frozen=True)
class Commutes:
    """One row of the table.

    Attributes:
        proof: Why a positive factor passes through.
        carries: The parameters, as torch's schema names them, that may be scaled; all others must not be.
        relate: Joins the labels; gives a Fork instead where there is a choice and none is taken yet.
    """

    proof: str
    carries: tuple[str, ...]
    relate: Callable[[Site], Fork | None]


def last_axis(labels: Labels, size: Size) -> Labels:
    """Labels that vary along the last axis only, as a vector of its size; ValueError where that is symbolic."""
    if not isinstance(size, int):
        raise ValueError(f"an axis of the symbolic size {size} has no vector of labels")
    return np.broadcast_to(labels.reshape(-1), (size,))


def runs(old: Sequence[Size], new: Sequence[Size]) -> list[tuple[range, range]]:
    """The axes of two shapes in the smallest groups with equal products: what a reshape does not mix.

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
