"""Quantizes the weights now: what is quantized and constant becomes two stored weights, and the original is let go.

    %w = core.param() {name = "fc1.weight"} : bf16[512, 256]
    %w_q, %w_s = quant.quantize(%w) {…}
  ->
    %w_q = core.param() {name = "fc1.weight_q"} : f8e4m3fn[512, 256]
    %w_s = core.param() {name = "fc1.weight_s"} : f32[4, 2]

One weight is in memory at a time. A dequantize is never folded: that would undo the quantization.
A graph without weights (from text) is rewritten in the same way; only the numbers are missing.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Rule, apply_rules
from qcompiler.ir.dataflow import parameters_of, part_of
from qcompiler.pass_manager import Effect, Pass


@dataclass(frozen=True)
class QuantizedWeight(Rule):
    """quantize(constant)  ->  param, param"""

    taken: set[str]
    """Names of weights; grows as weights are added."""

    root: ClassVar[tuple[str, ...]] = ("quant.quantize",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if not graph.is_constant(op.tensor(0)):
            return Missed("it quantizes an activation", op.tensor(0))
        sources = parameters_of(op.tensor(0))
        if not sources and not graph.weights:
            return Missed("it quantizes literals, and the graph has no weights store", op.tensor(0))
        return {"stem": sources[0].attrs["name"] if len(sources) == 1 else op.tensor(0).name}

    def rewrite(self, op: Op, rewriter: Rewriter, stem: str, **_: Any) -> None:
        graph = rewriter.graph
        names = [self.free(f"{stem}{suffix}") for suffix in ("_q", "_s")]
        sources = parameters_of(op.tensor(0))
        if graph.weights:
            read = [str(source.attrs["name"]) for source in sources] or [next(iter(graph.weights))]
            weights = {name: graph.weights[name] for name in read}
            graph.weights.update(zip(names, interpret(part_of(op), [], weights), strict=True))
        params = [
            rewriter.insert("core.param", attrs={"name": name}, types=[value.type], names=[name]).result
            for name, value in zip(names, op.results, strict=True)
        ]
        inner = op.tensor(0).op
        rewriter.replace(op, *params, keep_names=False)
        rewriter.erase_unread(inner)
        for param, name in zip(params, names, strict=True):
            graph.rename(param, name)  # the quantize had that name until now
        for source in sources:
            if source not in graph and source.attrs["name"] in graph.weights:
                del graph.weights[str(source.attrs["name"])]  # pop would load it

    def free(self, name: str) -> str:
        """A weight name like `name` that is not taken; takes it."""
        candidate, count = name, 0
        while candidate in self.taken:
            count += 1
            candidate = f"{name}_{count}"
        self.taken.add(candidate)
        return candidate


@dataclass(frozen=True)
class FoldConstants(Pass):
    """quantize(weight)  ->  stored weight and scale."""

    name: ClassVar[str] = "fold-constants"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, graph: Graph) -> bool:
        """One rule, which must know the names that are taken."""
        return apply_rules(graph, [QuantizedWeight(_taken(graph))], self.name)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Nothing: an activation is quantized in each call, which surprises nobody."""
        return {}


def _taken(graph: Graph) -> set[str]:
    """The names of the weights that the graph reads or holds."""
    return {str(op.attrs["name"]) for op in graph.ops() if op.name in ("core.param", "core.buffer")} | set(
        graph.weights
    )
