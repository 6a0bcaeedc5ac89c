"""Finds the keys or values before their heads are repeated for grouped queries.

    unsqueeze [B, G, 1, S, D] -> expand [B, G, R, S, D] -> view [B, G * R, S, D]      ->      the [B, G, S, D] before

A value qualifies if element [b, h, s, d] after the repeat is its element [b, h // R, s, d].
"""

from collections.abc import Iterator

from passes.analyses.elements import Elements
from passes.analyses.index_expressions import Unknown
from passes.analyses.index_moves import MOVES
from passes.analyses.inequalities import TooComplex
from qcompiler.ir import Graph, Size, Value
from qcompiler.ir.sizes import call, floordiv, symbol

INDEX = tuple(symbol(f"head.{name}") for name in ("b", "h", "s", "d"))


def before_repeats(graph: Graph, key: Value, value: Value) -> tuple[Value, Value]:
    """The earliest keys and values with equal numbers of heads, whose heads, each repeated, are those given."""
    keys, values = ({source.tensor.shape[1]: source for source in _sources(graph, operand)} for operand in (key, value))
    heads = next(heads for heads in reversed(keys) if heads in values)
    return keys[heads], values[heads]


def _sources(graph: Graph, value: Value) -> Iterator[Value]:
    """`value` [B, H, S, D], and the values [B, G, S, D] before it whose heads, each repeated, are its heads."""
    yield value
    source = value
    while source.op.name in MOVES and isinstance(operand := source.op.args[0], Value):
        source = operand
        if _repeats(graph, source, value):
            yield source


def _repeats(graph: Graph, source: Value, value: Value) -> bool:
    own, shape = source.tensor.shape, value.tensor.shape
    if len(own) != 4 or (own[0], *own[2:]) != (shape[0], *shape[2:]):
        return False
    groups, heads = own[1], shape[1]
    if not isinstance(groups, int) or not isinstance(heads, int) or groups == 0 or heads % groups:
        return False
    batch, head, *rest = INDEX
    at: tuple[Size, ...] = (batch, floordiv(head, heads // groups), *rest)
    at = tuple(0 if size == 1 else index for index, size in zip(at, own, strict=True))
    try:
        return Elements(graph, leaves=(source,)).element(value, INDEX).only == call(f"%{source.name}", *at)
    except (Unknown, TooComplex):
        return False
