"""Regions: the values that must be cut together so that a matmul can sum over parts of its reduction axis.

    %gate = aten.linear(%x, %w1)             %w1 rows      cut
    %up   = aten.linear(%x, %w2)             %w2 rows      cut
    %h    = aten.mul.Tensor(%gate, %up)      last axis     cut
    %y    = aten.linear(%h, %w3)             %w3 columns   cut; %y is a partial sum

A region starts at the reduction axis of a linear and grows through the factors of all operations that define or use a
value of the region (see `sharding_rules`), until only weights and partial sums are left. So the linears before the sum
compute columns, the operations between them keep columns or heads apart, and `%x` is replicated. A region that
reaches an input, an output, or an operation without a suitable factor is refused with the reason.

Heads of keys that several parts of the queries read are in several parts, and a single head is in all of them: then it
is whole. A norm over the axis of the region is in it only if the norm can be taken apart (see `split-norms`).

A large table of embeddings, and a large linear whose result leaves the graph, are a separate region: their columns
are cut, and the result is gathered.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from math import lcm

from passes.analyses.candidates import is_stored_quantized, why_not_quantized
from passes.analyses.channel_labels import Slot
from passes.analyses.layers import why_not_selected
from passes.analyses.sharding_cuts import Cutting, Heads, Refused, Region, Unit, copies_of
from passes.analyses.sharding_factors import Factor, Place, shape_of, value_at
from passes.analyses.sharding_rules import NORMS, row_of
from qcompiler.dialects.aten import is_pointwise
from qcompiler.ir import ALL, Graph, Missed, Op, Role, Size, TensorType, Value
from qcompiler.ir.dataflow import users_through
from qcompiler.ir.graph import PARAM
from qcompiler.ir.structure import INPUT, RETURN

ONLY_HEAD = Missed("its only head belongs to the query heads of all ranks")


def regions(graph: Graph, cutting: Cutting) -> tuple[list[Region], Mapping[Op, Missed]]:
    """The regions of a graph that can be cut, and why other linears and large tables are in none.

    A linear that only starts no region, but computes columns of one that cannot be cut, has the reason of that region.
    """
    found: list[Region] = []
    missed: dict[Op, Missed] = {}
    inside: dict[Op, Missed] = {}
    owners: set[Op] = set()
    for op, factor in (*matmul_sums(graph), *_tables(graph, cutting.gather)):
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
        elif (why := region.why_not()) is not None:
            missed[op] = why
            inside |= dict.fromkeys(region.factors, why)
        else:
            found.append(region)
            owners.update(region.factors)
            inside |= dict.fromkeys(_linears_of(graph, region.whole), ONLY_HEAD)
    return found, {op: inside.get(op, why) for op, why in missed.items() if op not in owners}


def _linears_of(graph: Graph, values: Iterable[Value]) -> Iterator[Op]:
    """The linears that compute values, through any other operations."""
    stack, seen = list(values), set[Value]()
    while stack:
        value = stack.pop()
        if value.op.name == "aten.linear":
            yield value.op
        elif value not in seen and not graph.is_constant(value):
            seen.add(value)
            stack += [operand for _, operand in value.op.operands()]


def matmul_sums(graph: Graph) -> Iterator[tuple[Op, Factor]]:
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
    region, queue = Region(cutting.parts, gathered=[] if factor.summed else [start.result]), deque[Value]()
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
            _cut(region, queue, op, _factor(op, value, region.cuts[value], cutting.split), value)
            _check_reductions(region)
    _check(graph, region)
    for op, cut in region.factors.items():
        if _reads_weights(graph, op) and (excluded := why_not_selected(cutting.layers, op, graph)) is not None:
            region.excluded = Missed(excluded.why, op.result)
        _add_units(region, op, cut, unit_of(graph, op, cutting))
    return region


def unit_of(graph: Graph, op: Op, cutting: Cutting) -> Unit:
    """Rows and columns that must stay together in the weight of a linear."""
    if why_not_quantized(op, graph, cutting.named) is not None:
        return 1, 1
    return (1, cutting.stored) if cutting.stored and is_stored_quantized(op["weight"]) else cutting.unit


def _reads_weights(graph: Graph, op: Op) -> bool:
    """Whether an operation is a layer that patterns select: a linear or a lookup in a constant table."""
    return op.name in ("aten.linear", "aten.embedding") and graph.is_constant(op["weight"])


def _factors(op: Op) -> list[Factor]:
    row = row_of(op)
    return list(row.factors(op)) if row is not None else []


def _factor(op: Op, value: Value, axis: int, split: bool) -> Factor:
    """The factor of an operation that a value has along an axis, at every place where the operation has the value."""
    row = row_of(op)
    if row is None:
        raise Refused(f"{op.name} is not known to keep parts apart", value)
    slots: list[Slot] = [path for path, operand in op.operands() if operand is value]
    slots += [index for index, result in enumerate(op.results) if result is value]
    factors = [*_factors(op), *(NORMS[op.name](op) if split and op.name in NORMS else ())]
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


def _cut(region: Region, queue: deque[Value], op: Op, factor: Factor, start: Value | None = None) -> None:
    """Cuts an operation along a factor, and all values that have it, from a value that is cut already."""
    known = region.factors.setdefault(op, factor)
    if op.name in NORMS and factor not in _factors(op) and op not in region.norms:
        region.norms.append(op)
    if known != factor:
        raise Refused(f"{op.name} would be cut along two of its loops", op.results[0])
    for value, heads in _heads(region, op, factor, start).items():
        if value in region.units and region.copies(value) != copies_of(heads, region.parts):
            raise Refused("its heads would be shared and divided at once", value)
        region.heads |= {} if heads is None else {value: heads}
    singles = (value_at(op, place.slot) for place in factor.places if _is_single(op, place))
    region.whole += [single for single in singles if single is not None]
    for place, value in _places(op, factor):
        if region.cuts.setdefault(value, place.axis) != place.axis:
            raise Refused(f"it would be cut along axes {region.cuts[value]} and {place.axis}", value)
        if value not in region.units:
            region.units[value] = 1
            queue += [] if value in region.gathered else [value]
    if factor.summed and any(region.copies(value) > 1 for _, value in _places(op, factor)):
        raise Refused("several ranks hold the same heads, so that a sum over ranks would add them again", op.results[0])
    if factor.summed and op.results[0] not in region.partials:
        region.partials.append(op.results[0])
        region.terms += [term for path in factor.terms if (term := value_at(op, path)) is not None]


def _heads(region: Region, op: Op, factor: Factor, start: Value | None) -> dict[Value, Heads | None]:
    """The shared heads that the values of a factor hold, given the ones of a value that is cut already."""
    places = list(_places(op, factor))
    found = {value: Heads(int(str(value.tensor.shape[at.axis])), at.shared) for at, value in places if at.shared > 1}
    known = region.heads.get(start) if start is not None else None
    if not found:
        return {value: known for _, value in places}
    if start is not None and start not in found and copies_of(known, region.parts) > 1:
        raise Refused("its heads are shared twice", start)
    return {value: found.get(value) for _, value in places}


def _places(op: Op, factor: Factor) -> Iterator[tuple[Place, Value]]:
    """The places of values that are cut."""
    for place in factor.places:
        if (value := value_at(op, place.slot)) is not None and not _is_single(op, place):
            yield place, value


def _is_single(op: Op, place: Place) -> bool:
    """Whether all steps of a factor share one head."""
    return place.shared > 1 and shape_of(op, place.slot)[place.axis] == 1


def _check_reductions(region: Region) -> None:
    """Raises Refused for norms over what several matmuls, or one with a wider result, sum over.

    Several matmuls read a residual stream, and one with a wide result reads a latent: their sums cost more than they
    save.
    """
    if not region.norms and all(value.op.name != "aten.sum.dim_IntList" for value in region.partials):
        return
    sums = [value for value in region.partials if value.op.role is Role.MATMUL]
    if len(sums) > 1:
        raise Refused("a norm and several matmuls would sum over its ranks", sums[-1])
    for value in sums:
        if (wide := value.tensor.shape[-1]) != (size := value.op["x"].tensor.shape[-1]) and not _is_less(wide, size):
            raise Refused(f"ranks would add {wide} numbers to divide a norm of {size}", value)


def _is_less(one: Size, other: Size) -> bool:
    return isinstance(one, int) and isinstance(other, int) and one < other


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
