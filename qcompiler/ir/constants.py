"""Tracks constant operations: those that depend only on parameters and literals."""

import networkx as nx

from qcompiler.ir.op import Op


class Constants:
    """The set of constant operations, updated on each graph change so that queries are O(1)."""

    def __init__(self, net: "nx.MultiDiGraph[Op]") -> None:
        self._net = net
        self._constant: set[Op] = set()

    def __contains__(self, op: Op) -> bool:
        return op in self._constant

    def update(self, op: Op) -> None:
        """Rechecks an operation whose operands changed, and its users if the result changes."""
        stack = [op]
        while stack:
            op = stack.pop()
            constant = op.effects.repeatable and all(v.op in self._constant for _, v in op.operands())
            if constant != (op in self._constant):
                (self._constant.add if constant else self._constant.remove)(op)
                stack += self._net.successors(op)

    def forget(self, op: Op) -> None:
        """Removes an erased operation."""
        self._constant.discard(op)
