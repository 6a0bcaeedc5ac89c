"""Which values the keys or values of attention heads are taken from, and in which order.

    %kv = aten.linear(%c, %w) : f32[s0, s1, 64]
    %k = aten.cat([the first 8 of each 16 columns of %kv, %rope for all heads], -1) : f32[s0, 4, s1, 12]

    parts_of(%k):   elements 0 to 7 of head h are columns 16 * h + (0 to 7) of %kv, of the same token
                    elements 8 to 11 are columns 0 to 3 of %rope, of the same token, for all heads

Operations that only move elements are followed, by the rows of `index_moves`. A part that all heads share is found as
early as it is one value for each token.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from passes.analyses.elements import Elements
from passes.analyses.index_expressions import Unknown
from passes.analyses.index_moves import MOVES
from passes.analyses.inequalities import Conjunction, TooComplex
from qcompiler.ir import Graph, Size, TensorType, Value
from qcompiler.ir.sizes import Call, Expr, Monomial, product, symbol

MOVING = {*MOVES, "aten.cat", "aten.copy", "aten.slice_scatter", "aten.stack"}
BATCH, HEAD, TOKEN, AT = (symbol(f"part.{name}") for name in ("batch", "head", "token", "at"))
AT_TERM, HEAD_TERM = AT.terms[0][0], HEAD.terms[0][0]
Terms = dict[Monomial, int]


class NotFound(Exception):
    """Elements of heads do not come from tokens in a simple order: the reason and the value that prevents it."""

    def __init__(self, why: str, value: Value) -> None:
        super().__init__(why)
        self.why, self.value = why, value


@dataclass(frozen=True)
class Part:
    """Elements `start` to `stop - 1` of each head.

    Attributes:
        start: The first element.
        stop: The element after the last one.
        source: Columns for each token: `[..., columns]`, where the other axes count all tokens in row-major order.
        stride: Element i of head h is column `stride * h + offset + i - start`; 0 if all heads share the part.
        offset: The first column of head 0.
    """

    start: int
    stop: int
    source: Value
    stride: int
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


def parts_of(graph: Graph, value: Value) -> tuple[Part, ...]:
    """The parts of keys or values `[B, H, S, D]`, in order; H and D are integers.

    Raises:
        NotFound: A part is not made of columns of the same token.
    """
    leaves = set(_first(value, value))
    while True:
        found = []
        for start, stop, leaf, at in _places(graph, value, leaves):
            part = _part(value, start, stop, leaf, at)
            if (part is None or part.stride) and leaf.op.name in MOVING:
                leaves.remove(leaf)
                leaves.update(source for operand in _operands(leaf) for source in _first(operand, value))
                break
            if part is None or leaf.tensor.dtype is not value.tensor.dtype:
                raise NotFound("its elements are not columns of the same token", leaf)
            found.append(part)
        else:
            return tuple(sorted(found, key=lambda part: part.start))


def _first(value: Value, heads: Value) -> Iterator[Value]:
    """The values nearest to `value`, itself included, that have one row for each token or are computed."""
    batch, _, length, _ = heads.tensor.shape
    lead = value.tensor.shape[:-1]
    rounded = value.tensor.dtype is not heads.tensor.dtype
    if value.op.name not in MOVING or rounded or (lead and product(lead) == batch * length):
        yield value
        return
    for operand in _operands(value):
        yield from _first(operand, heads)


def _operands(value: Value) -> list[Value]:
    return [operand for _, operand in value.op.operands() if isinstance(operand.type, TensorType)]


def _places(graph: Graph, value: Value, leaves: set[Value]) -> Iterator[tuple[int, int, Value, tuple[Size, ...]]]:
    """For each range of elements: its limits, the value that they come from, and the index there."""
    batch, heads, length, size = value.tensor.shape
    if not isinstance(size, int):
        raise NotFound("its heads have no fixed size", value)
    pairs = ((BATCH, batch), (HEAD, heads), (TOKEN, length), (AT, size))
    limits: list[Size] = [bound for index, n in pairs for bound in (index, n - index - 1)]
    facts: Conjunction = frozenset(bound for bound in limits if isinstance(bound, Expr))
    by_name = {f"%{leaf.name}": leaf for leaf in leaves}
    try:
        element = Elements(graph, leaves=leaves).element(value, (BATCH, HEAD, TOKEN, AT), facts)
    except (Unknown, TooComplex) as error:
        raise NotFound(*((error.why, error.value) if isinstance(error, Unknown) else (str(error), value))) from None
    for condition, number in element.cases:
        match number:
            case Expr(terms=(((Call() as origin,), 1),)) if origin.function in by_name:
                for conjunction in condition:
                    yield *_limits(conjunction, size, value), by_name[origin.function], origin.args
            case _:
                raise NotFound("its elements are not taken from one value", value)


def _limits(conjunction: Conjunction, size: int, value: Value) -> tuple[int, int]:
    """The range of elements that satisfy inequalities."""
    start, stop = 0, size
    for bound in conjunction:
        terms: Terms = dict(bound.terms)
        factor = terms.get(AT_TERM)
        if factor not in (1, -1) or not terms.keys() <= {AT_TERM, ()}:
            raise NotFound("its heads are not cut alike for all tokens", value)
        if factor == 1:
            start = max(start, -terms.get((), 0))
        else:
            stop = min(stop, terms.get((), 0) + 1)
    return start, stop


def _part(heads: Value, start: int, stop: int, leaf: Value, at: tuple[Size, ...]) -> Part | None:
    """The part that reads `leaf` at an index; None if that is not a column of the same token."""
    length = heads.tensor.shape[2]
    row: Size = 0
    for index, size in zip(at[:-1], leaf.tensor.shape[:-1], strict=True):
        row = row * size + index
    tokens: Size = (0 if heads.tensor.shape[0] == 1 else BATCH) * length + (0 if length == 1 else TOKEN)
    column = at[-1]
    terms: Terms = dict(column.terms) if isinstance(column, Expr) else {(): column}
    step = terms.get(AT_TERM, 0)
    if row != tokens or not terms.keys() <= {AT_TERM, HEAD_TERM, ()} or (step != 1 and stop - start > 1):
        return None
    return Part(start, stop, leaf, terms.get(HEAD_TERM, 0), terms.get((), 0) + step * start)
