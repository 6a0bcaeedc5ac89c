"""Keeps one quantize per value: users of equal quantizations share the first of them.

    %q_x, %q_s = quant.quantize(%x) {...}          %q_x, %q_s = quant.quantize(%x) {...}
    %k_x, %k_s = quant.quantize(%x) {...}    ->    (removed: its users read the first)

Runs after fp8-tile, which quantizes the input of each matmul separately. Afterwards q, k and v read one quantized
tensor, and two matmuls with one weight read one quantized weight, even if each transposes it separately.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from passes.analyses.memory import leaves_the_graph
from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Role, Rule, Value
from qcompiler.pass_manager.pipeline import Effect, Pass

SHAPERS = (Role.VIEW, Role.CAST)
"""Roles of operations between a weight and its quantize."""


class ShareTwin(Rule):
    """op(x) {a}; op(x) {a}  ->  op(x) {a}, for operations that quantize, dequantize, or prepare a weight"""

    root = (Role.QUANTIZE, Role.DEQUANTIZE, *SHAPERS)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if not op.effects.repeatable:
            return Missed("two calls may give different results")
        source = op.argument("data" if op.role is Role.DEQUANTIZE else "x")
        if not isinstance(source, Value):
            return Missed("its operand is not a value")
        if op.role in SHAPERS and not graph.is_constant(op.results[0]):
            return Missed("it does not prepare a weight", source)
        for other in graph.users(source):
            if other is op:
                return Missed("it is the first of its kind")
            if (other.name, other.args, other.attrs) == (op.name, op.args, op.attrs):
                pairs = zip(op.results, other.results, strict=True)
                if any(leaves_the_graph(graph, ours) and leaves_the_graph(graph, theirs) for ours, theirs in pairs):
                    return Missed("two outputs would be one tensor", other.results[0])
                return {"twin": other}
        return Missed("no other operation computes the same")

    def rewrite(self, op: Op, rewriter: Rewriter, twin: Op, **_: Any) -> None:
        rewriter.replace(op, *twin.results, keep_names=False)


@dataclass(frozen=True)
class ShareQuantize(Pass):
    """Equal quantizations of one value  ->  one."""

    name: ClassVar[str] = "share-quantize"
    effect: ClassVar[Effect] = Effect.EXACT

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (ShareTwin(),)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Nothing: one quantization per value is the goal."""
        return {}
