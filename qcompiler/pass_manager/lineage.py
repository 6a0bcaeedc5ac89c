"""Tracks the names of a value while passes rewrite a graph.

A pass keeps the name of a value that it replaces. If it fuses an operation with its only user, the user's name stays.
"""

from collections.abc import Set
from itertools import pairwise

from qcompiler.ir import Graph


def lineages(graphs: list[Graph]) -> dict[str, list[str]]:
    """Value in the first graph -> all its names up to the last graph; omits removed values."""
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
    """The chain of users that a value of `before` was fused with, up to the first one in `alive`.

    Empty if the value itself is alive; None if it was removed.
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
