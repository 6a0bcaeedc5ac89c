"""Which operations of a graph are constant: computed from parameters and literals alone, so alike in every call."""

import networkx as nx

from qcompiler.ir.op import Op


class Constants:
    """Kept up to date with the network, change by change, so that asking costs nothing."""

    def __init__(self, net: "nx.MultiDiGraph[Op]") -> None:
        self._net = net
        self._constant: set[Op] = set()

    def __contains__(self, op: Op) -> bool:
        return op in self._constant

    def update(self, op: Op) -> None:
        """Looks again at an operation whose operands have changed, and at its readers if that changes the answer."""
        stack = [op]
        while stack:
            op = stack.pop()
            constant = op.effects.repeatable and all(v.op in self._constant for _, v in op.operands())
            if constant != (op in self._constant):
                (self._constant.add if constant else self._constant.remove)(op)
                stack += self._net.successors(op)

    def forget(self, op: Op) -> None:
        """An operation is gone."""
        self._constant.discard(op)
