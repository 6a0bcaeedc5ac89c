"""Sends each token only to the ranks whose experts it chose, and returns only their terms.

    %v = coll.all_gather_tokens(%part, [%t]) {few = 64, mesh = "tp", ranks = 4}          read for the experts only
    …                                                                                    the experts of this rank
    %r = coll.reduce_scatter_tokens(%y) {few = 64, mesh = "tp", ranks = 4}
  ->
    %v = coll.gather_chosen_tokens(%part, %chosen, [%t]) {few = 64, groups = 8, mesh = "tp", ranks = 4}
    …
    %r = coll.reduce_scatter_chosen_tokens(%y, %chosen) {few = 64, groups = 8, mesh = "tp", ranks = 4}

Other rows are zeros, which the rank does not read, and terms that are zeros are not sent: the sums are the same but for
the signs of zeros. Only if fewer bytes are expected to be sent: with many choices and few ranks, each rank needs nearly
all tokens. Runs after `expert-parallel` and `sequence-parallel`, and before `partition`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from passes.analyses.chosen_tokens import (
    GATHER_CHOSEN,
    SCATTER_CHOSEN,
    ChosenTokens,
    chosen_tokens,
    share_sent,
)
from passes.analyses.expert_regions import expert_regions
from passes.sharding.on_mesh import AlongAxis
from qcompiler.ir import Argument, Graph, Missed, Op
from qcompiler.pass_manager.pipeline import Effect

WORTH = 15 / 16
"""Ranks send all tokens if a larger part of them is expected to be needed."""


@dataclass(frozen=True)
class SendChosen(AlongAxis):
    """all_gather_tokens(x)  ->  gather_chosen_tokens(x, e);  reduce_scatter_tokens(y)  ->  … of chosen tokens."""

    name: ClassVar[str] = "send-chosen"
    effect: ClassVar[Effect] = Effect.REORDERS
    absent: ClassVar[str] = 'there are no divided experts: put ep and sp before it, as in "ep{send=chosen}; sp"'

    def run(self, graph: Graph) -> bool:
        """Rewrites what ranks exchange for each mixture."""
        changed = False
        for found in self.mixtures(graph):
            if isinstance(found, ChosenTokens) and self.why_not(found) is None:
                self.rewrite(graph, found)
                changed = changed or bool(found.gathers or found.scatters)
        return changed

    def explain(self, graph: Graph) -> dict[str, str]:
        """Why ranks send all tokens."""
        missed: list[Missed] = []
        for found in self.mixtures(graph):
            if isinstance(found, Missed):
                missed.append(found)
            else:
                missed += found.missed if (why := self.why_not(found)) is None else [why]
        return {each.value.name: each.why for each in missed if each.value is not None}

    def mixtures(self, graph: Graph) -> list[ChosenTokens | Missed]:
        """What is known about each mixture of experts."""
        if self.ranks == 1:
            return []
        return [chosen_tokens(graph, region, self.axis) for region in expert_regions(graph)[0]]

    def why_not(self, found: ChosenTokens) -> Missed | None:
        """Why choices do not save enough bytes."""
        if (part := self.part(found)) <= WORTH:
            return None
        chosen = f"{found.chosen} of {found.groups} experts on {self.ranks} ranks"
        return Missed(f"with {chosen}, each rank is expected to need {part:.1%} of the tokens", found.choices)

    def part(self, found: ChosenTokens) -> float:
        """The expected part of the tokens that are sent."""
        return share_sent(found.groups, found.chosen, self.ranks)

    def rewrite(self, graph: Graph, found: ChosenTokens) -> None:
        """Replaces gathers, each before its first user, where the choices are known, and sums."""
        for op in found.gathers:
            first = min(graph.users(op.result), key=graph.rank)
            self.replace(graph, op, first, GATHER_CHOSEN, (op["x"], found.choices, *op.args[1:]), found.groups)
        for op in found.scatters:
            self.replace(graph, op, op, SCATTER_CHOSEN, (op["x"], found.choices), found.groups)
        did = [verb for verb, ops in (("receive", found.gathers), ("return", found.scatters)) if ops]
        for matmul in found.region.matmuls if did else ():
            text = f"ranks {' and '.join(did)} only tokens that chose its experts: {self.part(found):.0%} are expected"
            graph.remark(matmul.results[0], text)

    def replace(self, graph: Graph, op: Op, before: Op, name: str, args: tuple[Argument, ...], groups: int) -> None:
        result, loc = op.result, replace(op.loc, made_by=self.name)
        attrs = {**op.attrs, "groups": groups}
        made = graph.insert(before, name, *args, attrs=attrs, types=[result.type], loc=loc).result
        called = result.name
        graph.replace(result, made)
        graph.erase(op)
        graph.rename(made, called)
