"""Sorts entries by their expert in one or two kernels, with all that follows from the order.

    %key, %order = aten.sort(%expert)                       0 <= expert <= 7, proven
    %token = aten.floor_divide(%order, 2)
    %place = aten.index_put(%empty, [%order], %arange)      the inverse of the order
    %ends = aten.cumsum(aten.histc(%key, 8, 0, 7), 0)       the end of each expert's rows
  ->
    %key, %order, %token, %place, %ends = kernel.group_entries(%expert) {groups = 8, each = 2}

Torch sorts any numbers, and runs a dozen kernels here. Entries of one expert keep their order, which is one of the
orders that torch may choose. Runs on targets with such kernels, after the passes that read the operations on the left.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from passes.analyses.arithmetic import is_cast
from passes.analyses.integer_ranges import is_inverse, limits_of
from qcompiler.dialects.entries import MOST_GROUPS
from qcompiler.ir import DType, Graph, Match, Missed, Op, Rewriter, Rule, TensorType, Value
from qcompiler.pass_manager.pipeline import Effect, Pass


class SortSmall(Rule):
    """sort(keys), and what follows from the order  ->  group_entries(keys), for small integers"""

    root = ("aten.sort", "aten.sort.stable")

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        keys, (key, order) = op["self"], op.results
        if len(keys.tensor.shape) != 1 or keys.tensor.dtype is not DType.i64 or op.argument("descending") is True:
            return Missed("it does not sort a vector of i64 in ascending order")
        limits = limits_of(keys)
        if limits is None or limits.low != 0 or not isinstance(limits.high, int) or limits.high >= MOST_GROUPS:
            return Missed(f"its numbers are not proven to be from 0 to less than {MOST_GROUPS}", keys)
        groups = limits.high + 1
        places = [user.result for user in graph.users(order) if _is_inverse(user, order)]
        ends = list(_ends_of(key, groups, graph))
        if not places and not ends:
            return Missed("nothing reads the ends of its groups or the inverse of its order", order)
        owners = [user for user in graph.users(order) if _divisor(user, order) is not None]
        each = _divisor(owners[0], order) if owners else 1
        owned = [user.result for user in owners if _divisor(user, order) == each]
        return {"keys": keys, "groups": groups, "each": each, "found": (owned, places, ends)}

    def rewrite(
        self, op: Op, rewriter: Rewriter, keys: Value, groups: int, each: int, found: Sequence[list[Value]], **_: Any
    ) -> None:
        made = rewriter.insert("kernel.group_entries", keys, attrs={"each": each, "groups": groups})
        rewriter.replace(op, *made.results[:2])
        for values, new in zip(found, made.results[2:], strict=True):
            for value in values:
                name = value.name
                rewriter.graph.replace(value, new)
                rewriter.erase_unread(value.op)
                if value is values[0]:
                    rewriter.graph.rename(new, name)


def _is_inverse(user: Op, order: Value) -> bool:
    return len(user.results) == 1 and is_inverse(user.result, order)


def _divisor(user: Op, order: Value) -> int | None:
    """The number by which an operation divides an order, rounding down."""
    if user.name != "aten.floor_divide" or user.argument("self") is not order:
        return None
    by = user.argument("other")
    return by if isinstance(by, int) and not isinstance(by, bool) and by >= 1 else None


def _ends_of(key: Value, groups: int, graph: Graph) -> Iterator[Value]:
    """Sums over the counts of all sorted keys, as i32: a count has one bin for each number."""
    values = [key, *(user.result for user in graph.users(key) if is_cast(user))]
    for count in (user for value in values for user in graph.users(value)):
        bins, low, high = (
            (count.argument(name) for name in ("bins", "min", "max")) if count.name == HISTC else (0, 0, 0)
        )
        if (bins, low, high) != (groups, 0, groups - 1):
            continue
        for total in graph.users(count.result):
            kind = TensorType(DType.i32, (groups,))
            if total.name == "aten.cumsum" and total.argument("dim") in (0, -1) and total.result.type == kind:
                yield total.result


HISTC = "aten.histc"


@dataclass(frozen=True)
class GroupEntries(Pass):
    """sort(keys), and what follows from the order  ->  group_entries(keys)."""

    name: ClassVar[str] = "group-entries"
    effect: ClassVar[Effect] = Effect.EXACT

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (SortSmall(),)
