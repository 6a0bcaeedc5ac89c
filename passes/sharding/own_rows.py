"""Drops the zeros of other ranks' rows where a kernel writes them anyway.

    %y = kernel.grouped_linear(%x_q, %x_s, %w_q, %w_s, %ends)
    %y_own = coll.own_rows(%y, %ends)
  ->
    %y = kernel.grouped_linear(%x_q, %x_s, %w_q, %w_s, %ends)

The grouped matmul of torch leaves rows after the last group undefined; ours are zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Rule
from qcompiler.pass_manager.pipeline import Effect, Pass

ZERO_AFTER_GROUPS = ("quant.grouped_linear", "kernel.grouped_linear", "transformers.grouped_mm_fallback")


class AlreadyZero(Rule):
    """own_rows(grouped_linear(x, w, ends), ends)  ->  grouped_linear(x, w, ends)"""

    root = ("coll.own_rows",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        matmul = op["x"].op
        if matmul.name not in ZERO_AFTER_GROUPS or all(value is not op["ends"] for _, value in matmul.operands()):
            return Missed(f"{matmul.name} may leave these rows undefined", op["x"])
        return {}

    def rewrite(self, op: Op, rewriter: Rewriter, **_: object) -> None:
        rewriter.replace(op, op["x"])


@dataclass(frozen=True)
class OwnRows(Pass):
    """own_rows(grouped_linear(x, w, ends), ends)  ->  grouped_linear(x, w, ends)."""

    name: ClassVar[str] = "own-rows"
    effect: ClassVar[Effect] = Effect.EXACT

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (AlreadyZero(),)
