"""Pointwise regions: the arithmetic and the moves of elements that compute a value, as one fused expression.

    %a = aten.slice.Tensor(%q, 3, 32, …)     %n = aten.neg(%a)
    %b = aten.slice.Tensor(%q, 3, 0, 32)     %c = aten.cat([%n, %b], -1)
    %y = aten.mul.Tensor(%c, %sin)
  ->
    y[i0, i1, i2, i3] = bf16(where(i3 < 32, bf16(neg(q[i0, i1, i2, i3 + 32])), q[i0, i1, i2, i3 - 32]) * sin[…])

A region grows from its root, users before operands. Each value is asked for the elements that its users need; a move
(view, slice, transpose, concatenation …) passes the question on with another index. A value stays an operand if

* a user outside the region needs it, too, unless it is a view, which costs nothing;
* an expensive function would compute one of its elements several times: at several indices, or for each copy of a
  broadcast element, except for a number of a whole row with few copies;
* its index, or what computes it, cannot be written in a fused expression.
"""

import heapq
from dataclasses import dataclass, replace

from passes.analyses.arithmetic import FLOATS, Term, broadcast_term
from passes.analyses.element_moves import MOVING, Place, place_of, sources_of
from passes.analyses.inequalities import Conjunction
from passes.fusing.fusion_regions import LONGEST_ROW
from passes.fusing.pointwise_expressions import Computed, Moved, Recipe, expression_of_region, operands_of
from qcompiler.dialects.expression_nodes import Call, Load, indices
from qcompiler.dialects.fused_expression import FusedExpression, parse
from qcompiler.ir import Graph, Missed, Op, Role, TensorType, Value
from qcompiler.ir.sizes import Expr, product, symbol

CHEAP = {"+", "-", "*", "neg", "relu", "bf16", "f16"}
"""Functions that may be computed more than once for an element, because another kernel would cost more."""

MOST_AXES = 6
MOST_ARITHMETIC = 32
"""Maximum operations that compute something."""

MOST_INDICES = 4
"""Maximum indices at which one value is read."""

MOST_REPEATS = 8
"""Maximum rows that compute the same number of the row, such as a norm of keys that several queries share."""

MOST_OPERANDS = 8


@dataclass(frozen=True)
class PointwiseRegion:
    """Operations that one fused expression replaces.

    Attributes:
        root: The value that it computes.
        expression: The expression; operand `x0` is `operands[0]`, and so on.
        operands: What it reads.
        launches: The operations it replaces that run a kernel each.
    """

    root: Value
    expression: FusedExpression
    operands: tuple[Value, ...]
    launches: tuple[Op, ...]

    def read_by(self, load: Load) -> Value:
        """The operand that a load of the expression reads."""
        return self.operands[int(load.name[1:])]


def copies(op: Op) -> bool:
    """Whether an operation only moves elements, and always into new memory."""
    return op.name in MOVING and op.role is not Role.VIEW


def is_pointwise(op: Op) -> bool:
    """Whether an operation may be in a region and costs a kernel: arithmetic, a cast or a copy of floats."""
    return _is_float(op.results) and (copies(op) or (broadcast_term(op) is not None and op.name != "aten.mean.dim"))


def grow(graph: Graph, root: Value) -> PointwiseRegion | Missed:
    """The largest region that computes `root`, or why there is none."""
    if len(root.tensor.shape) > MOST_AXES:
        return Missed(f"it has {len(root.tensor.shape)} axes, and a kernel supports at most {MOST_AXES}", root)
    stopped: set[Value] = set()
    while True:
        growth = _Growth(graph, root, stopped)
        if len(growth.operands) <= MOST_OPERANDS or not growth.computed[1:]:
            break
        stopped.add(growth.computed[-1])  # the first in the graph
    if not growth.operands:
        return Missed("it reads no tensor", root)
    if state := next(filter(_is_state, growth.operands), None):
        return Missed("it reads a buffer that the model may change in between", state)
    if len(growth.operands) > MOST_OPERANDS:
        return Missed(f"it would read {len(growth.operands)} tensors, at most {MOST_OPERANDS}", root)
    if not growth.computed:
        return Missed("its elements cannot be written as indices of its operands", root)
    expression = expression_of_region(place_of(root, growth.at), growth.recipes, growth.operands)
    launches = tuple(value.op for value in growth.computed)
    return PointwiseRegion(root, expression, tuple(growth.operands), launches)


class _Growth:
    """A region grown for given stops."""

    def __init__(self, graph: Graph, root: Value, stopped: set[Value]) -> None:
        self.graph, self.root, self.stopped = graph, root, stopped
        self.at = tuple(symbol(f"i{axis}") for axis in range(len(root.tensor.shape)))
        self.facts = self._facts()
        self.inside: set[Op] = set()
        self.computed: list[Value] = []
        """Values that a kernel each would compute, users first."""
        self.operands: list[Value] = []
        self.recipes: dict[Place, Recipe] = {}
        self._needed: dict[Value, list[Place]] = {root: [place_of(root, self.at)]}
        pending, seen = [self._key(root)], {root}
        while pending:
            for value in self._take(heapq.heappop(pending)[-1]):
                if value not in seen:
                    seen.add(value)
                    heapq.heappush(pending, self._key(value))

    def _facts(self) -> Conjunction:
        """The limits of the indices and of the symbols of the graph."""
        low = [symbol(name) - limits.low for name, limits in self.graph.symbols.items()]
        ends = [size - 1 - index for index, size in zip(self.at, self.root.tensor.shape, strict=True)]
        return frozenset(fact for fact in (*self.at, *ends, *low) if isinstance(fact, Expr))

    def _key(self, value: Value) -> tuple[float, int, Value]:
        return -self.graph.rank(value.op), value.index, value

    def _take(self, value: Value) -> list[Value]:
        """Adds a value, all of whose users are known, to the region or to its operands; returns what it reads."""
        recipes = self._recipes(value) if self._may_enter(value) else None
        if recipes is None:
            self.operands.append(value)
            return []
        self.recipes |= recipes
        if all(user in self.inside for part in value.op.results for user in self.graph.users(part)) or not self.inside:
            self.inside.add(value.op)
        if value.op.role is not Role.VIEW:
            self.computed.append(value)
        read: list[Value] = []
        for recipe in recipes.values():
            for place in recipe.places:
                needed = self._needed.setdefault(place.value, [])
                if place not in needed:
                    needed.append(place)
                read.append(place.value)
        return read

    def _may_enter(self, value: Value) -> bool:
        op = value.op
        if not _is_float((value,)) or self.graph.is_constant(value) or value in self.stopped:
            return False
        if len(self._needed[value]) > MOST_INDICES or len(self.computed) >= MOST_ARITHMETIC:
            return False
        if (op.role is Role.VIEW and op.name in MOVING) or value is self.root:
            return True
        return all(user in self.inside for user in self.graph.users(value)) and self._is_computed_once(value)

    def _is_computed_once(self, value: Value) -> bool:
        """Whether no expensive function computes an element of the value several times."""
        term = broadcast_term(value.op)
        if term is None:
            return True
        functions = {part.function for part in parse(term.text).expressions() if isinstance(part, Call)}
        if functions <= CHEAP:
            return True
        (at, *more) = {place.at for place in self._needed[value]}
        *rows, columns = self.root.tensor.shape or (1,)
        if more:
            return False
        if self.at and not any(str(self.at[-1]) in indices(size) for size in at):  # computed once for a row
            return any(product(tuple(rows)) == value.tensor.elements * times for times in range(1, MOST_REPEATS + 1))
        return value.tensor.elements == product((*rows, columns))

    def _recipes(self, value: Value) -> dict[Place, Recipe] | None:
        """The recipe for each element that is needed; None if one of them has none."""
        found: dict[Place, Recipe] = {}
        for place in self._needed[value]:
            recipe = self._recipe(place)
            if recipe is None:
                return None
            found[place] = recipe
        return found

    def _recipe(self, place: Place) -> Recipe | None:
        op = place.value.op
        if op.name in MOVING:
            sources = sources_of(place, self.facts)
            if sources is None:
                return None
            return Moved(tuple((less, self._anywhere_in_row(source)) for less, source in sources))
        term = broadcast_term(op)
        if term is None:
            return None
        outside, inside = operands_of(term.text)
        direct = {
            f"x{number}": place_of(value, place.at[len(place.at) - len(value.tensor.shape) :], place.guard)
            for number, value in enumerate(term.inputs)
        }
        rows = self._rows(place, term) if inside else {}
        if rows is None:
            return None
        return Computed(
            term.text,
            tuple((name, self._anywhere_in_row(direct[name])) for name in direct if name in outside),
            tuple((name, rows[name]) for name in rows if name in inside),
        )

    def _rows(self, place: Place, term: Term) -> dict[str, Place] | None:
        """The elements of a row that a term reduces, in the column of the root; None if it is not a row of the root."""
        length = self.root.tensor.shape[-1] if self.at else 1
        reduced = term.inputs[0].tensor.shape
        if not isinstance(length, int) or not 1 < length <= LONGEST_ROW or reduced[-1] != length:
            return None
        column = str(self.at[-1])
        leading = {index for size in place.at[:-1] for index in indices(size)}
        if column in leading or any(index != column for fact in place.guard for index in indices(fact)):
            return None
        if "standardize" in term.text and place.at[-1] != self.at[-1]:
            return None  # its result is not the same for the whole row
        at = (*place.at[:-1], self.at[-1])
        return {
            f"x{number}": place_of(value, at[len(at) - len(value.tensor.shape) :])
            for number, value in enumerate(term.inputs)
        }

    def _anywhere_in_row(self, place: Place) -> Place:
        """The same element without guards on columns, if its index does not depend on the column."""
        if not place.guard or not self.at:
            return place
        column = str(self.at[-1])
        if any(column in indices(size) for size in place.at):
            return place
        return replace(place, guard=frozenset(fact for fact in place.guard if {*indices(fact)} != {column}))


def _is_state(value: Value) -> bool:
    while value.op.role is Role.VIEW:
        value = value.op["x"]
    return value.op.is_state


def _is_float(values: tuple[Value, ...]) -> bool:
    return bool(values) and all(isinstance(value.type, TensorType) and value.type.dtype in FLOATS for value in values)
