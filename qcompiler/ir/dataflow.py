"""Facts that follow from the dataflow alone: which weights a value is made of, and what a value reaches."""

from collections.abc import Callable, Iterator

from qcompiler.ir.graph import PARAM, Graph
from qcompiler.ir.op import Op, Value


def parameters_of(value: Value) -> list[Op]:
    """The `core.param` operations that a value is computed from, each once, in order of discovery."""
    found: dict[Op, None] = {}
    seen: set[Op] = set()
    stack = [value.op]
    while stack:
        op = stack.pop()
        if op in seen:
            continue
        seen.add(op)
        if op.name == PARAM:
            found[op] = None
        stack += [operand.op for _, operand in op.operands()]
    return list(found)


def readers_through(graph: Graph, value: Value, passes: Callable[[Op], bool]) -> Iterator[Op]:
    """Every operation that reads `value`, directly or through operations for which `passes` holds."""
    seen: set[Op] = set()
    stack = [value]
    while stack:
        for user in graph.users(stack.pop()):
            if user in seen:
                continue
            seen.add(user)
            yield user
            if passes(user):
                stack += user.results
