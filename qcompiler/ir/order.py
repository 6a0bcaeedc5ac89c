"""The order of one graph's operations: a ring that is cheap to change, and ranks that are cheap to compare."""

import math
from collections.abc import Iterator

from qcompiler.ir.op import Op

GAP = 1 << 64
"""Between the ranks of neighbours at first: this many halvings, 64, before all ranks are dealt anew."""


class Order:
    """Operations in a row; `last` always ends it."""

    def __init__(self, last: Op) -> None:
        self.last = last
        self._next = {last: last}
        self._previous = {last: last}
        self._rank: dict[Op, float] = {last: math.inf}

    def __iter__(self) -> Iterator[Op]:
        """Every operation, as the order is now: changing it meanwhile is safe."""
        row = []
        op = self._next[self.last]
        while op is not self.last:
            row.append(op)
            op = self._next[op]
        return iter([*row, op])

    def __contains__(self, op: object) -> bool:
        return op in self._next

    def rank(self, op: Op) -> float:
        """A number that grows along the order."""
        return self._rank[op]

    def place(self, op: Op, before: Op) -> None:
        """Puts `op`, which is not in the row, in front of `before`, which is."""
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
        """Takes `op` out of the row."""
        previous, following = self._previous.pop(op), self._next.pop(op)
        self._next[previous], self._previous[following] = following, previous
        del self._rank[op]
