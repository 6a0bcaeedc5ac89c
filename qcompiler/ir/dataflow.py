"""Dataflow queries: what a value is computed from, and which operations use it."""

from collections.abc import Callable, Iterator

from qcompiler.ir.graph import PARAM, Graph
from qcompiler.ir.op import Op, Value, map_tree


def parameters_of(value: Value) -> list[Op]:
    """The `core.param` operations that a value is computed from, each once."""
    return [op for op in ancestors(value) if op.name == PARAM]


def ancestors(value: Value) -> list[Op]:
    """The operations that a value is computed from, each once, in topological order; ends with `value.op`."""
    found: dict[Op, None] = {}
    seen: set[Op] = set()
    stack = [(value.op, False)]
    while stack:
        op, complete = stack.pop()
        if complete:
            found[op] = None
        elif op not in seen:
            seen.add(op)
            stack.append((op, True))
            stack += [(operand.op, False) for _, operand in op.operands()]
    return list(found)


def origins_of(graph: Graph, name: str) -> list[str]:
    """The weights that a weight was derived from, each once; itself if no pass has created it."""
    if (derivation := graph.derivations.get(name)) is None:
        return [name]
    made = derivation.graph.outputs[derivation.output]
    inner = parameters_of(made) if isinstance(made, Value) else []
    return list(dict.fromkeys(origin for param in inner for origin in origins_of(graph, str(param.attrs["name"]))))


def part_of(op: Op) -> Graph:
    """The computation of a constant operation as a separate graph without inputs; its outputs are the results."""
    part = Graph("part")
    twin: dict[Value, Value] = {}

    def swap(leaf: object) -> object:
        return twin[leaf] if isinstance(leaf, Value) else leaf

    for inner in ancestors(op.results[0]):
        args, attrs = map_tree(swap, inner.args), {key: map_tree(swap, arg) for key, arg in inner.attrs.items()}
        types, names = [value.type for value in inner.results], [value.name for value in inner.results]
        made = part.append(inner.name, *args, attrs=attrs, types=types, names=names, loc=inner.loc)
        twin.update(zip(inner.results, made.results, strict=True))
    part.set_outputs(twin[value] for value in op.results)
    return part


def users_through(graph: Graph, value: Value, passes: Callable[[Op], bool]) -> Iterator[Op]:
    """The operations that use `value`, directly or through operations for which `passes` is true."""
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
