"""Turns each reshard into the collective that does it.

    %y_sum = coll.reshard(%y) {mesh = "tp"} : bf16[s0, 512]
  ->
    %y_sum = coll.all_reduce(%y) {mesh = "tp"} : bf16[s0, 512]

A partial sum is reduced, and its result scattered if it is to be cut; a value that is cut is gathered. Runs after the
passes that place values, and before `partition`: what was decided and how it is done can be looked at separately.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Argument, Graph, Match, Missed, Op, Partial, Rewriter, Rule, Shard
from qcompiler.pass_manager.pipeline import Effect, Pass


@dataclass(frozen=True)
class Collective(Rule):
    """reshard(partial)  ->  all_reduce, or reduce_scatter;    reshard(cut)  ->  all_gather"""

    root: ClassVar[tuple[str, ...]] = ("coll.reshard",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        mesh = str(op.attrs["mesh"])
        before, after = op["x"].tensor.placement(mesh), op.result.tensor.placement(mesh)
        attrs: dict[str, Argument] = {"mesh": mesh}
        match before, after:
            case Partial(), None:
                return {"name": "coll.all_reduce", "attrs": attrs}
            case Partial(parts), Shard(axis, count, unit, 1) if parts == count:
                unit_attrs = {"unit": unit} if unit > 1 else {}
                return {"name": "coll.reduce_scatter", "attrs": {**attrs, "axis": axis, "ranks": parts, **unit_attrs}}
            case Shard(axis, parts, copies=1), None:
                return {"name": "coll.all_gather", "attrs": {**attrs, "axis": axis, "ranks": parts}}
        return Missed(f"no collective turns {before or 'a replicated value'} into {after or 'a replicated one'}")

    def rewrite(self, op: Op, rewriter: Rewriter, name: str, attrs: dict[str, Argument], **_: object) -> None:
        rewriter.replace(op, rewriter.insert(name, op["x"], attrs=attrs, types=[op.result.type]).result)


@dataclass(frozen=True)
class Collectives(Pass):
    """reshard  ->  all_reduce, all_gather, reduce_scatter."""

    name: ClassVar[str] = "collectives"
    effect: ClassVar[Effect] = Effect.EXACT

    def rules(self) -> Sequence[Rule]:
        return (Collective(),)
