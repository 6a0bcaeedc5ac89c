"""Quantizes before tokens are gathered, so that ranks send codes and scales instead of bf16.

    %n = coll.all_gather_tokens(%n_part, [%b, %s]) {few = 64, mesh = "tp", ranks = 2} : bf16[s0, s1, 512]
    %n_q, %n_s = kernel.quantize(%n) {format = #fp8_tile<scale_layout = "col_major">}
  ->
    %n_part_q, %n_part_s = kernel.quantize(%n_part) {format = #fp8_tile<scale_layout = "col_major">}
    %n_q = coll.all_gather_tokens(%n_part_q, [%b, %s]) {few = 64, mesh = "tp", ranks = 2} : f8e4m3fn[s0, s1, 512]
    %n_s = coll.all_gather_tokens(%n_part_s, [%b, %s]) {…, scale_layout = "col_major"} : f32[s0, s1, 4]

Exact, because no scale covers several tokens. Only if every user of the gathered value quantizes it. So with
`gather_chosen_tokens`. Runs before the passes that fuse a quantization with the norm before it, so that a rank also
quantizes only its own tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Rule, Value
from qcompiler.pass_manager.pipeline import Effect, Pass

QUANTIZE, GATHERS = "kernel.quantize", ("coll.all_gather_tokens", "coll.gather_chosen_tokens")
NOT_GATHERED = Missed("it does not quantize tokens that are gathered")


class QuantizeThenGather(Rule):
    """quantize(all_gather_tokens(x))  ->  all_gather_tokens of the results of quantize(x)"""

    root = (QUANTIZE,)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        gather = op["x"].op
        if gather.name not in GATHERS:
            return NOT_GATHERED
        for user in graph.users(gather.result):
            if user.name != QUANTIZE:
                return Missed(f"the gathered tokens are also read by {user.name}", gather.result)
            if user.format().block[0] != 1 or len(user.results) != 2:
                return Missed("one scale covers several tokens", user.results[1])
        if any(isinstance(arg, Value) and not graph.is_constant(arg) for arg in op.args[1:]):
            return Missed("another operand may depend on the token", op.results[0])
        return {"gather": gather}

    def rewrite(self, op: Op, rewriter: Rewriter, gather: Op, **_: Any) -> None:
        part, layout = gather["x"], op.format().scale_layout
        names = [f"{part.name}_q", f"{part.name}_s"]
        made = rewriter.insert(op.name, part, *op.args[1:], attrs=op.attrs, names=names)
        more = {"scale_layout": layout} if layout != "row_major" else {}
        kinds = zip(made.results, op.results, ({}, more), strict=True)
        gathered = [
            rewriter.insert(
                gather.name, own, *gather.args[1:], attrs={**gather.attrs, **attrs}, types=[value.type]
            ).result
            for own, value, attrs in kinds
        ]
        rewriter.replace(op, *gathered)
        if not rewriter.graph.users(gather.result):  # on all ranks, which have the same program
            rewriter.graph.erase(gather)


@dataclass(frozen=True)
class GatherQuantized(Pass):
    """quantize(all_gather_tokens(x))  ->  all_gather_tokens(quantize(x)), codes and scales."""

    name: ClassVar[str] = "gather-quantized"
    effect: ClassVar[Effect] = Effect.EXACT
    unrelated: ClassVar[tuple[Missed, ...]] = (NOT_GATHERED,)

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (QuantizeThenGather(),)
