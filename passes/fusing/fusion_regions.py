"""Fusion regions: the arithmetic that computes a value, as far upstream as a fused operation can compute it.

    %h = aten.add.Tensor(%x, %r)                     %h is read elsewhere, too
    %n = aten.rms_norm(%h, [256], %w)          ->    the region of %n: operands %x, %r, %w; %h is a residual
    %q, %s = kernel.quantize(%n)

A region grows from its root, users before operands. A value that is also read outside becomes a residual output of the
fused operation, or else an operand. If that breaks a rule, growing restarts and stops earlier.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from passes.analyses.arithmetic import is_row_view, same_numbers, term_of
from qcompiler.dialects.fused_expression import parse
from qcompiler.ir import Effects, Graph, Missed, Op, Role, Size, Value

LONGEST_ROW = 16384
"""Maximum columns that one program of a kernel can reduce."""


@dataclass(frozen=True)
class Limits:
    """The limits of a region.

    Attributes:
        operands: Maximum number of operands.
        residuals: Maximum number of residual outputs: values that are read outside.
        across: Whether reductions over a row are allowed.
        views: Whether the rows of its values may be arranged in several ways.
    """

    operands: int = 6
    residuals: int = 2
    across: bool = True
    views: bool = True


@dataclass(frozen=True)
class FusionRegion:
    """Operations that one fused operation can replace.

    Attributes:
        root: The value that it computes.
        ops: The operations that compute something, in order.
        inside: `ops`, and operations that only widen a value or rearrange its rows, unless read elsewhere.
        operands: Its inputs: tensors with the rows of the root, and vectors with one number per column.
        residuals: Its values that are read elsewhere, in order, with their users; without a root, the only result.
        views: Operations in the region that rearrange rows; some are read elsewhere, and remain.
        place: The fused operation can be placed before this one: all users of its results come after.
        late: Operations after `place` that its operands depend on, in order.
    """

    root: Value
    ops: tuple[Op, ...]
    inside: frozenset[Op]
    operands: tuple[Value, ...]
    residuals: Mapping[Value, tuple[Op, ...]]
    views: tuple[Op, ...]
    place: Op
    late: tuple[Op, ...]

    @property
    def across(self) -> bool:
        """Whether a column of its root depends on a whole row."""
        return any(parse(term.text).across for op in self.ops if (term := term_of(op)) is not None)

    def source(self, value: Value) -> Value:
        """The operand, or the result of one of the operations, that has the numbers of `value`."""
        return _source(value, self.operands)


def grow(
    graph: Graph,
    root: Value,
    limits: Limits,
    consumer: Op | None = None,
    stops: Iterable[Value] = (),
) -> FusionRegion | Missed:
    """The largest region that ends in `root` and breaks no rule, or why there is none.

    Args:
        graph: The graph that contains it.
        root: The value that it computes.
        limits: The limits of the region.
        consumer: The operation to fuse it with; other users of the root are not fused. Without one, the root is the
            result of the fused operation.
        stops: Values that must be operands.
    """
    columns = root.tensor.shape[-1] if root.tensor.shape else 0
    if not isinstance(columns, int):
        return Missed(f"the length of its rows is not fixed ({columns})", root)
    stopped = set(stops)
    first: Missed | None = None
    while True:
        attempt = _Attempt(graph, root, limits, consumer, stopped)
        outcome = attempt.outcome()
        if isinstance(outcome, FusionRegion):
            return outcome
        stop, why = outcome
        first = first or why
        if stop is None or stop is attempt.head:
            return first
        stopped.add(stop)


def _source(value: Value, operands: Sequence[Value]) -> Value:
    while value not in operands and (source := same_numbers(value.op)) is not None:
        value = source
    return value


Broken = tuple[Value | None, Missed]
"""Where to stop so that the rule holds (None if that does not help), and how the rule was broken."""


class _Attempt:
    """A region grown for given stops; it may break rules."""

    def __init__(self, graph: Graph, root: Value, limits: Limits, consumer: Op | None, stopped: set[Value]) -> None:
        self.graph, self.root, self.limits, self.consumer, self.stopped = graph, root, limits, consumer, stopped
        self.columns: Size = root.tensor.shape[-1]
        self.inside: set[Op] = set() if consumer is None else {consumer}
        """Users of the region that do not count as outside."""
        self.ops: list[Op] = []
        self.operands: list[Value] = []
        self.residuals: list[Value] = []
        self.views: list[Op] = []
        self.head = root
        """The root, without operations that only rearrange its rows or widen it."""
        self._grow()

    # Growing

    def _grow(self) -> None:
        pending, seen = [self._key(self.root)], {self.root}
        while pending:
            value = heapq.heappop(pending)[-1]
            for more in self._take(value):
                if more not in seen:
                    seen.add(more)
                    heapq.heappush(pending, self._key(more))

    def _key(self, value: Value) -> tuple[float, int, Value]:
        return -self.graph.rank(value.op), value.index, value

    def _take(self, value: Value) -> tuple[Value, ...]:
        """Adds a value, whose users in the region are known, to the region or its operands; returns its operands."""
        op, elsewhere = value.op, self._elsewhere(value)
        source = None if value in self.stopped else same_numbers(op)
        if source is not None and (self.limits.views or not is_row_view(op)):
            self.inside |= set() if elsewhere else {op}
            self.views += [op] if is_row_view(op) else []
            self.head = source if value is self.head else self.head
            return (source,)
        term = None if value in self.stopped or self.graph.is_constant(value) else term_of(op)
        is_residual = bool(elsewhere) and (self.consumer is not None or value is not self.head)
        is_excess = is_residual and not self.limits.residuals
        if term is None or (parse(term.text).across and self._why_not_across()) or is_excess:
            self.operands.append(value)
            return ()
        self.residuals += [value] if is_residual else []
        self.inside.add(op)
        self.ops.append(op)
        return term.inputs

    def _elsewhere(self, value: Value) -> list[Op]:
        return [user for user in self.graph.users(value) if user not in self.inside]

    def _why_not_across(self) -> Missed | None:
        if not self.limits.across:
            return Missed("it is computed by a reduction over the row", self.head)
        if isinstance(self.columns, int) and self.columns > LONGEST_ROW:
            return Missed(f"its rows have {self.columns} columns; a reduction supports at most {LONGEST_ROW}")
        return None

    # Rules

    def outcome(self) -> FusionRegion | Broken:
        """The region; or where growing should stop, and why."""
        if not self.ops:
            return None, self._why_nothing()
        return self._broken_by_shapes() or self._broken_by_numbers() or self._placed()

    def _why_nothing(self) -> Missed:
        op = self.head.op
        if self.graph.is_constant(self.head):
            return Missed("it is constant", self.head)
        if term_of(op) is None:
            return Missed(f"it is not computed by row arithmetic, but by {op.name}", self.head)
        if (why := self._why_not_across()) is not None:
            return why
        return Missed("it is read elsewhere", self.head)

    def _broken_by_shapes(self) -> Broken | None:
        vector = (self.columns,)
        for value in self.operands:
            if value.tensor.shape != vector and not self._is_full(value):
                return self._reader_of(value), Missed("a value with one number per row cannot be an operand", value)
        for value in self.residuals:
            if not self._is_full(value):
                return value, Missed("a value with one number per row is read elsewhere", value)
            if not self._can_arrange_as(value.tensor.shape):
                return value, Missed("it is read elsewhere, in an arrangement of rows that cannot be derived", value)
        if all(value.tensor.shape == vector != self.root.tensor.shape for value in self.operands):
            return None, Missed("none of its operands has as many rows")
        return None

    def _is_full(self, value: Value) -> bool:
        kind = value.tensor
        return kind.shape[-1:] == (self.columns,) and kind.elements == self.root.tensor.elements

    def _reader_of(self, value: Value) -> Value:
        """The first result that is computed from an operand."""
        users = [op for op in self.ops if any(_source(operand, self.operands) is value for _, operand in op.operands())]
        return min(users, key=self.graph.rank).result

    def _can_arrange_as(self, shape: tuple[Size, ...]) -> bool:
        """Whether the root, a view or an operand has this shape."""
        return shape in (value.tensor.shape for value in (self.root, *self.operands, *(op.result for op in self.views)))

    def _broken_by_numbers(self) -> Broken | None:
        limits = self.limits
        if len(self.residuals) > limits.residuals:
            first = min(self.residuals, key=lambda value: self.graph.rank(value.op))
            return first, Missed(f"it would have {len(self.residuals)} residual outputs, at most {limits.residuals}")
        if len(self.operands) > limits.operands:
            inner = [op for op in self.ops if op.result is not self.head and self._is_full(op.result)]
            stop = min(inner, key=self.graph.rank).result if inner else None
            return stop, Missed(f"it would read {len(self.operands)} tensors, at most {limits.operands}")
        return None

    # Order

    def _placed(self) -> FusionRegion | Broken:
        """The region, if it fits between its operands and its users."""
        rank = self.graph.rank
        ordered = sorted(self.residuals, key=lambda value: rank(value.op))
        residuals = {value: tuple(self._elsewhere(value)) for value in ordered}
        users = [(user, value) for value in residuals for user in residuals[value]]
        end = self.root.op if self.consumer is None else self.consumer
        place, early = min(((end, None), *users), key=lambda pair: rank(pair[0]))
        # The user has other operands, and views are rebuilt from their sizes.
        sizes = [value for op in self.views for path, value in op.operands() if path[0] != 0]
        own = [value for _, value in end.operands() if value is not self.root]
        late = self._defined_after([*self.operands, *sizes, *own], place)
        for op in late:
            if cycle := next((value for _, value in op.operands() if value in residuals), None):
                return cycle, Missed("it would depend on its own result", cycle)
            if op.effects.ordered or (Effects.READS in op.effects and op.role is not Role.STATE):
                return early, Missed(f"{op.name} lies between and must not be moved", op.results[0])
        return FusionRegion(
            self.root, tuple(sorted(self.ops, key=rank)), frozenset(self.inside), tuple(self.operands), residuals,
            tuple(self.views), place, tuple(sorted(late, key=rank)),
        )  # fmt: skip

    def _defined_after(self, values: Iterable[Value], place: Op) -> list[Op]:
        """Operations from `place` on that values are computed from."""
        found: set[Op] = set()
        stack = [value.op for value in values]
        while stack:
            op = stack.pop()
            if op not in found and self.graph.rank(op) >= self.graph.rank(place):
                found.add(op)
                stack += [operand.op for _, operand in op.operands()]
        return list(found)
