"""Fuses the write to a key-value cache with the kernel that computes the keys, such as their rotary embedding.

    %q, %k = kernel.pointwise(%qkv, %cos, %sin) {expressions = ["Q", "K"], …}
    state.append(%cache, %k, %v, %slots, %lengths)
  ->
    %q = state.fused_append(%cache, %slots, %lengths, %qkv, %cos, %sin, %v)
         {expressions = ["K", "x3[i0, i1, i2, i3]", "Q"], …}

Legal if only the append reads the keys, and nothing reads the other results before it. Values that the same operation
computes are fused likewise; others are read where they are. Runs after fuse-pointwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from passes.fusing.region_expressions import rounded
from qcompiler.dialects.expression_nodes import Load
from qcompiler.dialects.fused_expression import FusedExpression
from qcompiler.dialects.pointwise import texts_of
from qcompiler.ir import Argument, CacheType, Graph, Match, Missed, Op, Rewriter, Rule, Value
from qcompiler.ir.rewrite import explain
from qcompiler.ir.sizes import symbol
from qcompiler.pass_manager.pipeline import Effect, Pass

POINTWISE = "kernel.pointwise"


class AppendComputedKeys(Rule):
    """append(pointwise(x)[k], v)  ->  fused_append(x, v)"""

    root = ("state.append",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        key, value = op["key"], op["value"]
        made = key.op
        if isinstance(cache := op["cache"].type, CacheType) and cache.within:
            return Missed("the cache has no values besides the keys", op["cache"])
        if made.name != POINTWISE:
            return Missed(f"the keys are not computed by {POINTWISE}, but by {made.name}", key)
        appended = (key, value) if value.op is made else (key,)
        for each in appended:
            if len(graph.uses(each)) > 1:
                return Missed("it is read elsewhere, too", each)
        for other in made.results:
            readers = [reader for reader in graph.users(other) if graph.rank(reader) < graph.rank(op)]
            if readers:
                return Missed(f"it is read by {readers[0].name} before the keys are appended", other)
        return {"made": made}

    def rewrite(self, op: Op, rewriter: Rewriter, made: Op, **_: Any) -> None:
        expressions, shapes = texts_of(made, "expressions"), texts_of(made, "shapes")
        texts = dict(zip(made.results, zip(expressions, shapes, strict=True), strict=True))
        operands = list(made.args)
        first, value = [texts.pop(op["key"])], op["value"]
        if value in texts:
            first.append(texts.pop(value))
        else:
            operands.append(value)
            first.append(_as_it_is(value, len(operands) - 1))
        chosen = [*first, *texts.values()]
        attrs: dict[str, Argument] = {
            "expressions": tuple(text for text, _ in chosen), "shapes": tuple(shape for _, shape in chosen), **op.attrs
        }  # fmt: skip
        args = (op["cache"], op["slots"], op["lengths"], *operands)
        new = rewriter.insert("state.fused_append", *args, attrs=attrs)
        rewriter.replace(op)
        names = [old.name for old in texts]
        for old, result in zip(texts, new.results, strict=True):
            rewriter.graph.replace(old, result)
        rewriter.erase_unread(made)
        for name, result in zip(names, new.results, strict=True):
            rewriter.graph.rename(result, name)


def _as_it_is(value: Value, place: int) -> tuple[str, str]:
    """The expression and the shape of an operand that is appended unchanged."""
    shape = value.tensor.shape
    index = tuple(0 if size == 1 else symbol(f"i{axis}") for axis, size in enumerate(shape))
    what = rounded(Load(f"x{place}", index), value.tensor.dtype)
    sizes = (str(size) if isinstance(size, int) else f"x{place}.{axis}" for axis, size in enumerate(shape))
    return str(FusedExpression((), what)), ", ".join(sizes)


@dataclass(frozen=True)
class FuseAppend(Pass):
    """append(pointwise(x), v)  ->  fused_append(x, v)."""

    name: ClassVar[str] = "fuse-append"
    effect: ClassVar[Effect] = Effect.EXACT

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (AppendComputedKeys(),)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Reports the keys that are appended by an operation of its own, which has no name."""
        missed = explain(graph, self.rules())
        return {op["key"].name: str(why) for op, _, why in missed}
