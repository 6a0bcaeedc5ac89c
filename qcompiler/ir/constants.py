"""Which operations of a graph are constant: computed from parameters and literals alone, so alike in every call."""

from functools import cache

import networkx as nx

from qcompiler.ir.op import Op
from qcompiler.ir.op_table import lookup

PARAM = "core.param"
RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal", "uniform", "poisson", "exponential", "empty")
"""Parts of the names of operations that give another answer each time."""


class Constants:
    """Kept up to date with the network, change by change, so that asking costs nothing."""

    def __init__(self, net: "nx.MultiDiGraph[Op]") -> None:
        self._net = net
        self._constant: set[Op] = set()

    def __contains__(self, op: Op) -> bool:
        return op in self._constant

    def update(self, op: Op) -> None:
        """Looks again at an operation whose operands have changed, and at what it reaches if that changes the answer."""
        stack = [op]
        while stack:
            op = stack.pop()
            constant = op.name == PARAM or (
                is_function(op.name) and all(v.op in self._constant for _, v in op.operands())
            )
            if constant != (op in self._constant):
                (self._constant.add if constant else self._constant.remove)(op)
                stack += self._net.successors(op)

    def forget(self, op: Op) -> None:
        """An operation is gone."""
        self._constant.discard(op)


def has_effect(op: Op) -> bool:
    """Whether an operation must stay although nobody reads it: it writes, checks, or draws random numbers.

    To leave out a draw would give other numbers to all that draw later.
    """
    definition = lookup(op.name)
    if definition is not None:
        return definition.effect or op.name in ("core.input", "core.return")
    name = op.name.split(".")[1]
    writes = name.endswith("_") and not name.endswith("__")
    return writes or not op.results or any(word in name for word in RANDOM if word != "empty")


@cache
def is_function(name: str) -> bool:
    """Whether equal operands give equal results, always: neither state nor chance is involved."""
    definition = lookup(name)
    return not any(word in name for word in RANDOM) and (definition is None or definition.meaning is not None)
