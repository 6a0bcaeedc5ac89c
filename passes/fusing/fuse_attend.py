"""Fuses attention over a key-value cache with the quantization of its result, for the output projection.

    %o = state.attend(%cache, %query, %slots, %lengths) {scale = 0.125} : bf16[s0, 32, s1, 128]
    %t = aten.transpose.int(%o, 1, 2)
    %x = aten.view(%t, [%b, %n, 4096])
    %q, %s = kernel.quantize(%x) {format = #fp8_tile}
  ->
    %q, %s = state.fused_attend(%cache, %query, %slots, %lengths) {format = #fp8_tile, scale = 0.125}

Legal if nothing else reads the result of the attention, each row is one token with all its heads in order, and each
tile lies within a head or covers whole heads: the kernel computes the heads of a token in different programs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from passes.analyses.arithmetic import VIEWS
from qcompiler.dialects.fused_attend import why_not_heads
from qcompiler.dialects.state import cache_of
from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Role, Rule, Value
from qcompiler.pass_manager.pipeline import Effect, Pass

ATTEND = "state.attend"

SAME_ORDER = (*VIEWS, "aten.clone", "aten.contiguous")
"""Operations whose result has the elements of their operand in the same order, last index fastest."""

OTHER = Missed("it is not the result of attention over a cache")


class AttendThenQuantize(Rule):
    """quantize(view(transpose(attend(q), 1, 2)))  ->  fused_attend(q)"""

    root = ("kernel.quantize",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        moves = _moves(op["x"])
        attend = moves[-1]["self"].op if moves else op["x"].op
        if attend.name != ATTEND:
            return OTHER
        for read in (attend.result, *(move.result for move in moves)):
            if len(graph.uses(read)) > 1:
                return Missed("it is read elsewhere, too", read)
        batch, heads, tokens, size = attend.result.tensor.shape
        turns = [move for move in moves if move.name not in SAME_ORDER]
        if len(turns) != 1 or turns != moves[-1:] or not _swaps_heads_and_tokens(turns[0]):
            return Missed("its rows are not the heads of a token in order", op["x"])
        if op["x"].tensor.shape != (batch, tokens, heads * size):
            return Missed("its rows are not [rows of the batch, tokens, all heads]", op["x"])
        if cache_of(attend["cache"]).within:
            return Missed("the values of the cache are within its keys, for which no kernel quantizes", op["x"])
        if op.get("prescale") is not None:
            return Missed("a factor for each column is applied before the quantization", op["x"])
        why = why_not_heads(op.format(), size)
        return {"attend": attend} if why is None else Missed(why, op["x"])

    def rewrite(self, op: Op, rewriter: Rewriter, attend: Op, **_: Any) -> None:
        moves = _moves(op["x"])
        attrs = {**attend.attrs, "format": op.format()}
        new = rewriter.insert("state.fused_attend", *attend.args, attrs=attrs)
        rewriter.replace(op, *new.results)
        for unread in (*moves, attend):
            rewriter.erase_unread(unread)


def _moves(value: Value) -> list[Op]:
    """The operations that only move elements, from `value` back to another operation's result."""
    found: list[Op] = []
    while value.op.role is Role.VIEW or value.op.name in SAME_ORDER:
        found.append(value.op)
        value = value.op["self"]
    return found


def _swaps_heads_and_tokens(op: Op) -> bool:
    """Whether an operation exchanges axes 1 and 2 of 4."""
    if op.name == "aten.permute":
        return [axis % 4 for axis in op.argument("dims")] == [0, 2, 1, 3]  # type: ignore[union-attr, operator]  # ints
    axes = (op.argument("dim0"), op.argument("dim1")) if op.name == "aten.transpose.int" else ()
    return sorted(axis % 4 for axis in axes) == [1, 2]  # type: ignore[operator]  # ints


@dataclass(frozen=True)
class FuseAttend(Pass):
    """quantize(view(transpose(attend(q))))  ->  fused_attend(q)."""

    name: ClassVar[str] = "fuse-attend"
    effect: ClassVar[Effect] = Effect.EXACT
    unrelated: ClassVar[tuple[Missed, ...]] = (OTHER,)

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (AttendThenQuantize(),)
