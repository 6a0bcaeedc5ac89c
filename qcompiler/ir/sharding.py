"""How the ranks of a mesh hold a value: a part along one axis, a term of a sum, or all of it.

    bf16[s0, s1, 1024]<tp = shard(axis = 2, parts = 2, unit = 64)>     each rank of `tp` holds [s0, s1, 512]
    bf16[1024, 512]<tp = shard(axis = 0, parts = 2, copies = 4)>       ranks 0 to 3 of `tp` hold the first half
    bf16[s0, s1, 512]<tp = partial(parts = 2)>                         the value is the sum of what the ranks hold

A value without a placement on an axis of the mesh is replicated: each rank holds all of it. Shapes are the shapes of
whole values, so that a graph with placements computes what it computes without them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from qcompiler.errors import QCompilerError, did_you_mean
from qcompiler.ir.sizes import Size

AXIS = re.compile(r"[A-Za-z]\w*")


@dataclass(frozen=True)
class Shard:
    """Each rank holds one of several equal parts along an axis.

    Attributes:
        axis: The axis of the value.
        parts: Number of parts.
        unit: Elements that must stay together, such as the block of a format or an attention head: a part is a
            multiple of it.
        copies: Number of consecutive ranks that hold the same part, such as a head of keys that the query heads of
            several ranks read.
    """

    axis: int
    parts: int
    unit: int = 1
    copies: int = 1

    def __str__(self) -> str:
        more = {"unit": self.unit, "copies": self.copies}
        shown = "".join(f", {name} = {value}" for name, value in more.items() if value != 1)
        return f"shard(axis = {self.axis}, parts = {self.parts}{shown})"

    @property
    def ranks(self) -> int:
        """Number of ranks that it is for."""
        return self.parts * self.copies

    def why_not(self, shape: tuple[Size, ...]) -> str | None:
        """Why a tensor of this shape cannot be cut so; None if it can."""
        if not 0 <= self.axis < len(shape):
            return f"it has no axis {self.axis}"
        size = shape[self.axis]
        if not isinstance(size, int):
            return f"the size of axis {self.axis} is {size}, which is not fixed"
        if size % (self.parts * self.unit):
            units = f" of whole units of {self.unit}" if self.unit != 1 else ""
            return f"the {size} elements of axis {self.axis} cannot be cut into {self.parts} equal parts{units}"
        return None


@dataclass(frozen=True)
class Partial:
    """The value is the sum of what the ranks hold; each holds a tensor of the full shape.

    Attributes:
        parts: Number of terms, one per rank.
    """

    parts: int

    def __str__(self) -> str:
        return f"partial(parts = {self.parts})"

    @property
    def ranks(self) -> int:
        """Number of ranks that it is for."""
        return self.parts


Placement = Shard | Partial
Sharding = tuple[tuple[str, Placement], ...]
"""Axes of the mesh and the placement on each, sorted by name; a value is replicated along all other axes."""

KINDS: Mapping[str, type[Placement]] = {"shard": Shard, "partial": Partial}


def print_sharding(sharding: Sharding) -> str:
    """`<tp = partial(parts = 2)>`; empty for a value that is replicated."""
    return f"<{', '.join(f'{axis} = {placement}' for axis, placement in sharding)}>" if sharding else ""


def read_placement(kind: str, given: Mapping[str, Any]) -> Placement:
    """The placement with these fields; raises QCompilerError if it has no such kind or field, or a wrong value."""
    if kind not in KINDS:
        raise QCompilerError("no such placement", got=repr(kind), fix=did_you_mean(kind, KINDS))
    needed = ("axis", "parts") if kind == "shard" else ("parts",)
    known = (*needed, "unit", "copies") if kind == "shard" else needed
    if strange := [key for key in given if key not in known]:
        raise QCompilerError(f"the placement '{kind}' has no field '{strange[0]}'", fix=did_you_mean(strange[0], known))
    if missing := [key for key in needed if key not in given]:
        raise QCompilerError(f"the {missing[0]} of the placement '{kind}' is missing")
    for key, value in given.items():
        least = {"axis": 0, "parts": 2}.get(key, 1)
        if type(value) is not int or value < least:
            raise QCompilerError(f"the {key} of a placement is wrong", got=value, need=f"an integer from {least}")
    return KINDS[kind](**given)


@dataclass(frozen=True)
class Mesh:
    """Ranks in a grid: the name and size of each axis. `Mesh.parse("dp=2, tp=4")` is the inverse of `str(mesh)`.

    Rank numbers are in row-major order: the last axis varies fastest.
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        """Raises QCompilerError for a name that is invalid or taken, and for a size that is not positive."""
        names = [name for name, _ in self.axes]
        for name, size in self.axes:
            if not AXIS.fullmatch(name) or names.count(name) > 1:
                raise QCompilerError("an axis of a mesh has a wrong name", got=repr(name), need="one name per axis")
            if type(size) is not int or size < 1:
                raise QCompilerError(f"the size of mesh axis '{name}' is wrong", got=size, need="a positive integer")
        if not self.axes:
            raise QCompilerError("a mesh needs an axis", need="such as tp=2")

    @classmethod
    def parse(cls, text: str) -> "Mesh":
        """Parses `dp=2, tp=4`; raises QCompilerError if the text is malformed."""
        pairs = [re.fullmatch(r"\s*(\w+)\s*=\s*([0-9]{1,9})\s*", part) for part in text.split(",")]
        found = tuple((pair[1], int(pair[2])) for pair in pairs if pair)
        if len(found) < len(pairs):
            raise QCompilerError("this is not a mesh", got=repr(text), need="axes and their sizes, such as tp=2")
        return cls(found)

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.axes)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return prod(size for _, size in self.axes)

    def length(self, axis: str) -> int:
        """The size of an axis; raises QCompilerError if the mesh does not have it."""
        if axis not in dict(self.axes):
            raise QCompilerError("the mesh has no such axis", got=repr(axis), fix=did_you_mean(axis, dict(self.axes)))
        return dict(self.axes)[axis]

    def place(self, rank: int, axis: str) -> int:
        """The coordinate of a rank along an axis."""
        return rank // self._stride(axis) % self.length(axis)

    def group(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that differ from a rank only along one axis, in the order of that axis; includes the rank."""
        stride = self._stride(axis)
        first = rank - self.place(rank, axis) * stride
        return tuple(first + at * stride for at in range(self.length(axis)))

    def _stride(self, axis: str) -> int:
        names = [name for name, _ in self.axes]
        return prod(size for _, size in self.axes[names.index(axis) + 1 :])
