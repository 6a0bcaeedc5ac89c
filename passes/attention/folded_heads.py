"""Attention whose matmuls join batch and heads to one axis, as in BLOOM.

%q3 = aten.view(%q, [4*s0, s1, 16])     %q: f32[s0, 4, s1, 16]      ->      the queries are %q
"""

from passes.analyses.arithmetic import VIEWS
from passes.analyses.causal_masks import in_range
from passes.analyses.elements import Elements
from passes.analyses.index_expressions import Unknown
from passes.analyses.index_moves import MOVES
from passes.analyses.inequalities import TooComplex
from qcompiler.ir import Graph, Op, Rewriter, Size, Value
from qcompiler.ir.sizes import call, symbol

INDEX = tuple(symbol(f"folded.{name}") for name in ("b", "h", "i", "j"))


def joins(op: Op) -> bool:
    """Whether an operation views [batch, heads, …] as [batch * heads, …]; the order of the elements is the same."""
    return op.name in VIEWS and op.result.tensor.shape == _joined(op["self"].tensor.shape)


def splits(op: Op) -> bool:
    """Whether an operation views [batch * heads, …] as [batch, heads, …]."""
    return op.name in VIEWS and op["self"].tensor.shape == _joined(op.result.tensor.shape)


def _joined(shape: tuple[Size, ...]) -> tuple[Size, ...] | None:
    return (shape[0] * shape[1], *shape[2:]) if len(shape) == 4 else None


def split_before(graph: Graph, value: Value, batch: Size, heads: Size) -> Value | None:
    """The earliest value [batch, heads, …] with the elements of `value` [batch * heads, …]; None if there is none."""
    wanted, source, found = (batch, heads, *value.tensor.shape[1:]), value, None
    while source.op.name in MOVES and isinstance(operand := source.op.args[0], Value):
        source = operand
        if source.tensor.shape == wanted and _same_elements(graph, source, value):
            found = source
    return found


def _same_elements(graph: Graph, source: Value, value: Value) -> bool:
    batch, head, *rest = INDEX
    heads = source.tensor.shape[1]
    if not isinstance(heads, int):
        return False
    at = tuple(0 if size == 1 else index for index, size in zip(INDEX, source.tensor.shape, strict=True))
    inside = in_range(INDEX, source.tensor.shape)
    try:
        found = Elements(graph, leaves=(source,)).element(value, (batch * heads + head, *rest), inside)
    except (Unknown, TooComplex):
        return False
    return found.only == call(f"%{source.name}", *at)


def replace_joined(rewriter: Rewriter, op: Op, new: Value) -> None:
    """Replaces an operation whose result is `new`, or `new` with batch and heads joined."""
    if new.type == op.result.type:
        return rewriter.replace(op, new)
    for user in rewriter.graph.users(op.result):
        if splits(user) and user.result.type == new.type:
            rewriter.replace(user, new)
    if not rewriter.graph.uses(op.result):
        return rewriter.erase_unread(op)
    joined = rewriter.insert("aten.flatten.using_ints", new, 0, 1, types=[op.result.type])
    return rewriter.replace(op, joined.result)
