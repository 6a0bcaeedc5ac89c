"""Mixtures of experts, seen along the sequence: entries sorted by expert, grouped matmuls, and the way back.

    %key, %order = aten.sort(%expert)               a permutation of the entries, each a token's choice of an expert
    %token = aten.floor_divide(%order, 2)           the token of the entry at each place
    %x = aten.index.Tensor(%h, [%token])            [sorted, 32]: row i belongs to entry order[i]
    %ends = aten.cumsum(aten.histc(%key, 8, 0, 7))  the end of each expert's rows
    %y = aten._grouped_mm(%x, %w, %ends)            row i is multiplied by the matrix of its own expert
    %place = aten.index_put(%empty, [%order], %i)   the inverse: the place of each entry
    %o = aten.index.Tensor(%y, [%place])            [batch*positions*2, 32]: in the order of tokens again

The order depends on all tokens, but it is used only as an index: where a row is computed does not change the row.
"""

from collections.abc import Sequence

from passes.analyses.sequence_elementwise import EXACT, cumulative, elementwise
from passes.analyses.sequence_labels import (
    Axis,
    Below,
    Digit,
    Fact,
    Fill,
    Groups,
    Iota,
    Keys,
    Label,
    Mixes,
    Order,
    axis_of,
    broadcast,
    has_tokens,
)
from passes.analyses.sequence_moves import MOVES
from passes.analyses.sequence_site import Answer, Row, Site, Table
from qcompiler.ir import Argument, DType, ScalarType, Size, Value
from qcompiler.ir.sizes import product

# Sorting


def _sort(site: Site) -> Answer:
    """Along an axis of one token's elements: sorted in place. Along all entries: a permutation, legal as an index."""
    results = site.op.results
    if isinstance(order := site.fact(site.op["self"]), Order):
        return _inverse(site, order)
    label = site.label("self")
    axis = site.axis(label)
    if not has_tokens(label.axes[axis]):
        site.within(label.axes[axis], "sorts")
        return tuple(site.made(label.axes, label) for _ in results)
    if len(label.axes) > 1 or "sorted" in [digit.kind for digit in label.axes[0]]:
        site.within(label.axes[axis], "sorts")
    entries, by = label.axes[0], results[-1]
    made = Order(by, entries, entries)
    if len(results) == 1:
        return made
    keys: Fact = site.made([_sorted(site, by)], label)
    if isinstance(label.known, Below) and not site.op.argument("descending"):
        keys = site.made([_sorted(site, by)], label, known=Keys(by, label.known.limit))
    return keys, made


def _inverse(site: Site, order: Order) -> Answer:
    """Sorting a permutation: the places that hold 0, 1, … are its inverse."""
    if order.reach != order.entries or site.op.argument("descending"):
        raise Mixes(f"{site.op.name} sorts an order that is not a permutation")
    inverse = Order(order.by, order.entries, order.entries, inverse=not order.inverse)
    if len(site.op.results) == 1:
        return inverse
    (size,) = site.shape()
    return Iota(size), inverse


def _sorted(site: Site, order: Value) -> Axis:
    return (Digit("sorted", order.tensor.shape[0], order),)


def _divide(site: Site) -> Answer:
    """Dividing a permutation of choices by the number of choices of a token gives tokens."""
    order = _fact(site, "self")
    if not isinstance(order, Order):
        return elementwise(site)
    if site.op.name == "aten.div.Tensor_mode" and site.op.argument("rounding_mode") != "floor":
        raise Mixes(f"{site.op.name} divides an order of tokens without rounding down")
    by, left = site.op.argument("other"), list(order.reach)
    last = left.pop().size if left and left[-1].kind == "other" else None
    if order.inverse or last is None or by != last:
        raise Mixes(f"{site.op.name} divides an order of tokens by {by}, which is not the number of entries of a token")
    return Order(order.by, order.entries, tuple(left))


def _kept(site: Site) -> Answer:
    """A copy or an exact cast of an order."""
    fact = _fact(site, "self")
    if isinstance(fact, Order | Iota | Groups) and site.op.result.tensor.dtype in EXACT:
        return fact
    return elementwise(site)


def _fact(site: Site, name: str) -> Fact | None:
    value = site.op.get(name)
    return None if value is None else site.fact(value)


# Groups


def _count(site: Site) -> Answer:
    """How many keys equal each integer: counts of sorted keys are the sizes of their groups."""
    label = site.label("self")
    bins, low, high = (site.op.argument(name) for name in ("bins", "min", "max"))
    keys = label.known
    if not isinstance(keys, Keys) or not isinstance(bins, int) or (low, high, keys.limit) != (0, bins - 1, bins):
        raise Mixes(f"{site.op.name} counts over all tokens")
    if label.axes != (_sorted(site, keys.order),):
        raise Mixes(f"{site.op.name} counts over all tokens")
    return Groups(keys.order, bins)


def _ends(site: Site) -> Answer:
    groups = _fact(site, "self")
    if isinstance(groups, Groups) and not groups.ends:
        return Groups(groups.order, groups.limit, ends=True)
    return cumulative(site)


def _sliced(site: Site) -> Answer:
    """The ends of the first groups: rows after the last of them are zero."""
    groups, end = _fact(site, "self"), site.op.argument("end")
    if not isinstance(groups, Groups):
        return MOVES["aten.slice.Tensor"].apply(site)
    first = site.op.argument("start") in (None, 0) and site.op.argument("step") == 1
    if not groups.ends or not first or not isinstance(end, int) or not 0 < end <= groups.limit:
        raise Mixes(f"{site.op.name} selects counts of other groups than the first ones")
    return Groups(groups.order, end, ends=True)


def grouped(site: Site, x: Label, offsets: Value | None, weights: Size) -> Label:
    """The label of a grouped matmul: row i is multiplied by the weight of its own expert.

    Row i holds the entry order[i], its key is its expert, and the ends of the groups count the keys up to each expert.
    """
    if offsets is not None and _equal_groups(offsets, x, weights):
        site.within(x.axes[1], "sums over")
        return site.made([x.axes[0], axis_of(site.shape()[1])], x)
    groups = None if offsets is None else site.fact(offsets)
    if not isinstance(groups, Groups) or not groups.ends or groups.limit != weights:
        raise Mixes(f"the groups of {site.op.name} are not the ends of the groups of one sorted key")
    if x.axes[0] != _sorted(site, groups.order):
        raise Mixes(f"the rows of {site.op.name} are {x}, which are not in the order of its groups")
    site.within(x.axes[1], "sums over")
    return site.made([x.axes[0], axis_of(site.shape()[1])], x)


def _equal_groups(offsets: Value, x: Label, weights: Size) -> bool:
    """Whether group e ends at row (e + 1) * rows, where `rows` is the number of tokens: a group for each copy of all.

    arange(1, E + 1) * rows, and rows [E*batch*positions, 32], as for Llama 4, where each expert reads all tokens
    """
    ends = offsets.op
    if ends.name != "aten.mul.Tensor" or ends["self"].op.name != "aten.arange.start":
        return False
    count, rows = ends["self"].op, ends.argument("other")
    size = rows.type.value if isinstance(rows, Value) and isinstance(rows.type, ScalarType) else rows
    copies, *tokens = x.axes[0] or (None,)
    return (
        isinstance(weights, int)
        and (count.argument("start"), count.argument("end")) == (1, weights + 1)
        and copies == Digit("other", weights)
        and has_tokens(tuple(tokens))
        and size == product(tuple(digit.size for digit in tokens))
    )


def _grouped(site: Site) -> Answer:
    x, w = site.op.args[:2]
    offsets = site.op.args[2] if len(site.op.args) > 2 else site.op.attrs.get("offs")
    weight, label = site.label(w), site.label(x)
    more = [value for _, value in site.op.operands() if value not in (x, w, offsets)]
    if not isinstance(w, Value) or (len(label.axes), len(weight.axes)) != (2, 3):
        raise Mixes(f"{site.op.name} multiplies groups of columns, not of rows")
    if not weight.free or not all(site.label(value).free for value in more):
        raise Mixes(f"the matrices of {site.op.name} depend on the tokens")
    return grouped(site, label, offsets if isinstance(offsets, Value) else None, w.tensor.shape[0])


def _own_rows(site: Site) -> Answer:
    """Whether a row is after the last group depends on its own key."""
    x, groups = site.label("x"), _fact(site, "ends")
    if not isinstance(groups, Groups) or not groups.ends or x.axes[0] != _sorted(site, groups.order):
        raise Mixes(f"the rows of {site.op.name} are {x}, which are not in the order of its groups")
    return x


# Indexing


def _index(site: Site) -> Answer:
    """A weight's rows at any index; tokens' rows at an order of tokens; along other axes at a fixed index."""
    given = site.op.argument("indices")
    indices = [(axis, v) for axis, v in enumerate(given if isinstance(given, tuple) else ()) if isinstance(v, Value)]
    if len(indices) == 1 and isinstance(order := site.fact(indices[0][1]), Order):
        return reordered(site, site.label("self"), indices[0][0], order)
    label, picked = site.label("self"), [axis for axis, _ in indices]
    if any(v.tensor.dtype in (DType.b8, DType.u8) for _, v in indices):
        raise Mixes(f"{site.op.name} selects with a mask, so the number of elements depends on the tokens")
    for axis in picked:
        site.within(label.axes[axis], "picks among")
    labels = [site.label(v) for _, v in indices]
    new = broadcast(*labels)
    adjacent = bool(picked) and picked == list(range(picked[0], picked[-1] + 1))
    kept = [at for at in range(len(label.axes)) if at not in picked]
    before = len([at for at in kept if at < picked[0]]) if adjacent else 0
    axes = [label.axes[at] for at in kept]
    return site.made([*axes[:before], *new, *axes[before:]], label, *labels)


def reordered(site: Site, label: Label, axis: int, order: Order) -> Label:
    """Entries in sorted order, or sorted rows back in the order of entries."""
    old = label.axes[axis]
    known = label.known if isinstance(label.known, Fill | Below) else None
    new: Axis
    if order.inverse:
        if old != _sorted(site, order.by):
            raise Mixes(f"{site.op.name} undoes an order that its operand is not in")
        new = order.entries
    elif old == order.reach:
        new = _sorted(site, order.by)
    else:
        raise Mixes(f"{site.op.name} picks rows in an order of other entries")
    return site.made([*label.axes[:axis], new, *label.axes[axis + 1 :]], label, known=known)


def _put(site: Site) -> Answer:
    """The inverse of an order: writes i at order[i]. Or sorted rows written, or added, to the rows they belong to."""
    order = _only_index(site)
    values = site.fact(site.op["values"])
    if isinstance(values, Iota):
        if order.inverse or order.reach != order.entries or site.op.argument("accumulate"):
            raise Mixes(f"{site.op.name} writes numbers in an order that is not a permutation")
        if (values.size,) != site.shape() or values.size != order.by.tensor.shape[0]:
            raise Mixes(f"{site.op.name} writes only a part of the inverse order")
        return Order(order.by, order.entries, order.entries, inverse=True)
    if order.reach != order.entries and not site.op.argument("accumulate"):
        raise Mixes(f"{site.op.name} writes several entries to one row, and keeps only one")
    return _returned(site, order, site.label("values"))


def _only_index(site: Site) -> Order:
    given = site.op.argument("indices")
    first = given[0] if isinstance(given, tuple) and len(given) == 1 else None
    return _as_order(site, first)


def _as_order(site: Site, index: Argument) -> Order:
    order = site.fact(index) if isinstance(index, Value) else None
    if not isinstance(order, Order) or order.inverse:
        raise Mixes(f"{site.op.name} writes to rows that another token may choose")
    return order


def _add(site: Site) -> Answer:
    """Sorted rows added to the rows of their tokens."""
    order, into = _as_order(site, site.op["index"]), site.label("self")
    if site.axis(into) != 0:
        raise Mixes(f"{site.op.name} adds along an axis that is not the first")
    return _returned(site, order, site.label("source"))


def _returned(site: Site, order: Order, rows: Label) -> Label:
    into = site.label("self")
    if not rows.axes or rows.axes[0] != _sorted(site, order.by):
        raise Mixes(f"{site.op.name} writes rows that are not in the order of its index")
    if _size(order.reach) != site.shape()[0]:
        raise Mixes(f"{site.op.name} writes to {site.shape()[0]} rows, but the order has {_size(order.reach)}")
    home = Label((order.reach, *rows.axes[1:]), content=rows.content, numbers=rows.numbers)
    return site.made(broadcast(into, home), into, home)


def _size(axis: Sequence[Digit]) -> Size:
    total: Size = 1
    for digit in axis:
        total = total * digit.size
    return total


_PERMUTED = "An order depends on all tokens, but as an index it only says where a token's row is computed."

EXPERTS: Table = {
    "aten.sort": Row(_PERMUTED, _sort),
    "aten.sort.stable": Row(_PERMUTED, _sort),
    "aten.argsort": Row(_PERMUTED, _sort),
    "aten.argsort.stable": Row(_PERMUTED, _sort),
    "aten.floor_divide": Row("Entry e belongs to token e // k if each token has k entries.", _divide),
    "aten.div.Tensor_mode": Row("Entry e belongs to token e // k if each token has k entries.", _divide),
    "aten._to_copy": Row("Copies and exact casts of an order are the order.", _kept),
    "aten.to.dtype": Row("Copies and exact casts of an order are the order.", _kept),
    "aten.clone": Row("Copies and exact casts of an order are the order.", _kept),
    "aten.histc": Row("Counts of sorted keys are the sizes of the groups of equal keys.", _count),
    "aten.cumsum": Row("Sums of the sizes of groups are their ends.", _ends),
    "aten.slice.Tensor": Row("The first ends of groups are ends of groups.", _sliced),
    "aten._grouped_mm": Row("Each row is multiplied by the matrix of its own key.", _grouped),
    "transformers.grouped_mm_fallback": Row("Each row is multiplied by the matrix of its own key.", _grouped),
    "coll.own_rows": Row("Each row is kept or made zero by its own key.", _own_rows),
    "aten.index.Tensor": Row("Each token picks a row for itself.", _index),
    "aten.index_put": Row("Each entry is written to its own row.", _put),
    "aten.index_add": Row("Each entry is added to the row of its token.", _add),
}
"""Operation of a mixture of experts -> why and how it is position-wise."""
