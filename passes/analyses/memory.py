"""Which values may share memory, and therefore when a value may replace a copy of it."""

from qcompiler.dialects import aten
from qcompiler.ir import Effects, Graph, Missed, Op, Role, Value
from qcompiler.ir.op_table import lookup
from qcompiler.ir.structure import INPUT

OVERLAPPING = ("aten.expand", "aten.expand_as", "aten.broadcast_to", "aten.as_strided", "aten.unfold")
"""Views in which several elements may share an address; a copy of such a view has a new layout."""

NEED_STRIDES = ("aten.view", "aten._unsafe_view", "aten.view.dtype", "aten.as_strided", "aten.view_as_complex")
"""Operations that work only for some strides."""


def viewed(op: Op) -> Value | None:
    """The first argument of `op`, if the results may share its memory."""
    first = op.args[0] if op.args and lookup(op.name) is None else None
    return first if isinstance(first, Value) and aten.is_view(op.name) else None


def is_view(op: Op) -> bool:
    """Whether the results of `op` may share the memory of its first argument."""
    return viewed(op) is not None


def origin(value: Value) -> Value:
    """The value that `value` is a view of, or itself."""
    while (source := viewed(value.op)) is not None:
        value = source
    return value


def leaves_the_graph(graph: Graph, value: Value) -> bool:
    """Whether `value`, or a view of it, is an output or an operation that writes state reads it."""
    return any(user is graph.return_op or Effects.WRITES in user.effects for user in _readers(graph, value))


def why_not_replaced(graph: Graph, copy: Value, source: Value) -> Missed | None:
    """Why the users of `copy` must not read the equal `source` instead; None if they may."""
    root = origin(source)
    if leaves_the_graph(graph, copy):
        if root.op.role is Role.STATE or root.op.name == INPUT:
            return Missed("an output must not share memory with an input", root)
        if leaves_the_graph(graph, root):
            return Missed("two outputs would be one tensor", source)
    if any(user.name in NEED_STRIDES for user in _readers(graph, copy)):
        chain = [source.op]
        while (before := viewed(chain[-1])) is not None:
            chain.append(before.op)
        if any(op.name in (*OVERLAPPING, INPUT) or op.is_state for op in chain):
            return Missed("a later view needs the strides of the copy", source)
    return None


def _readers(graph: Graph, value: Value) -> list[Op]:
    """The operations that read `value` or a view of it."""
    found: dict[Op, None] = {}
    stack = [value]
    while stack:
        for user in graph.users(stack.pop()):
            if user not in found:
                found[user] = None
                stack += user.results if user is not graph.return_op and is_view(user) else ()
    return list(found)
