"""Asks for an element of a value in a graph, as an expression of its index.

    Elements(graph).element(graph["mask"], (symbol("b"), 0, symbol("q"), symbol("k")))
        1 if q - k >= 0, else 0

The operations are followed from the value down to the inputs, with one row of a table each.
"""

from collections.abc import Collection, Mapping

from passes.analyses.index_arithmetic import ARITHMETIC
from passes.analyses.index_expressions import Element, Index, Row, Site, Unknown, constant, opaque
from passes.analyses.index_moves import MOVES, PICKS
from passes.analyses.inequalities import Condition, Conjunction, TooComplex
from passes.analyses.stored_indices import stored_element
from qcompiler.ir import Graph, Op, Value
from qcompiler.ir.graph import PARAM
from qcompiler.ir.sizes import Expr, call, symbol, symbols

RULES: Mapping[str, Row] = {**ARITHMETIC, **MOVES, **PICKS}
"""Operation -> its row; any other operation has unknown elements."""


class Elements:
    """The elements of the values in a graph, remembered while the graph does not change."""

    def __init__(
        self, graph: Graph, *,
        consecutive: Collection[Value] = (), from_zero: bool = False, leaves: Collection[Value] = (),
        heads: Collection[str] = (),
    ) -> None:  # fmt: skip
        """An empty memory.

        Args:
            graph: The graph, which must not change while this object is used.
            consecutive: Inputs that are assumed to count up by 1 along their last axis.
            from_zero: Whether these are assumed to begin at 0.
            leaves: Values whose elements are unknowns, whatever computes them.
            heads: Symbols. An element of a floating-point constant whose index depends on these alone is an unknown,
                and floating-point numbers that vary are real numbers, without rounding. By default, all are refused.
        """
        self.consecutive, self.from_zero, self.leaves, self.weights = consecutive, from_zero, leaves, graph.weights
        self.graph, self.heads = graph, frozenset(heads)
        low = (symbol(name) - limits.low for name, limits in graph.symbols.items())
        self.facts: Conjunction = frozenset(size for size in low if isinstance(size, Expr))
        """What holds for the symbols of the graph."""
        self._known: dict[tuple[Value, Index, Conjunction], Element] = {}

    def element(self, value: Value, at: Index, facts: Conjunction = frozenset()) -> Element:
        """The element at an index; `facts` hold for the index, in addition to the limits of the symbols.

        Raises:
            Unknown: An operation that the element depends on computes in floating point or is not in the table.
            TooComplex: The expression has too many cases.
        """
        at = tuple(0 if size == 1 else index for index, size in zip(at, value.tensor.shape, strict=True))
        facts = facts | self.facts
        key = value, at, facts
        if key not in self._known:
            self._known[key] = self._compute(value, at, facts)
        return self._known[key]

    def _compute(self, value: Value, at: Index, facts: Conjunction) -> Element:
        op = value.op
        if value in self.consecutive:
            first = 0 if self.from_zero else call(f"%{value.name}", *at[:-1], 0)
            return constant(first + at[-1])
        if value in self.leaves:
            return opaque(value, at)
        site = _Site(self, op, at, value.index, facts)
        if op.name not in MOVES and self._varies_by_head(value, at):
            return self._number_of_head(value, at, site)
        return self._by_rule(value, at, site)

    def _by_rule(self, value: Value, at: Index, site: "_Site") -> Element:
        op = value.op
        if op.name in RULES:
            return RULES[op.name].element(site)
        tensor = self.weights.get(str(op.attrs["name"])) if op.name == PARAM else None
        if tensor is not None and (stored := stored_element(tensor, at)) is not None:
            return stored
        if value.tensor.dtype.is_float:
            raise site.unknown("this value has floating-point numbers")
        return opaque(value, at)

    def _varies_by_head(self, value: Value, at: Index) -> bool:
        if not self.heads or not value.tensor.dtype.is_float or not self.graph.is_constant(value):
            return False
        return all(symbols(index) <= self.heads for index in at)

    def _number_of_head(self, value: Value, at: Index, site: "_Site") -> Element:
        """A literal, or the unknown number of a head, as computed."""
        try:
            element = self._by_rule(value, at, site)
        except (Unknown, TooComplex):
            return opaque(value, at)
        return element if isinstance(element.only, int | float) else opaque(value, at)


class _Site(Site):
    def __init__(self, elements: Elements, op: Op, at: Index, output: int, facts: Conjunction) -> None:
        self._elements, self.op, self.at, self.output, self.facts = elements, op, at, output, facts
        self.rounds = not elements.heads

    def element(self, value: Value, at: Index) -> Element:
        return self._elements.element(value, at, self.facts)

    def assuming(self, condition: Condition, at: Index) -> Site:
        (more,) = condition if len(condition) == 1 else (frozenset(),)
        return _Site(self._elements, self.op, at, self.output, self.facts | more)
