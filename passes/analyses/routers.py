"""Routers of mixtures: from a linear that a top-k reads to the chosen experts and their weights, row by row.

    %l = aten.linear(%x, %w) : f32[s0, 8]                       %x holds one token in each row
    %p = aten.softmax.int(%l, -1) : f32[s0, 8]
    %best, %chosen = aten.topk(%p, 2) : f32[s0, 2], i64[s0, 2]
    %groups = aten.view(%p, [-1, 2, 4]) : f32[s0, 2, 4]         limits on groups of experts have more axes

Row i of each result depends only on row i of %x, so a rank can compute the choices of its own tokens alone. Other ranks
need only the choices, which have few bytes.
"""

from collections.abc import Collection, Iterable

from passes.analyses.candidates import feeds_topk
from passes.analyses.sharding_rules import row_of
from qcompiler.ir import Graph, Op, ScalarType, TensorType, Value

SMALL = 16
"""A router is listed if its choices have at most this part of the bytes of the rows that it reads."""


def routers(graph: Graph) -> set[Op]:
    """The operations of all routers whose tokens are the rows of a matrix; others read only matrices of them."""
    found: set[Op] = set()
    for first in (op for op in graph.ops("aten.linear") if _is_first(op, graph)):
        members = _after(graph, first)
        choices = [value for op in members for value in op.results if not members.issuperset(graph.users(value))]
        if SMALL * _row_bytes(choices) <= _row_bytes([first["input"]]):
            found |= members
    return found


def _after(graph: Graph, first: Op) -> set[Op]:
    """A linear and the operations after it on its rows."""
    members, waiting = {first}, [first]
    while waiting:
        users = (user for value in waiting.pop().results for user in graph.users(value))
        new = {user for user in users if user not in members and _follows(user, graph, members)}
        members |= new
        waiting += new
    while odd := {op for op in members if op is not first and not _is_closed(op, graph, members)}:
        members -= odd
    return members


def _row_bytes(values: Iterable[Value]) -> int:
    """Bytes of a row of matrices with a fixed number of columns."""
    return sum(int(str(value.tensor.shape[-1])) * value.tensor.dtype.bits // 8 for value in values)


def _is_first(op: Op, graph: Graph) -> bool:
    """Whether an operation is a linear of rows that decides which experts they choose, whole on each rank."""
    if len(op.result.tensor.shape) != 2 or not graph.is_constant(op["weight"]):
        return False
    kinds = [value.type for value in (op.result, *(value for _, value in op.operands()))]
    whole = not any(isinstance(kind, TensorType) and kind.sharding for kind in kinds)
    return whole and feeds_topk(op.result, graph)


def _follows(op: Op, graph: Graph, members: Collection[Op]) -> bool:
    """Whether each row of the results depends only on the same rows of what a router has computed."""
    rows = {path for path, value in op.operands() if value.op in members}
    if not rows or not all(_is_fixed(value, graph) for path, value in op.operands() if path not in rows):
        return False
    row, results = row_of(op), [value.type for value in op.results]
    if row is None or not all(isinstance(kind, TensorType) and len(kind.shape) > 1 for kind in results):
        return False
    if row.sizes is not None and not all(isinstance(size, int) for size in op.result.tensor.shape[1:]):
        return False
    if row.sizes is None and any(isinstance(value.type, ScalarType) for _, value in op.operands()):
        return False
    together = rows | set(range(len(results)))
    return any(
        {place.slot for place in factor.places} == together
        and all((place.axis, place.inner, place.shared) == (0, 1, 1) for place in factor.places)
        for factor in row.factors(op)
        if not factor.summed
    )


def _is_fixed(value: Value, graph: Graph) -> bool:
    """Whether an operand is the same for all rows: a constant, or a size."""
    return graph.is_constant(value) or not isinstance(value.type, TensorType)


def _is_closed(op: Op, graph: Graph, members: Collection[Op]) -> bool:
    """Whether an operation still follows the others, and operations outside read it only if it returns matrices."""
    inside = all(user in members for value in op.results for user in graph.users(value))
    return _follows(op, graph, members) and (inside or all(len(value.tensor.shape) == 2 for value in op.results))
