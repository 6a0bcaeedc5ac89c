"""Regions of a mixture of experts: from the numbers of the experts, through matmuls of sorted rows, back to tokens.

    %key, %order = aten.sort(%expert)                    KEYS, ORDER
    %token = aten.floor_divide(%order, 2)                TOKEN
    %x = aten.index.Tensor(%h, [%token])                 ROWS: one for each entry, sorted by expert
    %ends = aten.cumsum(aten.histc(%key, 8, 0, 7))       ENDS
    %y = aten._grouped_mm(%x, %w, %ends)                 OWN: rows after the last group are zero
    %place = aten.index_put(%empty, [%order], %i)        PLACE: the inverse of the order
    %o = aten.index.Tensor(%y, [%place])                 TERM: in the order of entries again

If a rank has some of the experts, and sorts their entries to the front, its matmuls return zeros for all other entries.
So what follows in the order of entries is a term of a sum over ranks; if an operation on the way does not keep zeros,
such as adding a bias, the rows are made zero before. Other orders of the entries are legal, because
an order is used only as an index. Anything else that reads a value in sorted order is refused.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum

from passes.analyses.sharding_rules import row_of
from qcompiler.ir import Graph, Missed, Op, Role, TensorType, Value


class Tag(Enum):
    """What a value in a region holds."""

    KEYS = "the sorted numbers of the experts"
    ORDER = "the order of the entries by expert"
    TOKEN = "the tokens of the entries in the order by expert"
    PLACE = "the place of each entry in the order by expert"
    COUNTS = "the number of entries of each expert"
    ENDS = "the end of each expert's entries"
    ROWS = "rows sorted by expert"
    OWN = "rows sorted by expert, zero unless an expert of this rank computes them"
    TERM = "a term of a sum over ranks, in the order of the entries or of the tokens"


GROUPED = ("aten._grouped_mm", "transformers.grouped_mm_fallback")
"""Grouped matmuls in floating point: x, w, offsets."""

OWN_FIRST = "coll.own_first"

SORTS = ("aten.sort", "aten.sort.stable")

ZERO_STAYS = frozenset(
    f"aten.{name}"
    for name in ("silu", "gelu", "relu", "tanh", "neg", "abs", "square", "_to_copy", "to.dtype", "clone", "contiguous")
)
"""Elementwise operations that map zero to zero."""

LINEAR = frozenset(f"aten.{name}" for name in ("_to_copy", "to.dtype", "clone", "contiguous", "sum.dim_IntList"))
"""Operations by which a sum of terms is the sum of the results, besides views and products with other values."""


SIZES = ("aten.empty_like", "aten.zeros_like", "aten.new_empty", "aten.new_zeros", "aten.sym_size.int")
"""Operations that read the sizes of their operand only."""


class Refused(Exception):
    """The experts cannot be divided: the reason and the value that prevents it."""

    def __init__(self, why: str, value: Value) -> None:
        super().__init__(why)
        self.missed = Missed(why, value)


@dataclass
class ExpertRegion:
    """One mixture of experts.

    Attributes:
        sort: The operation that sorts the entries by expert.
        tags: What each value of the region holds.
        matmuls: The grouped matmuls.
        experts: The number of experts.
        sums: Terms of a sum over ranks that other operations read.
        lookups: Operations that look up a row of a stored table for the expert of each entry, such as a bias.
        returns: Operations that read rows in the sorted order and return terms.
    """

    sort: Op
    tags: dict[Value, Tag] = field(default_factory=dict)
    matmuls: list[Op] = field(default_factory=list)
    experts: int = 0
    sums: list[Value] = field(default_factory=list)
    lookups: list[Op] = field(default_factory=list)
    returns: list[Op] = field(default_factory=list)

    @property
    def ends(self) -> list[Value]:
        """The ends of the groups, as matmuls read them."""
        return list(dict.fromkeys(ends for op in self.matmuls if (ends := _ends(op)) is not None))


def expert_regions(graph: Graph) -> tuple[list[ExpertRegion], Mapping[Op, Missed]]:
    """The mixtures of experts of a graph, and why other grouped matmuls are in none."""
    found: list[ExpertRegion] = []
    missed: dict[Op, Missed] = {}
    matmuls = [op for op in graph.ops() if op.name in GROUPED]
    for sort in graph.ops() if matmuls else ():
        if sort.name not in SORTS or graph.is_constant(sort["self"]):
            continue
        region = ExpertRegion(sort)
        try:
            _follow(graph, region)
        except Refused as reason:
            missed |= {op: reason.missed for op in matmuls if _ends(op) in region.tags}
            continue
        if region.matmuls:
            found.append(region)
    taken = {op for region in found for op in region.matmuls}
    unknown = {op: Missed("its groups are not counts of one sorted vector of experts", op.results[0]) for op in matmuls}
    return found, {op: why for op, why in (unknown | missed).items() if op not in taken}


def _ends(op: Op) -> Value | None:
    ends = op.args[2] if len(op.args) > 2 else op.attrs.get("offs")
    return ends if isinstance(ends, Value) else None


def _follow(graph: Graph, region: ExpertRegion) -> None:
    """Tags all values from the sort on; raises Refused at an operation that must not read one of them."""
    keys, order = region.sort.results
    region.tags.update({keys: Tag.KEYS, order: Tag.ORDER})
    refused: Refused | None = None
    for op in graph.ops():
        read = {value: region.tags[value] for _, value in op.operands() if value in region.tags}
        if not read or op.name in SIZES:
            continue
        tag = _tag(graph, region, op, read)
        if tag is not None:
            region.tags.update(dict.fromkeys(op.results, tag))
        elif set(read.values()) == {Tag.TERM}:
            region.sums += [value for value in read if value not in region.sums]
        else:  # later matmuls of the region have the reason, too
            value, held = next((value, tag) for value, tag in read.items() if tag is not Tag.TERM)
            refused = refused or Refused(f"{op.name} reads {held.value.partition(',')[0]}", value)
    returned = [value for _, value in graph.return_op.operands() if value in region.tags]
    region.sums += [value for value in returned if value not in region.sums]
    if odd := next((value for value in returned if region.tags[value] is not Tag.TERM), None):
        refused = refused or Refused("it is an output of the model", odd)
    if refused is not None:
        raise refused


def _tag(graph: Graph, region: ExpertRegion, op: Op, read: Mapping[Value, Tag]) -> Tag | None:
    """What the results of an operation hold; None if it must not read these values."""
    if op.name in GROUPED:
        return _multiplied(graph, region, op, read)
    tags = set(read.values())
    if len(tags) == 1 and (rule := INDEXES.get(next(iter(tags)))) is not None and (made := rule(region, op)):
        return made
    if op.name == "aten.index.Tensor":
        return _indexed(graph, region, op, read)
    if op.name == "coll.own_rows":
        return Tag.OWN
    if op.name == "aten.index_put":
        return _inverted(op, read)
    if op.name == "aten.index_add":
        return _added(region, op, read)
    if tags <= {Tag.ROWS, Tag.OWN}:
        return _rowwise(graph, op, read)
    return _linear(op, read) if tags == {Tag.TERM} else None


def _multiplied(graph: Graph, region: ExpertRegion, op: Op, read: Mapping[Value, Tag]) -> Tag | None:
    """A grouped matmul of sorted rows: rows after its last group are zero."""
    x, w, ends = op.args[0], op.args[1], _ends(op)
    if not isinstance(x, Value) or read.get(x) not in (Tag.ROWS, Tag.OWN):
        return None
    if ends is None or read.get(ends) is not Tag.ENDS or len(read) > 2:
        return None
    if not isinstance(w, Value) or not graph.is_constant(w) or w.tensor.shape[0] != region.experts:
        return None
    region.matmuls.append(op)
    return Tag.OWN


def _of_keys(region: ExpertRegion, op: Op) -> Tag | None:
    own = region.sort["self"].op  # the experts of one rank, if they are divided already
    if op.role is Role.CAST or (op.name == "aten.clamp" and own.name == OWN_FIRST):
        return Tag.KEYS
    bins = op.argument("bins") if op.name == "aten.histc" else None
    if not isinstance(bins, int) or (op.argument("min"), op.argument("max")) != (0, bins - 1):
        return None
    region.experts = bins // int(str(own.attrs["ranks"])) if own.name == OWN_FIRST else bins
    return Tag.COUNTS


def _of_counts(region: ExpertRegion, op: Op) -> Tag | None:
    return Tag.COUNTS if op.role is Role.CAST else Tag.ENDS if op.name == "aten.cumsum" else None


def _of_order(region: ExpertRegion, op: Op) -> Tag | None:
    if op.name in ("aten.floor_divide", "aten.div.Tensor_mode") and isinstance(op.argument("other"), int):
        return Tag.TOKEN
    if op.name in ("aten.argsort", "aten.argsort.stable") and not op.argument("descending"):
        return Tag.PLACE
    return Tag.ORDER if op.role is Role.CAST else None


INDEXES: Mapping[Tag, Callable[[ExpertRegion, Op], Tag | None]] = {
    Tag.KEYS: _of_keys,
    Tag.COUNTS: _of_counts,
    Tag.ENDS: lambda _, op: Tag.ENDS if op.role is Role.CAST or op.name == "aten.slice.Tensor" else None,
    Tag.ORDER: _of_order,
    Tag.TOKEN: lambda _, op: Tag.TOKEN if op.role is Role.CAST else None,
    Tag.PLACE: lambda _, op: Tag.PLACE if op.role is Role.CAST else None,
}
"""What operations on indexes return; other operations read an index as an index."""


def index_of(op: Op) -> Value | None:
    """The one index of an operation, along the first axis."""
    given = op.argument("indices")
    first = given[0] if isinstance(given, tuple) and len(given) == 1 else None
    return first if isinstance(first, Value) else None


def _indexed(graph: Graph, region: ExpertRegion, op: Op, read: Mapping[Value, Tag]) -> Tag | None:
    """Rows of tokens or of experts in sorted order, or sorted rows in the order of entries."""
    index, table = index_of(op), op["self"]
    match (read.get(index) if index is not None else None), read.get(table):
        case ((Tag.ORDER | Tag.TOKEN), None):
            return Tag.ROWS
        case Tag.PLACE, (Tag.ROWS | Tag.OWN):
            region.returns.append(op)
            return Tag.TERM
        case Tag.KEYS, None if graph.is_constant(table) and table.tensor.shape[0] == region.experts:
            region.lookups.append(op)
            return Tag.ROWS
    return None


def _inverted(op: Op, read: Mapping[Value, Tag]) -> Tag | None:
    """0, 1, … written at the places of an order."""
    index, values = index_of(op), op["values"]
    counted = values.op.name == "aten.arange" and values not in read and not op.argument("accumulate")
    return Tag.PLACE if counted and index is not None and read.get(index) is Tag.ORDER else None


def _added(region: ExpertRegion, op: Op, read: Mapping[Value, Tag]) -> Tag | None:
    """Sorted rows added to zeros at the rows of their tokens."""
    zeros = op["self"].op.name in ("aten.zeros", "aten.zeros_like", "aten.new_zeros")
    known = read.get(op["index"]) in (Tag.ORDER, Tag.TOKEN) and read.get(op["source"]) in (Tag.ROWS, Tag.OWN)
    if not zeros or not known or op.argument("dim") != 0:
        return None
    region.returns.append(op)
    return Tag.TERM


def _rowwise(graph: Graph, op: Op, read: Mapping[Value, Tag]) -> Tag | None:
    """An operation on each row alone: zero rows stay zero, or are arbitrary."""
    others = [value for _, value in op.operands() if value not in read]
    if not all(graph.is_constant(value) or not isinstance(value.type, TensorType) for value in others):
        return None
    if not keeps_rows(op, read):
        return None
    own = set(read.values()) == {Tag.OWN}
    if op.name in ("aten.add.Tensor", "aten.sub.Tensor"):
        return Tag.OWN if own and len(read) == 2 else Tag.ROWS
    if op.name == "aten.mul.Tensor":
        return Tag.OWN if Tag.OWN in read.values() else Tag.ROWS
    return Tag.OWN if own and (op.role is Role.VIEW or op.name in ZERO_STAYS) else Tag.ROWS


def keeps_rows(op: Op, read: Collection[Value]) -> bool:
    """Whether row i of the results depends on row i of some operands only."""
    row = row_of(op)
    for factor in row.factors(op) if row is not None else ():
        places = {place.slot: (place.axis, place.inner) for place in factor.places}
        slots = [path for path, value in op.operands() if value in read]
        if places.get(0) == (0, 1) and all(places.get(slot) == (0, 1) for slot in slots):
            return not factor.summed
    return False


def _linear(op: Op, read: Mapping[Value, Tag]) -> Tag | None:
    """An operation that maps a sum of terms to the sum of the results."""
    if op.role is Role.VIEW or op.name in LINEAR:
        return Tag.TERM if op.results[0].tensor.dtype.is_float else None
    once = sum(value in read for _, value in op.operands()) == 1
    return Tag.TERM if op.name == "aten.mul.Tensor" and once else None
