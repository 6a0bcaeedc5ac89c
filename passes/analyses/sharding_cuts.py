"""What a region of values that are cut together consists of, and whether it can be cut into a number of parts.

`sharding_regions` finds the regions of a graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd

from passes.analyses.layers import EVERYTHING
from passes.analyses.sharding_factors import Factor
from qcompiler.ir import ALL, Missed, Op, Value

Unit = tuple[int, int]
"""Rows and columns of a weight that must stay together, such as the block of its format; ALL for the whole axis."""

LARGE = 1 << 22
"""Elements of a table from which on a gather in each call is worth the memory that it saves."""


@dataclass(frozen=True)
class Cutting:
    """How regions are cut.

    Attributes:
        parts: Number of parts.
        unit: Of weights that may be quantized.
        stored: Columns of weights that are quantized already, beside their own blocks; 0 if `unit` holds for them, too.
        named: Whether layers that are usually not quantized may be: the user names layers (see `analyses.layers`).
        gather: Minimum elements of a table whose columns are cut and gathered.
        layers: Patterns that select the weights to cut (see `analyses.layers`).
        split: Whether norms may be cut along the axis that they normalize, so that they must be taken apart.
    """

    parts: int
    unit: Unit = (1, 1)
    stored: int = 0
    named: bool = False
    gather: int = LARGE
    layers: tuple[str, ...] = EVERYTHING
    split: bool = False


class Refused(Exception):
    """A region cannot be cut: the reason and the value that prevents it."""

    def __init__(self, why: str, value: Value) -> None:
        super().__init__(why)
        self.missed = Missed(why, value)


@dataclass(frozen=True)
class Heads:
    """Heads that other heads share: each belongs to every part with one of its users.

    Attributes:
        count: Number of heads.
        users: Number of consecutive heads of queries that read one of them.
    """

    count: int
    users: int

    def copies(self, parts: int) -> int:
        """The number of parts of the queries that need the same heads; 1 also if there is no such number."""
        ranks, rest = divmod(parts, self.count)
        return ranks if ranks > 1 and rest == 0 and self.users % ranks == 0 else 1


@dataclass
class Region:
    """Values that are cut together.

    Attributes:
        parts: Number of parts.
        cuts: Value -> the axis along which it is cut.
        units: Value -> elements along that axis that must stay together.
        heads: Value -> the heads that it holds, if others share them.
        partials: Results that are partial sums.
        gathered: Results that are cut, but whose users read the whole value.
        whole: Values with a single head that all parts share: they are not cut.
        terms: Weights that are added once to a partial sum: one rank holds them, the others zeros.
        factors: Operation -> the factor along which it is cut.
        norms: Operations that must be taken apart before.
        excluded: Why patterns exclude it.
    """

    parts: int
    cuts: dict[Value, int] = field(default_factory=dict)
    units: dict[Value, int] = field(default_factory=dict)
    heads: dict[Value, Heads] = field(default_factory=dict)
    partials: list[Value] = field(default_factory=list)
    gathered: list[Value] = field(default_factory=list)
    whole: list[Value] = field(default_factory=list)
    terms: list[Value] = field(default_factory=list)
    factors: dict[Op, Factor] = field(default_factory=dict)
    norms: list[Op] = field(default_factory=list)
    excluded: Missed | None = None

    def copies(self, value: Value, parts: int | None = None) -> int:
        """The number of consecutive ranks that hold the same part of a value, also for other numbers of parts."""
        return copies_of(self.heads.get(value), parts or self.parts)

    def why_not(self) -> Missed | None:
        """Why the region cannot be cut into so many parts, with the nearest number that is possible."""
        if self.excluded is not None:
            return self.excluded
        counts: dict[Value, int] = {}
        for value, axis in self.cuts.items():
            unit, size = self.units[value], value.tensor.shape[axis]
            if unit == ALL:
                return Missed(f"one scale spans axis {axis}, so that a cut would go through its block", value)
            if not isinstance(size, int):
                return Missed(f"the size of axis {axis} is {size}, which is not fixed", value)
            if size % unit:
                return Missed(f"{size} elements along axis {axis} are not whole blocks of {unit}", value)
            counts[value] = size // unit
        for value, count in sorted(counts.items(), key=lambda pair: -self.units[pair[0]]):
            if not self._divides(value, count, self.parts):
                axis, unit, own = self.cuts[value], self.units[value], self.parts // self.copies(value)
                what = f"block{'s' * (count > 1)} of {unit} elements" if unit > 1 else "elements"
                problem = f"{count} {what} along axis {axis} cannot be cut into {own} equal parts"
                return Missed(f"{problem}; {self._nearest(counts)}", value)
        return None

    def _divides(self, value: Value, count: int, parts: int) -> bool:
        """Whether equal numbers of a value's blocks are in each part."""
        return count % (parts // self.copies(value, parts)) == 0

    def _nearest(self, counts: Mapping[Value, int]) -> str:
        """The possible number of parts that is nearest, in words."""
        most = gcd(*(count for value, count in counts.items() if value not in self.heads)) or max(counts.values())
        shared = [(value, count) for value, count in counts.items() if value in self.heads]
        numbers = (number for number in range(2, most + 1) if most % number == 0)
        possible = [number for number in numbers if all(self._divides(*each, number) for each in shared)]
        if not possible:
            return "no number of parts is possible"
        return f"the nearest possible number of parts is {min(possible, key=lambda number: abs(number - self.parts))}"


def copies_of(heads: Heads | None, parts: int) -> int:
    """The number of parts that hold the same heads."""
    return 1 if heads is None else heads.copies(parts)
