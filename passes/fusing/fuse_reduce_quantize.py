"""Sums over ranks in the kernel that normalizes and quantizes the sum.

    %s = coll.all_reduce(%y) {mesh = "tp"}                                               only %n_q reads %s
    %n_q, %n_s, %h = kernel.fused_quantize(%x, %s, %w) {expression = "h0 = bf16(x0 + x1); …", keep = ["h0"], …}
  ->
    %n_q, %n_s, %h = coll.fused_reduce_quantize(%x, %y, %w) {…, mesh = "tp", summed = 1}

So a small sum of GPUs of one host is never stored. Runs after the passes that fuse quantizations with the arithmetic
before them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Rule
from qcompiler.pass_manager.pipeline import Effect, Pass

SUM = "coll.all_reduce"
NO_SUM = Missed("it does not read a sum over ranks")


class ReduceThenQuantize(Rule):
    """fused_quantize(x, all_reduce(y), …)  ->  fused_reduce_quantize(x, y, …)"""

    root = ("kernel.fused_quantize",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        operands = [value for _, value in op.operands()]
        place = next((place for place, value in enumerate(operands) if value.op.name == SUM), None)
        if place is None:
            return NO_SUM
        found = operands[place]
        if found.tensor.shape != op["x"].tensor.shape:
            return Missed("the sum is one number for each column", found)
        for user in graph.users(found):
            if user is not op:
                return Missed(f"the sum is also read by {user.name}", found)
        if operands.count(found) > 1:
            return Missed("the sum is two operands", found)
        return {"place": place, "found": found.op}

    def rewrite(self, op: Op, rewriter: Rewriter, place: int, found: Op, **_: Any) -> None:
        args = (*op.args[:place], found["x"], *op.args[place + 1 :])
        attrs = {**op.attrs, "mesh": found.attrs["mesh"], "summed": place}
        rewriter.replace(op, *rewriter.insert("coll.fused_reduce_quantize", *args, attrs=attrs).results)
        rewriter.graph.erase(found)  # on all ranks, which have the same program


@dataclass(frozen=True)
class FuseReduceQuantize(Pass):
    """fused_quantize(x, all_reduce(y))  ->  fused_reduce_quantize(x, y)."""

    name: ClassVar[str] = "fuse-reduce-quantize"
    effect: ClassVar[Effect] = Effect.EXACT
    unrelated: ClassVar[tuple[Missed, ...]] = (NO_SUM,)

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (ReduceThenQuantize(),)
