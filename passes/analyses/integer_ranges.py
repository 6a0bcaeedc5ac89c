"""Limits of the elements of integer tensors, from the operations that compute them.

%best, %expert = aten.topk(%scores, 2)      scores [s0, 8]: 0 <= expert <= 7
%key, %order = aten.sort(%expert)           expert [s0]: 0 <= key <= 7, 0 <= order <= s0 - 1
%none = aten.ge.Scalar(%key, 8)             false everywhere
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from passes.analyses.elements import Elements
from passes.analyses.index_expressions import Unknown
from passes.analyses.index_moves import MOVES
from passes.analyses.inequalities import Condition, Conjunction, TooComplex, impossible, nonnegative, unknowns
from qcompiler.dialects.expression_nodes import elements
from qcompiler.ir import DType, Graph, Op, Size, TensorType, Value
from qcompiler.ir.sizes import Expr, symbol


class Limits(NamedTuple):
    """The smallest and the largest number that an element may be; a tensor without elements has any limits."""

    low: Size
    high: Size


def limits_of(value: Value) -> Limits | None:
    """The limits of all elements of a value; None if they are unknown."""
    if not isinstance(value.type, TensorType) or value.tensor.dtype not in (DType.i64, DType.i32):
        return None
    op = value.op
    if op.name in PLACES and value.index == PLACES[op.name]:
        return _places(op)
    row = _same if op.name in MOVES else ROWS.get(op.name)
    return row(op) if row is not None else None


def facts_about(graph: Graph, size: Size) -> Conjunction:
    """What holds for the elements of integer tensors, such as `%ids(i0)`, in an index expression."""
    found: list[Size] = []
    for element in elements(size):
        limits = limits_of(graph[element.function.removeprefix("%")])
        if limits is not None:
            each = Expr((((element,), 1),))
            found += each - limits.low, limits.high - each
    return frozenset(fact for fact in found if isinstance(fact, Expr))


def is_false(graph: Graph, mask: Value) -> bool:
    """Whether all elements of a boolean value are proven to be false."""
    memory = Elements(graph)
    at = tuple(symbol(f"i{axis}") for axis in range(len(mask.tensor.shape)))
    ends = [size - 1 - index for index, size in zip(at, mask.tensor.shape, strict=True)]
    facts = memory.facts | {fact for fact in (*at, *ends) if isinstance(fact, Expr)}
    try:
        condition = memory.element(mask, at, facts).truth(facts)
    except (Unknown, TooComplex):
        return False
    return impossible(condition, facts | _facts_about_all(graph, condition))


def _facts_about_all(graph: Graph, condition: Condition) -> Conjunction:
    sizes = (Expr(((atoms, 1),)) for atoms in unknowns(condition))
    return frozenset(fact for size in sizes for fact in facts_about(graph, size))


# Rows of the table


def _places(op: Op) -> Limits | None:
    """Places along an axis, counted from 0."""
    x, axis = op["self"].tensor.shape, op.argument("dim")
    if not isinstance(axis, int) or isinstance(axis, bool):
        return None
    return Limits(0, (x[axis % len(x)] if x else 1) - 1)


def _same(op: Op) -> Limits | None:
    """The elements of the first operand, or some of them."""
    x = op.args[0] if op.args else None
    return limits_of(x) if isinstance(x, Value) else None


def _joined(op: Op) -> Limits | None:
    """The limits that all parts have."""
    parts = op.argument("tensors")
    found = {limits_of(part) for part in parts if isinstance(part, Value)} if isinstance(parts, tuple) else set()
    return found.pop() if len(found) == 1 else None


def _converted(op: Op) -> Limits | None:
    """The same numbers in another integer type that holds them."""
    limits = _same(op)
    if limits is None or op.result.tensor.dtype is DType.i64:
        return limits
    fits = all(isinstance(size, int) and -(2**31) <= size < 2**31 for size in limits)
    return limits if fits else None


def _quotient(op: Op) -> Limits | None:
    """A number that is not negative, divided by a positive integer."""
    limits, by = _same(op), op.argument("other")
    if limits is None or not isinstance(by, int) or by < 1 or not _is_nonnegative(limits.low):
        return None
    return Limits(0, limits.high // by)


def _counted(op: Op) -> Limits | None:
    """0, 1, …, n - 1."""
    end = op.result.tensor.shape[0]
    return Limits(0, end - 1)


def _renumbered(op: Op) -> Limits | None:
    """Numbers of groups, from any first one."""
    groups = op.attrs["groups"]
    return Limits(0, groups - 1) if isinstance(groups, int) else None


def _scattered(op: Op) -> Limits | None:
    """The new elements, if they replace all elements: their places are a permutation."""
    places, values = op.argument("indices"), op.argument("values")
    if not isinstance(places, tuple) or len(places) != 1 or op.argument("accumulate") is True:
        return None
    (place,) = places
    if not isinstance(place, Value) or not isinstance(values, Value) or not is_permutation(place):
        return None
    return limits_of(values) if place.tensor.shape == op.result.tensor.shape == values.tensor.shape else None


def is_inverse(value: Value, permutation: Value) -> bool:
    """Whether a value holds 0, 1, …, n - 1 at the places that a permutation names."""
    op = value.op
    if op.name != "aten.index_put" or _scattered(op) is None:
        return False
    return op.argument("indices") == (permutation,) and op["values"].op.name == "aten.arange"


def is_sorted(value: Value) -> bool:
    """Whether a value is a vector that a sort returns: the elements or their order."""
    return value.op.name in ("aten.sort", "aten.sort.stable") and len(value.tensor.shape) == 1


def is_permutation(value: Value) -> bool:
    """Whether the elements of a vector are 0, 1, …, n - 1 in some order."""
    op = value.op
    return len(value.tensor.shape) == 1 and op.name in ORDERS and value is op.results[-1]


def _is_nonnegative(size: Size) -> bool:
    return impossible(nonnegative(-size - 1), frozenset())


ORDERS = ("aten.sort", "aten.sort.stable", "aten.argsort", "aten.argsort.stable")
"""Operations whose last result is the order that sorts their operand."""

PLACES: Mapping[str, int] = {
    "aten.topk": 1, "aten.sort": 1, "aten.sort.stable": 1, "aten.argsort": 0, "aten.argsort.stable": 0,
    "aten.argmax": 0, "aten.argmin": 0, "aten.max.dim": 1, "aten.min.dim": 1,
}  # fmt: skip
"""Operation -> the number of the result that holds places along its axis `dim`."""

ROWS: Mapping[str, Callable[[Op], Limits | None]] = {
    "aten.topk": _same,
    "aten.sort": _same,
    "aten.sort.stable": _same,
    "aten.index.Tensor": _same,
    "aten.index_select": _same,
    "aten.gather": _same,
    "aten.cat": _joined,
    "aten.stack": _joined,
    "aten._to_copy": _converted,
    "aten.to.dtype": _converted,
    "aten.floor_divide": _quotient,
    "aten.arange": _counted,
    "aten.index_put": _scattered,
    "coll.own_first": _renumbered,
}
"""Operation -> the limits of its results, besides places and moves."""
