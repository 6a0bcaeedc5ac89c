"""Returns a rank's part of the logits, so that choosing a token exchanges one candidate of each rank, not all logits.

    %whole = coll.all_gather(%part) {axis = 2, mesh = "tp", ranks = 2} : bf16[s0, 1, 128256]
    %last = aten.select.int(%whole, 1, 0) : bf16[s0, 128256]
    return %last
  ->
    %last = aten.select.int(%part, 1, 0) : bf16[s0, 64128]
    %own = coll.own_part(%last) {axis = 1, mesh = "tp", ranks = 2} : bf16[s0, 64128]
    return %own

Only if what follows the gather treats each column alone, such as a cast or a soft cap. `coll.own_part` tells the reader
of the output that it is a part. Runs after `kv-cache`, in the program of one rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from passes.analyses.sharding_rules import row_of
from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Rule, ScalarType, TensorType, Value
from qcompiler.pass_manager.pipeline import Effect, Pass

GATHER, OWN = "coll.all_gather", "coll.own_part"


class ReturnPart(Rule):
    """return f(all_gather(x))  ->  return own_part(f(x)), where f treats each column alone"""

    root = (GATHER,)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        value, axis = op.result, int(str(op.attrs["axis"]))
        chain: list[tuple[Op, int]] = []
        while (users := graph.users(value)) != [graph.return_op]:
            if len(users) != 1:
                return Missed("several operations read the gathered value", value)
            (user,) = users
            image = _image(user, value, axis)
            if image is None:
                return Missed(f"{user.name} does not treat each column alone", value)
            value, axis = user.result, image
            chain.append((user, axis))
        if axis != len(value.tensor.shape) - 1:
            return Missed(f"its parts are along axis {axis} of the output, which is not the last one", value)
        return {"chain": chain, "axis": axis}

    def rewrite(self, op: Op, rewriter: Rewriter, chain: Sequence[tuple[Op, int]], axis: int, **_: object) -> None:
        graph, columns = rewriter.graph, op["x"].tensor.shape[int(str(op.attrs["axis"]))]
        old, part = op.result, op["x"]
        for step, at in chain:
            graph.replace_in(step, old, part)
            old = part = step.result
            shape = part.tensor.shape
            part.type = replace(part.tensor, shape=(*shape[:at], columns, *shape[at + 1 :]))
        loc = replace(op.loc, made_by=rewriter.made_by)
        own = graph.append(OWN, part, attrs={**op.attrs, "axis": axis}, names=[f"{part.name}_own"], loc=loc).result
        graph.set_outputs(own if value is old else value for value in graph.outputs)
        graph.erase(op)
        rewriter.changed = True


def _image(op: Op, value: Value, axis: int) -> int | None:
    """The axis of the result that holds the columns of an operand, if the operation treats each of them alone."""
    row = row_of(op)
    tensors = [operand for _, operand in op.operands() if isinstance(operand.type, TensorType)]
    if row is None or row.sizes is not None or op.effects or tensors != [value] or len(op.results) != 1:
        return None
    if any(isinstance(operand.type, ScalarType) for _, operand in op.operands()):
        return None
    (slot,) = (path for path, operand in op.operands() if operand is value)
    for factor in row.factors(op):
        places = {place.slot: place for place in factor.places}
        if not factor.summed and slot in places and 0 in places and places[slot].axis == axis:
            return places[0].axis if places[0].inner == places[slot].inner == 1 else None
    return None


@dataclass(frozen=True)
class PartLogits(Pass):
    """return all_gather(x)  ->  return own_part(x)."""

    name: ClassVar[str] = "part-logits"
    effect: ClassVar[Effect] = Effect.EXACT

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (ReturnPart(),)
