"""Quantized matmuls that send their results while they run.

    %y = kernel.scaled_linear(%x_q, %x_s, %w_q, %w_s)                                     only %p reads %y
    %p = coll.reduce_scatter_tokens(%y) {few = 512, mesh = "tp", ranks = 2}
  ->
    %p = coll.linear_scatter_tokens(%x_q, %x_s, %w_q, %w_s) {few = 512, mesh = "tp", ranks = 2, …}

Runs after `to-kernels`, and after the passes that fuse what follows a matmul.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Rule
from qcompiler.pass_manager.pipeline import Effect, Pass

LINEAR = "kernel.scaled_linear"
OTHER = Missed("it scatters something else than the result of a quantized matmul")


class LinearThenScatter(Rule):
    """reduce_scatter_tokens(scaled_linear(x, w))  ->  linear_scatter_tokens(x, w)"""

    root = ("coll.reduce_scatter_tokens",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        terms = op["x"]
        if terms.op.name != LINEAR:
            return OTHER
        for user in graph.users(terms):
            if user is not op:
                return Missed(f"the terms of the sum are also read by {user.name}", terms)
        return {"linear": terms.op}

    def rewrite(self, op: Op, rewriter: Rewriter, linear: Op, **_: Any) -> None:
        attrs = {**linear.attrs, **op.attrs}
        rewriter.replace(op, *rewriter.insert("coll.linear_scatter_tokens", *linear.args, attrs=attrs).results)


@dataclass(frozen=True)
class FuseLinearScatter(Pass):
    """reduce_scatter_tokens(scaled_linear(x, w))  ->  linear_scatter_tokens(x, w)."""

    name: ClassVar[str] = "fuse-linear-scatter"
    effect: ClassVar[Effect] = Effect.EXACT
    unrelated: ClassVar[tuple[Missed, ...]] = (OTHER,)

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (LinearThenScatter(),)
