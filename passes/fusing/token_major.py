"""Computes queries in the memory order in which the result of attention is read.

    %q = kernel.pointwise(%qkv) {expressions = ["… x0[i0, i2, 128*i1 + i3] …"], shapes = ["x0.0, 32, x0.1, 128"]}
    %o = attention.causal(%q, %k, %v)
  ->
    %q_tokens = kernel.pointwise(%qkv) {expressions = ["… x0[i0, i1, 128*i2 + i3] …"], shapes = ["x0.0, x0.1, 32, 128"]}
    %q = aten.transpose.int(%q_tokens, 1, 2)
    %o = attention.causal(%q, %k, %v)

Torch's attention returns its result in the memory order of the query. The output projection reads the heads of a token
as one row, so heads before tokens would cost a copy. Legal if only attention, which takes any strides, reads the
query as its query. Runs after fuse-pointwise and fuse-append.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qcompiler.dialects.expression_nodes import Expression, parts, rebuilt, resized
from qcompiler.dialects.fused_expression import FusedExpression, parse
from qcompiler.dialects.pointwise import texts_of
from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Rule, Value
from qcompiler.ir.rewrite import explain
from qcompiler.ir.sizes import Size, substitute, symbol
from qcompiler.pass_manager.pipeline import Effect, Pass

ATTENTION = ("attention.causal", "state.attend")
HEADS, TOKENS = 1, 2
"""Axes of a query."""

EXCHANGED = {"i1": symbol("i2"), "i2": symbol("i1")}


class TokensBeforeHeads(Rule):
    """pointwise(x) [B, H, S, D]  ->  transpose(pointwise(x) [B, S, H, D], 1, 2)"""

    root = ("kernel.pointwise", "state.fused_append")

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        queries = [value for value in op.results if _is_query(value, graph)]
        return {"queries": queries} if queries else Missed("none of its results is read only as a query of attention")

    def rewrite(self, op: Op, rewriter: Rewriter, queries: Sequence[Value], **_: Any) -> None:
        expressions, shapes = list(texts_of(op, "expressions")), list(texts_of(op, "shapes"))
        first = len(expressions) - len(op.results)  # an append has no result for keys and values
        for query in queries:
            place = first + query.index
            sizes = shapes[place].split(", ")
            sizes[HEADS], sizes[TOKENS] = sizes[TOKENS], sizes[HEADS]
            expressions[place], shapes[place] = _exchanged(expressions[place]), ", ".join(sizes)
        attrs = {**op.attrs, "expressions": tuple(expressions), "shapes": tuple(shapes)}
        made = rewriter.insert(op.name, *op.args, attrs=attrs)
        now = list(made.results)
        for query in queries:
            tokens = made.results[query.index]
            heads = rewriter.insert("aten.transpose.int", tokens, HEADS, TOKENS, types=[query.tensor])
            now[query.index] = heads.results[0]
            rewriter.graph.rename(tokens, f"{query.name}_tokens")
        rewriter.replace(op, *now)


def _is_query(value: Value, graph: Graph) -> bool:
    """Whether only attention reads the value, and only as its query."""
    queries = _queries(value, graph)
    return bool(queries) and len(queries) == len(graph.uses(value))


def _queries(value: Value, graph: Graph) -> list[Op]:
    """The attention operations that read the value as their query."""
    return [user for user in graph.users(value) if user.name in ATTENTION and user["query"] is value]


def _exchanged(text: str) -> str:
    """The expression with the indices i1 and i2 exchanged."""
    made = parse(text)
    definitions = tuple((name, _renamed(what)) for name, what in made.definitions)
    return str(FusedExpression(definitions, _renamed(made.result)))


def _renamed(what: Expression) -> Expression:
    return rebuilt(resized(what, _index), tuple(map(_renamed, parts(what))))


def _index(size: Size) -> Size:
    return substitute(size, EXCHANGED)


@dataclass(frozen=True)
class TokenMajor(Pass):
    """pointwise(x) [B, H, S, D]  ->  transpose(pointwise(x) [B, S, H, D], 1, 2)."""

    name: ClassVar[str] = "token-major"
    effect: ClassVar[Effect] = Effect.EXACT

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (TokensBeforeHeads(),)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Reports queries that something else reads, too."""
        made = (value for op, _, _ in explain(graph, self.rules()) for value in op.results)
        return {value.name: "not only attention reads it as its query" for value in made if _queries(value, graph)}
