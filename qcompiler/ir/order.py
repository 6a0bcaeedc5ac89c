"""The order of one graph's operations: a linked ring with ranks, for fast changes and comparisons."""

import math
from collections.abc import Iterator

from qcompiler.ir.op import Op

GAP = 1 << 64
"""Initial distance between neighboring ranks; allows 64 halvings before all ranks are renumbered."""


class Order:
    """A sequence of operations; `last` is always at the end."""

    def __init__(self, last: Op) -> None:
        self.last = last
        self._next = {last: last}
        self._previous = {last: last}
        self._rank: dict[Op, float] = {last: math.inf}

    def __iter__(self) -> Iterator[Op]:
        """Iterates over a snapshot of the order, so the order may change during iteration."""
        row = []
        op = self._next[self.last]
        while op is not self.last:
            row.append(op)
            op = self._next[op]
        return iter([*row, op])

    def __contains__(self, op: object) -> bool:
        return op in self._next

    def rank(self, op: Op) -> float:
        """A number that increases along the order."""
        return self._rank[op]

    def after(self, op: Op) -> Op:
        """The operation after `op`, which is not the last."""
        return self._next[op]

    def place(self, op: Op, before: Op) -> None:
        """Inserts `op`, which is not in the order yet, before `before`, which is."""
        previous = self._previous[before]
        self._next[previous] = self._previous[before] = op
        self._next[op], self._previous[op] = before, previous
        low = 0 if previous is self.last else self._rank[previous]
        if before is self.last:
            self._rank[op] = low + GAP
        elif (middle := (low + self._rank[before]) // 2) > low:
            self._rank[op] = middle
        else:
            self._rank = {op: at * GAP for at, op in enumerate(self, 1)} | {self.last: math.inf}

    def remove(self, op: Op) -> None:
        """Removes `op` from the order."""
        previous, following = self._previous.pop(op), self._next.pop(op)
        self._next[previous], self._previous[following] = following, previous
        del self._rank[op]
