"""Elements of integer tensors as parts of indices: expressions of indices and of elements that a kernel can read.

    %place = aten.arange(%n) : i64[s1]      %start = aten.unsqueeze(%lengths, 1) : i64[s0, 1]
    %positions = aten.add.Tensor(%start, %place) : i64[s0, s1]
  ->
    positions[i0, i1]  =  %lengths(i0) + i1

    %key, %order = aten.sort(%x)            %place = aten.index_put(%empty, [%order], %arange)
  ->
    order[place[i0]]  =  i0                 key[place[i0]]  =  x[i0]

The integer arithmetic becomes part of an expression if it reads one tensor at most; else its result is read.
"""

import re

from passes.analyses.elements import Elements
from passes.analyses.index_expressions import Index, Unknown
from passes.analyses.inequalities import Conjunction, TooComplex, impossible, nonnegative
from passes.analyses.integer_ranges import facts_about, is_inverse, is_sorted
from qcompiler.dialects.expression_nodes import elements, why_no_index
from qcompiler.ir import DType, Expr, Graph, Size, TensorType, Value
from qcompiler.ir.sizes import Call, call

READABLE = (DType.i32, DType.i64)
"""Element types that a kernel can read as parts of indices."""

TENSOR = re.compile("%.+")
"""The name of an integer tensor in an index: `%` and the name of its value."""


class IntegerElements:
    """The elements of the integer values of a graph, which must not change meanwhile."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._elements = graph, Elements(graph)

    def element(self, value: Value, at: Index, facts: Conjunction) -> Size | None:
        """An element; None if a kernel cannot read it.

        Args:
            value: An integer value.
            at: The index of the element, over i0, i1, ….
            facts: The limits of indices and sizes.
        """
        at = tuple(0 if size == 1 else index for index, size in zip(at, value.tensor.shape, strict=True))
        if (place := self._place_before(value, at)) is not None:
            return place if value.index else self.element(value.op["self"], (place,), facts)
        try:
            found = self._elements.element(value, at, facts).only
        except (Unknown, TooComplex):
            found = None
        if isinstance(found, int | Expr) and self._is_readable(found):
            return found
        whole = call(f"%{value.name}", *at) if at else None
        return whole if whole is not None and self._is_readable(whole) else None

    def is_nonnegative(self, size: Size, facts: Conjunction) -> bool:
        """Whether an index is proven not to be negative, given facts."""
        return impossible(nonnegative(-size - 1), facts | facts_about(self._graph, size))

    def _place_before(self, value: Value, at: Index) -> Size | None:
        """Where, before a sort, what is at an element of the inverse of its order was; None for other values."""
        match at:
            case (Expr(terms=(((Call(function, (place,)),), 1),)),) if function.startswith("%") and is_sorted(value):
                return place if is_inverse(self.tensor(function), value.op.results[1]) else None
        return None

    def _is_readable(self, size: Size) -> bool:
        if why_no_index(size, TENSOR) is not None:
            return False
        read = {self.tensor(element.function) for element in elements(size)}
        return len(read) <= 1 and all(
            value.tensor.dtype in READABLE and len(value.tensor.shape) == len(element.args)
            for value in read for element in elements(size)
        )  # fmt: skip

    def tensor(self, name: str) -> Value:
        """The value that an index names."""
        return self._graph[name.removeprefix("%")]


def is_integer(value: Value) -> bool:
    """Whether a value is a tensor of integers that a kernel can read."""
    return isinstance(value.type, TensorType) and value.type.dtype in READABLE
