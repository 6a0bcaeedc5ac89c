"""Pointwise regions: the arithmetic and the moves of elements that compute a value, as one fused expression.

    %a = aten.slice.Tensor(%q, 3, 32, …)     %n = aten.neg(%a)
    %b = aten.slice.Tensor(%q, 3, 0, 32)     %c = aten.cat([%n, %b], -1)
    %y = aten.mul.Tensor(%c, %sin)
  ->
    y[i0, i1, i2, i3] = bf16(where(i3 < 32, bf16(neg(q[i0, i1, i2, i3 + 32])), q[i0, i1, i2, i3 - 32]) * sin[…])

A region grows from its root, users before operands. Each value is asked for the elements that its users need; a move
(view, slice, transpose, concatenation …) passes the question on with another index. A value stays an operand if

* a user outside the region needs it, too, unless it is a view, which costs nothing, or cheap to compute from tensors
  that are smaller than it;
* an expensive function would compute one of its elements several times: at several indices, or for each copy of a
  broadcast element, except for a number of a whole row with few copies;
* its index, or what computes it, cannot be written in a fused expression.

An index may depend on elements of integer tensors: rows of an embedding, positions that count up from a length. The
arithmetic on these integers becomes part of the index.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from passes.analyses.arithmetic import FLOATS, Term, broadcast_term, is_cast
from passes.analyses.element_moves import MOVING, Place, place_of, sources_of
from passes.analyses.inequalities import Conjunction, impossible, nonnegative
from passes.analyses.integer_elements import IntegerElements, is_integer
from passes.analyses.short_sums import short_sum, sum_of_terms
from passes.fusing.fusion_regions import LONGEST_ROW
from passes.fusing.pointwise_expressions import Computed, Counted, Moved, Recipe, expression_of_region, operands_of
from qcompiler.dialects.expression_nodes import Call, elements, indices
from qcompiler.dialects.fused_expression import FusedExpression, parse
from qcompiler.ir import DType, Graph, Missed, Op, Role, Size, TensorType, Value
from qcompiler.ir.sizes import Expr, product, symbol

CHEAP = {"+", "-", "*", "at_least", "at_most", "neg", "relu", "bf16", "f16"}
"""Functions that may be computed more than once for an element, because another kernel would cost more."""

MOST_AXES = 6
MOST_ARITHMETIC = 32
"""Maximum operations that compute something."""

MOST_INDICES = 12
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
        operands: What it reads, and values that only have its sizes.
        launches: The operations it replaces that run a kernel each.
    """

    root: Value
    expression: FusedExpression
    operands: tuple[Value, ...]
    launches: tuple[Op, ...]

    def sources(self) -> tuple[int, ...]:
        """The operands that the expression reads, by number, in order of use."""
        reads = (*(load.name for load in self.expression.loads), *(each.function for each in self.expression.elements))
        return tuple(int(name[1:]) for name in reads)


def copies(op: Op) -> bool:
    """Whether an operation only moves elements, and always into new memory."""
    return op.name in MOVING and op.role is not Role.VIEW


def is_pointwise(op: Op) -> bool:
    """Whether an operation may be in a region and costs a kernel: arithmetic, short sums, casts or copies of floats."""
    arithmetic = broadcast_term(op) is not None and op.name != "aten.mean.dim"
    computes = arithmetic or counts(op) or short_sum(op) is not None or sum_of_terms(op) is not None
    return _is_float(op.results) and (copies(op) or computes)


def is_operand(value: Value) -> bool:
    """Whether a fused operation may read a value: a tensor of floats, or of integers that are parts of indices."""
    return _is_float((value,)) or is_integer(value)


def counts(op: Op) -> bool:
    """Whether an operation converts integers to FP32."""
    return is_cast(op) and is_integer(op["x"]) and op.result.tensor.dtype is DType.f32


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
    if not growth.computed:
        return Missed("its elements cannot be written as indices of its operands", root)
    expression, integers = expression_of_region(place_of(root, growth.at), growth.recipes, growth.operands)
    operands = (*growth.operands, *map(growth.integers.tensor, integers))
    if not operands:
        return Missed("it reads no tensor", root)
    if len(operands) > MOST_OPERANDS:
        return Missed(f"it would read {len(operands)} tensors, at most {MOST_OPERANDS}", root)
    if state := next(filter(_is_state, operands), None):
        return Missed("it reads a buffer that the model may change in between", state)
    launches = tuple(value.op for value in growth.computed)
    return PointwiseRegion(root, expression, operands, launches)


class _Growth:
    """A region grown for given stops."""

    def __init__(self, graph: Graph, root: Value, stopped: set[Value]) -> None:
        self.graph, self.root, self.stopped = graph, root, stopped
        self.at = tuple(symbol(f"i{axis}") for axis in range(len(root.tensor.shape)))
        self.facts, self.integers = self._facts(), IntegerElements(graph)
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
        if value.op.role is not Role.VIEW:
            self.inside.add(value.op)
            self.computed.append(value)
        elif all(user in self.inside for part in value.op.results for user in self.graph.users(part)):
            self.inside.add(value.op)
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
        if _is_moving_view(op) or value is self.root:
            return True
        if all(user in self.inside for user in self.graph.users(value)):
            return self._is_computed_once(value)
        return self._is_better_repeated(value)

    def _is_computed_once(self, value: Value) -> bool:
        """Whether no expensive function computes an element of the value several times."""
        if _is_cheap(value.op):
            return True
        (at, *more) = {place.at for place in self._needed[value]}
        *rows, columns = self.root.tensor.shape or (1,)
        if more:
            return False
        if self.at and not any(str(self.at[-1]) in indices(size) for size in at):  # computed once for a row
            if any(product(tuple(rows)) == value.tensor.elements * times for times in range(1, MOST_REPEATS + 1)):
                return True
            return _are_among(rows, value.tensor.shape)
        return _are_among((*rows, columns), value.tensor.shape) or value.tensor.elements == product((*rows, columns))

    def _is_better_repeated(self, value: Value) -> bool:
        """Whether each user had better compute the value again: that is cheap, and reads less than the value."""
        users = self.graph.users(value)
        if not _is_cheap(value.op) or not all(is_pointwise(user) or _is_moving_view(user) for user in users):
            return False
        read = {each for _, each in value.op.operands() if isinstance(each.type, TensorType)}
        total: Size = sum((each.tensor.elements for each in read), start=0)
        sizes = (each.tensor.elements - 1 for each in (value, *read))
        facts = self.facts | {size for size in sizes if isinstance(size, Expr)}
        return impossible(nonnegative(total - value.tensor.elements), facts)

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
        if counts(op):
            number = self.integers.element(op["x"], place.at, self.facts | place.guard)
            return None if number is None else Counted(number)
        if op.name in MOVING:
            sources = sources_of(place, self.facts, self.integers)
            if sources is None:
                return None
            return Moved(tuple((less, self._anywhere_in_row(source)) for less, source in sources))
        if (added := short_sum(op)) is not None:
            places = [place_of(added.x, added.place(place.at, term), place.guard) for term in range(added.terms)]
            terms = tuple((f"x{term}", self._anywhere_in_row(each)) for term, each in enumerate(places))
            return Computed(added.text, terms)
        if (quantized := sum_of_terms(op)) is not None:
            pairs = enumerate(quantized.places(place.at))
            return Computed(quantized.text, tuple((f"x{n}", place_of(x, at, place.guard)) for n, (x, at) in pairs))
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
        if column in leading or any(
            index != column or any(elements(fact)) for fact in place.guard for index in indices(fact)
        ):
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
        return replace(place, guard=frozenset(fact for fact in place.guard if not _is_of(fact, column)))


def _is_of(fact: Size, column: str) -> bool:
    """Whether a fact is about a column, and not about elements of integers."""
    return {*indices(fact)} == {column} and not any(elements(fact))


def _is_moving_view(op: Op) -> bool:
    return op.role is Role.VIEW and op.name in MOVING


def _is_cheap(op: Op) -> bool:
    """Whether an operation may compute an element more than once."""
    term = None if counts(op) else broadcast_term(op)
    if term is None:
        return short_sum(op) is None and sum_of_terms(op) is None
    return {part.function for part in parse(term.text).expressions() if isinstance(part, Call)} <= CHEAP


def _are_among(sizes: Sequence[Size], shape: Sequence[Size]) -> bool:
    """Whether a shape has all of some sizes, besides others: then it has as many elements, or more."""
    left = [*shape]
    for size in sizes:
        if size != 1:
            if size not in left:
                return False
            left.remove(size)
    return True


def _is_state(value: Value) -> bool:
    while value.op.role is Role.VIEW:
        value = value.op["x"]
    return value.op.is_state


def _is_float(values: tuple[Value, ...]) -> bool:
    return bool(values) and all(isinstance(value.type, TensorType) and value.type.dtype in FLOATS for value in values)
