"""Linears that compute several projections at once: operations read only ranges of their columns.

    %qkv = aten.linear(%x, %w) : f32[s0, s1, 512]
    %h = aten.view(%qkv, [%b, %s, 16, 32]) : f32[s0, s1, 16, 32]
    %q, %k, %v = aten.split_with_sizes(%h, [8, 4, 4], 2)        columns 0 to 255, 256 to 383, 384 to 511

The columns are followed through operations that keep them in order along one axis: views, transposes, casts and other
elementwise functions. These are the factors of `sharding_rules`: what can be cut along the columns can be computed for
a range of them. Heads with interleaved projections, [heads, 3, d], are not ranges; they can be cut as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import lcm

from passes.analyses.constants import is_read_elsewhere
from passes.analyses.sharding_cuts import Refused
from passes.analyses.sharding_factors import axis_of, range_of, shape_of
from passes.analyses.sharding_rules import factor_at, row_of
from qcompiler.ir import Graph, Missed, Op, Value
from qcompiler.ir.graph import PARAM

Range = tuple[int, int]
"""The first element, and the one after the last."""


@dataclass(frozen=True)
class Lie:
    """Where the columns of a linear are in a value: in order along an axis.

    Attributes:
        axis: The axis.
        elements: Consecutive elements of the axis that hold a number of columns together.
        columns: That number.
    """

    axis: int
    elements: int = 1
    columns: int = 1

    def range_of(self, elements: Range) -> Range | None:
        """The columns in a range of elements; None if it separates columns of which each element has a part."""
        begin, end = elements
        if begin % self.elements or end % self.elements:
            return None
        return begin // self.elements * self.columns, end // self.elements * self.columns

    def size(self, columns: Range) -> int:
        """The number of elements for a range of columns."""
        return (columns[1] - columns[0]) // self.columns * self.elements


@dataclass(frozen=True)
class Step:
    """An operation that keeps the columns in order.

    Attributes:
        op: The operation.
        lie: How the columns lie in its result.
    """

    op: Op
    lie: Lie


@dataclass(frozen=True)
class Piece:
    """A range of columns, read as one value.

    Attributes:
        columns: The range.
        steps: The operations between the linear and the operation that takes the range.
        value: Its result: the range of the last step.
        gone: The axis of one element that this operation removes; None if it keeps all axes.
    """

    columns: Range
    steps: tuple[Step, ...]
    value: Value
    gone: int | None


@dataclass(frozen=True)
class FusedLinear:
    """A linear and the ranges of its columns.

    Attributes:
        op: The linear.
        pieces: What reads the ranges, in order; several may read the same one.
    """

    op: Op
    pieces: tuple[Piece, ...]

    @property
    def ranges(self) -> list[Range]:
        """The ranges, in order."""
        return sorted({piece.columns for piece in self.pieces})


def fused_linears(graph: Graph, rows: Callable[[Op], int]) -> tuple[list[FusedLinear], dict[Op, Missed]]:
    """The linears of a graph that can be split into one linear for each range of columns, and why others cannot.

    Args:
        graph: The graph.
        rows: The number of rows of a linear's weight that must stay together.
    """
    found: list[FusedLinear] = []
    missed: dict[Op, Missed] = {}
    for op in graph.ops("aten.linear"):
        if not graph.is_constant(op["weight"]) or graph.is_constant(op.result):
            continue
        try:
            pieces = pieces_of(graph, op)
            _check(graph, op, pieces, rows)
        except Refused as refused:
            missed[op] = refused.missed
            continue
        if pieces:
            found.append(FusedLinear(op, pieces))
    return found, missed


def pieces_of(graph: Graph, op: Op) -> tuple[Piece, ...]:
    """What reads ranges of a linear's columns; nothing if all columns are read together.

    Raises:
        Refused: Some operations read ranges, and others read all columns or another range that overlaps.
    """
    pieces: list[Piece] = []
    whole: list[Op] = []
    stack: list[tuple[Value, Lie, tuple[Step, ...]]] = [(op.result, Lie(len(shape_of(op, 0)) - 1), ())]
    while stack:
        value, lie, steps = stack.pop()
        for user in graph.users(value):
            if (step := _step(user, value, lie)) is not None:
                stack.append((user.result, step.lie, (*steps, step)))
            elif (ranges := _taken(user, value, lie)) is not None:
                gone = lie.axis if user.name in SINGLE else None
                found = zip(user.results, ranges, strict=True)
                pieces += [Piece(taken, steps, result, gone) for result, taken in found if graph.users(result)]
            else:
                whole.append(user)
    together = sorted({piece.columns for piece in pieces})
    if not together or together == [(0, shape_of(op, 0)[-1])]:
        return ()
    if whole:
        raise Refused(f"{whole[0].name} reads all of its columns, and other operations ranges of them", op.result)
    if any(end > begin for (_, end), (begin, _) in pairwise(together)):
        raise Refused("operations read ranges of its columns that overlap", op.result)
    return tuple(sorted(pieces, key=lambda piece: graph.rank(piece.value.op)))


def _check(graph: Graph, op: Op, pieces: Sequence[Piece], rows: Callable[[Op], int]) -> None:
    """Raises Refused if the weight or the bias of a linear cannot be cut where ranges of its columns begin and end."""
    borders = {border for piece in pieces for border in piece.columns}
    if not borders:
        return
    if is_read_elsewhere(op, graph):
        raise Refused("its weight has other users, so both copies would be stored", op["weight"])
    for name in ("weight", "bias"):
        if (value := op.get(name)) is not None:
            check_cuts(graph, value, 0, borders)
    unit = rows(op)
    if unit > 0 and (inside := min((border for border in borders if border % unit), default=None)) is not None:
        raise Refused(f"a block of {unit} rows of its weight spans row {inside}, where a range begins", op["weight"])


def check_cuts(graph: Graph, value: Value, axis: int, borders: set[int]) -> None:
    """Raises Refused if a constant cannot be computed in parts that end at borders along an axis."""
    if value.op.name == PARAM:
        return
    if not graph.is_constant(value):
        raise Refused("its bias is computed from the inputs", value)
    factor = factor_at(value.op, value.index, axis)
    own = next((place for place in factor.places if place.slot == value.index), None) if factor is not None else None
    if factor is None or own is None or len(value.op.results) > 1:
        raise Refused(f"{value.op.name} is not known to keep parts of a weight apart", value)
    if any(border % own.inner for border in borders):
        raise Refused(f"a range of its columns begins or ends inside a block of {own.inner} rows", value)
    operands = dict(value.op.operands())
    for place in factor.places:
        if isinstance(place.slot, tuple):
            inner = {border // own.inner * place.inner for border in borders}
            check_cuts(graph, operands[place.slot], place.axis, inner)


def _step(op: Op, value: Value, lie: Lie) -> Step | None:
    """An operation that keeps columns in order along an axis, and has them from no other operand."""
    slots = [path for path, operand in op.operands() if operand is value]
    if len(slots) != 1 or len(op.results) != 1 or (factor := factor_at(op, slots[0], lie.axis)) is None:
        return None
    places = {place.slot: place for place in factor.places}
    if factor.summed or places.keys() != {slots[0], 0} or len(factor.places) != 2:
        return None
    old, new = places[slots[0]], places[0]
    row = row_of(op)
    listed = op.argument(row.sizes) if row is not None and row.sizes is not None else None
    if isinstance(listed, tuple) and not isinstance(listed[new.axis], int):
        return None
    together = lcm(lie.elements, old.inner)
    kept = Lie(new.axis, together // old.inner * new.inner, together // lie.elements * lie.columns)
    return Step(op, kept)


# Operations that take ranges of an axis


def _pieces(op: Op, axis: int, size: int) -> list[Range] | None:
    """Consecutive ranges of the sizes of the results."""
    found, start = [], 0
    for index in range(len(op.results)):
        length = shape_of(op, index)[axis]
        if not isinstance(length, int):
            return None
        found.append((start, start + length))
        start += length
    return found


def _sliced(op: Op, axis: int, size: int) -> list[Range] | None:
    taken = range_of(op, size)
    return [taken] if taken is not None else None


def _selected(op: Op, axis: int, size: int) -> list[Range] | None:
    index = op.argument("index")
    return [(index % size, index % size + 1)] if isinstance(index, int) else None


def _unbound(op: Op, axis: int, size: int) -> list[Range] | None:
    return [(index, index + 1) for index in range(size)]


SINGLE: Mapping[str, Callable[[Op, int, int], list[Range] | None]] = {
    "aten.select.int": _selected,
    "aten.unbind.int": _unbound,
}
"""Operations that take single elements of an axis, and remove it."""

TAKING: Mapping[str, Callable[[Op, int, int], list[Range] | None]] = {
    **SINGLE,
    "aten.slice.Tensor": _sliced,
    "aten.split.Tensor": _pieces,
    "aten.split_with_sizes": _pieces,
    "aten.chunk": _pieces,
}
"""Operations that take ranges of an axis -> the range of each result."""


def _taken(op: Op, value: Value, lie: Lie) -> list[Range] | None:
    """The columns that the results of an operation hold, if these are ranges; None if it does something else."""
    size = value.tensor.shape[lie.axis]
    if op.name not in TAKING or not isinstance(size, int) or axis_of(op, "dim", len(value.tensor.shape)) != lie.axis:
        return None
    found = [lie.range_of(each) for each in TAKING[op.name](op, lie.axis, size) or ()]
    ranges = [each for each in found if each is not None]
    return ranges if ranges and len(ranges) == len(found) else None
