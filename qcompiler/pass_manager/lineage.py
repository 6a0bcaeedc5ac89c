"""Under which names a value goes on while passes rewrite a graph.

A pass keeps the name of what it replaces. Where it fuses an operation with its only reader, that one's name stays.
"""

from collections.abc import Set
from itertools import pairwise

from qcompiler.ir import Graph


def lineages(graphs: list[Graph]) -> dict[str, list[str]]:
    """Value of the first graph -> the names that it has gone by, its last one included; without what was removed."""
    found = {value.name: [value.name] for op in graphs[0] for value in op.results}
    for before, after in pairwise(graphs):
        alive = values_of(after)
        for first, names in list(found.items()):
            fused = fused_into(before, alive, names[-1])
            if fused is None:
                del found[first]
            else:
                names += fused
    return found


def fused_into(before: Graph, alive: Set[str], name: str) -> list[str] | None:
    """The readers, one behind the other, that a value of `before` was fused with, down to the first that is `alive`.

    Empty when the value itself is alive; None when it was removed.
    """
    names = [name]
    while names[-1] not in alive:
        users = before.users(before[names[-1]])
        if len(users) != 1 or not users[0].results:
            return None
        names.append(users[0].results[0].name)
    return names[1:]


def values_of(graph: Graph) -> set[str]:
    """The names of all values."""
    return {value.name for op in graph for value in op.results}
