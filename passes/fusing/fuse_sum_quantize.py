"""Adds quantized terms, such as those that ranks exchange, in the kernel that normalizes and quantizes their sum.

    %p = quant.sum_terms(%t_q, %t_s) {format = #fp8_tile, out_dtype = bf16}                  only %n_q reads %p
    %n_q, %n_s, %h = kernel.fused_quantize(%x, %p, %w) {expression = "h0 = bf16(x0 + x1); …", keep = ["h0"], …}
  ->
    %n_q, %n_s, %h = kernel.fused_sum_quantize(%t_q, %t_s, %x, %w)
      {expression = "h0 = bf16(x0 + bf16(y0)); …", keep = ["h0"], term_format = #fp8_tile, …}

So the sum is never stored. Runs after the passes that fuse quantizations with the arithmetic before them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from passes.fusing.fuse_epilogue import with_operands
from passes.fusing.region_expressions import in_order, rounded
from qcompiler.dialects.expression_nodes import Name
from qcompiler.dialects.fused_expression import parse
from qcompiler.dialects.kernel import why_no_kernel
from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Rule, Value
from qcompiler.pass_manager.pipeline import Effect, Pass

SUM = "quant.sum_terms"
NO_SUM = Missed("it does not read a sum of terms")


class SumThenQuantize(Rule):
    """fused_quantize(sum_terms(t), x, …)  ->  fused_sum_quantize(t, x, …)"""

    root = ("kernel.fused_quantize",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        found = next((value for _, value in op.operands() if value.op.name == SUM), None)
        if found is None:
            return NO_SUM
        for user in graph.users(found):
            if user is not op:
                return Missed(f"the sum is also read by {user.name}", found)
        if why := why_no_kernel(found.op.format()):
            return Missed(why, found)
        return {"found": found}

    def rewrite(self, op: Op, rewriter: Rewriter, found: Value, **_: Any) -> None:
        given = {f"x{place}": value for place, (_, value) in enumerate(op.operands())}
        total = rounded(Name("y0"), found.tensor.dtype)
        expression = with_operands(
            parse(str(op.attrs["expression"])), {name: total for name, value in given.items() if value is found}
        )
        vectors = [name for name, value in given.items() if len(value.tensor.shape) < len(found.tensor.shape)]
        expression, order = in_order(expression, vectors)
        attrs = {**op.attrs, "expression": str(expression), "term_format": found.op.format()}
        args = (found.op["terms"], found.op["scale"], *(given[name] for name in order))
        rewriter.replace(op, *rewriter.insert("kernel.fused_sum_quantize", *args, attrs=attrs).results)
        rewriter.erase_unread(found.op)


@dataclass(frozen=True)
class FuseSumQuantize(Pass):
    """fused_quantize(sum_terms(t), x)  ->  fused_sum_quantize(t, x)."""

    name: ClassVar[str] = "fuse-sum-quantize"
    effect: ClassVar[Effect] = Effect.EXACT
    unrelated: ClassVar[tuple[Missed, ...]] = (NO_SUM,)

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (SumThenQuantize(),)
