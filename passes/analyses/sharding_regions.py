"""Regions: the values that must be cut together so that a matmul can sum over parts of its reduction axis.

    %gate = aten.linear(%x, %w1)             %w1 rows      cut
    %up   = aten.linear(%x, %w2)             %w2 rows      cut
    %h    = aten.mul.Tensor(%gate, %up)      last axis     cut
    %y    = aten.linear(%h, %w3)             %w3 columns   cut; %y is a partial sum

A region starts at the reduction axis of a linear and grows through the factors of all operations that define or use a
value of the region (see `sharding_rules`), until only weights and partial sums are left. So the linears before the sum
compute columns, the operations between them keep columns or heads apart, and `%x` is replicated. A region that
reaches an input, an output, or an operation without a suitable factor is refused with the reason.

A large table of embeddings, and a large linear whose result leaves the graph, are a separate region: their columns
are cut, and the result is gathered.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import gcd, lcm

from passes.analyses.candidates import why_not_quantized
from passes.analyses.channel_labels import Slot
from passes.analyses.layers import EVERYTHING, why_not_selected
from passes.analyses.sharding_rules import Factor, Place, row_of, value_at
from qcompiler.dialects.aten import is_pointwise
from qcompiler.ir import ALL, Graph, Missed, Op, Role, TensorType, Value
from qcompiler.ir.dataflow import users_through
from qcompiler.ir.graph import PARAM
from qcompiler.ir.structure import INPUT, RETURN

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
        named: Whether layers that are usually not quantized may be: the user names layers (see `analyses.layers`).
        gather: Minimum elements of a table whose columns are cut and gathered.
        layers: Patterns that select the weights to cut (see `analyses.layers`).
    """

    parts: int
    unit: Unit = (1, 1)
    named: bool = False
    gather: int = LARGE
    layers: tuple[str, ...] = EVERYTHING


class Refused(Exception):
    """A region cannot be cut: the reason and the value that prevents it."""

    def __init__(self, why: str, value: Value) -> None:
        super().__init__(why)
        self.missed = Missed(why, value)


@dataclass
class Region:
    """Values that are cut together.

    Attributes:
        cuts: Value -> the axis along which it is cut.
        units: Value -> elements along that axis that must stay together.
        partials: Results that are partial sums.
        gathered: Results that are cut, but whose users read the whole value.
        terms: Weights that are added once to a partial sum: one rank holds them, the others zeros.
        factors: Operation -> the factor along which it is cut.
    """

    cuts: dict[Value, int] = field(default_factory=dict)
    units: dict[Value, int] = field(default_factory=dict)
    partials: list[Value] = field(default_factory=list)
    gathered: list[Value] = field(default_factory=list)
    terms: list[Value] = field(default_factory=list)
    factors: dict[Op, Factor] = field(default_factory=dict)

    def why_not(self, parts: int) -> Missed | None:
        """Why the region cannot be cut into a number of parts, with the nearest number that is possible."""
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
            if count % parts:
                axis, unit = self.cuts[value], self.units[value]
                what = f"blocks of {unit} elements" if unit > 1 else "elements"
                problem = f"{count} {what} along axis {axis} cannot be cut into {parts} equal parts"
                return Missed(f"{problem}; {_nearest(parts, gcd(*counts.values()))}", value)
        return None


def _nearest(parts: int, together: int) -> str:
    """The divisor of a number of blocks that is nearest to `parts`, in words."""
    possible = [number for number in range(2, together + 1) if together % number == 0]
    if not possible:
        return "no number of parts is possible"
    return f"the nearest possible number of parts is {min(possible, key=lambda number: abs(number - parts))}"


def regions(graph: Graph, cutting: Cutting) -> tuple[list[Region], Mapping[Op, Missed]]:
    """The regions of a graph that can be cut, and why other linears and large tables are in none.

    A linear that only starts no region, but computes columns of one that cannot be cut, has the reason of that region.
    """
    found: list[Region] = []
    missed: dict[Op, Missed] = {}
    inside: dict[Op, Missed] = {}
    owners: set[Op] = set()
    for op, factor in (*_sums(graph), *_tables(graph, cutting.gather)):
        if op in owners:
            continue
        try:
            region = grow(graph, op, factor, cutting)
        except Refused as reason:
            missed[op] = reason.missed
            continue
        taken = next((other for other in region.factors if other in owners), None)
        if taken is not None:
            missed[op] = Missed("the region of another matmul cuts an operation on the way", taken.results[0])
        elif (why := region.why_not(cutting.parts)) is not None:
            missed[op] = why
            inside |= dict.fromkeys(region.factors, why)
        else:
            found.append(region)
            owners.update(region.factors)
    return found, {op: inside.get(op, why) for op, why in missed.items() if op not in owners}


def _sums(graph: Graph) -> Iterator[tuple[Op, Factor]]:
    """Linears with constant weights, and their reduction axes."""
    for op in graph.ops("aten.linear"):
        if graph.is_constant(op["weight"]) and not graph.is_constant(op.result):
            yield op, next(factor for factor in _factors(op) if factor.summed)


def _tables(graph: Graph, least: int) -> Iterator[tuple[Op, Factor]]:
    """Large tables of embeddings, and large linears whose result leaves the graph, and their columns."""
    for op in graph.ops():
        if op.name not in ("aten.embedding", "aten.linear") or graph.is_constant(op.result):
            continue
        if not graph.is_constant(w := op["weight"]):
            continue
        size, lookup = w.tensor.elements, op.name == "aten.embedding"
        if isinstance(size, int) and size >= least and (lookup or _leaves(graph, op.result)):
            columns = Place(op.path("weight"), 1 if lookup else 0)
            yield op, next(factor for factor in _factors(op) if columns in factor.places and not factor.summed)


def _leaves(graph: Graph, value: Value) -> bool:
    """Whether only outputs read a value, directly or through views and elementwise operations."""

    def keeps(op: Op) -> bool:
        return op.role is Role.VIEW or is_pointwise(op.name)

    users = list(users_through(graph, value, keeps))
    return all(op.name == RETURN or keeps(op) for op in users) and any(op.name == RETURN for op in users)


def grow(graph: Graph, start: Op, factor: Factor, cutting: Cutting) -> Region:
    """The region that starts at a factor of an operation; raises Refused if there is none.

    Unless the factor is summed, the region does not include the users of the result.
    """
    region, queue = Region(gathered=[] if factor.summed else [start.result]), deque[Value]()
    _cut(region, queue, start, factor)
    while queue:
        value = queue.popleft()
        if value.op.name == INPUT:
            raise Refused("it would cut an input of the model", value)
        if value.op.role is Role.STATE and value.op.name != PARAM:
            raise Refused("it would cut state that the model may change", value)
        for op in (value.op, *graph.users(value)):
            if op.role is Role.STATE:
                continue
            if op.name == RETURN:
                raise Refused("it would cut an output of the model", value)
            _cut(region, queue, op, _factor(op, value, region.cuts[value]))
    _check(graph, region)
    for op, cut in region.factors.items():
        if _reads_weights(graph, op) and (excluded := why_not_selected(cutting.layers, op, graph)) is not None:
            raise Refused(excluded.why, op.result)
        unit = cutting.unit if why_not_quantized(op, graph, cutting.named) is None else (1, 1)
        _add_units(region, op, cut, unit)
    return region


def _reads_weights(graph: Graph, op: Op) -> bool:
    """Whether an operation is a layer that patterns select: a linear or a lookup in a constant table."""
    return op.name in ("aten.linear", "aten.embedding") and graph.is_constant(op["weight"])


def _factors(op: Op) -> list[Factor]:
    row = row_of(op)
    return list(row.factors(op)) if row is not None else []


def _factor(op: Op, value: Value, axis: int) -> Factor:
    """The factor of an operation that a value has along an axis, at every place where the operation has the value."""
    row = row_of(op)
    if row is None:
        raise Refused(f"{op.name} is not known to keep parts apart", value)
    slots: list[Slot] = [path for path, operand in op.operands() if operand is value]
    slots += [index for index, result in enumerate(op.results) if result is value]
    factors = _factors(op)
    found: set[Factor] = set()
    for slot in slots:
        here = [f for f in factors if any(place.slot == slot and place.axis == axis for place in f.places)]
        if not here:
            raise Refused(f"{op.name} {row.otherwise} axis {axis}", value)
        found.add(here[0])
    if len(found) > 1:
        raise Refused(f"{op.name} would be cut along two of its loops", value)
    (factor,) = found
    if (sized := _computed_size(op, row.sizes, factor)) is not None:
        raise Refused(f"{op.name} computes the size of axis {sized}", value)
    return factor


def _computed_size(op: Op, sizes: str | None, factor: Factor) -> int | None:
    """The axis of the result along which the factor cuts it and whose size in the arguments is not a literal."""
    listed = op.argument(sizes) if sizes is not None else None
    for place in factor.places:
        if isinstance(listed, tuple) and place.slot == 0 and not isinstance(listed[place.axis], int):
            return place.axis
    return None


def _cut(region: Region, queue: deque[Value], op: Op, factor: Factor) -> None:
    """Cuts an operation along a factor, and all values that have it."""
    known = region.factors.setdefault(op, factor)
    if known != factor:
        raise Refused(f"{op.name} would be cut along two of its loops", op.results[0])
    for place, value in _places(op, factor):
        if region.cuts.setdefault(value, place.axis) != place.axis:
            raise Refused(f"it would be cut along axes {region.cuts[value]} and {place.axis}", value)
        if value not in region.units:
            region.units[value] = 1
            queue += [] if value in region.gathered else [value]
    if factor.summed and op.results[0] not in region.partials:
        region.partials.append(op.results[0])
        region.terms += [term for path in factor.terms if (term := value_at(op, path)) is not None]


def _places(op: Op, factor: Factor) -> Iterator[tuple[Place, Value]]:
    for place in factor.places:
        if (value := value_at(op, place.slot)) is not None:
            yield place, value


def _check(graph: Graph, region: Region) -> None:
    """Raises Refused for a partial sum that is also cut, and for an addend that the ranks cannot divide."""
    for value in region.partials:
        if value in region.cuts:
            raise Refused("it would be cut and a partial sum at once", value)
    for value in region.terms:
        if value.op.name != PARAM or len(graph.uses(value)) > 1 or value in region.cuts:
            raise Refused("it is added to a partial sum, but is not a weight of this matmul alone", value)


def _add_units(region: Region, op: Op, factor: Factor, unit: Unit) -> None:
    """Adds what an operation requires to stay together: steps of its factor, and blocks of a weight's format."""
    for place, value in _places(op, factor):
        units = [region.units[value], place.inner]
        if op.name == "aten.linear" and value is op["weight"] and isinstance(value.type, TensorType):
            units.append(unit[place.axis])
        region.units[value] = ALL if ALL in units else lcm(*units)
