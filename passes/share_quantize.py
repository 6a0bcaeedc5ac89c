"""One quantize for each value: readers of equal quantizations share the first of them.

    %q_s, %q_x = quant.quantize(%x) {...}          %q_s, %q_x = quant.quantize(%x) {...}
    %k_s, %k_x = quant.quantize(%x) {...}    ->    (gone: its readers read the first)

After fp8-tile, which quantizes the input of each matmul on its own: q, k and v then read one quantized tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Rule
from qcompiler.pass_manager import Effect, Pass


class ShareTwin(Rule):
    """op(x) {a}; op(x) {a}  ->  op(x) {a}, for operations that quantize or dequantize"""

    root = ("quant.quantize", "quant.dequantize")

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        for other in graph.users(op.tensor(0)):
            if other is op:
                return Missed("it is the first of its kind")
            if (other.name, other.args, other.attrs) == (op.name, op.args, op.attrs):
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
        """Nothing: that a value has one quantization is the aim."""
        return {}
