"""Divides the experts of a mixture among ranks: each rank computes the entries of its own experts.

    %key, %order = aten.sort(%expert)
    %ends = aten.cumsum(aten.histc(%key, 8, 0, 7))
    %y = aten._grouped_mm(%x, %w, %ends)                   %w: bf16[8, 256, 512]
    ...                                                    back to tokens
    %t = aten.view(%sum, [%b, %s, 512])
  ->
    %own = coll.own_first(%expert) {groups = 8, mesh = "tp", ranks = 2}
    %key, %order = aten.sort(%own)
    %ends = aten.cumsum(aten.histc(%key, 8, 0, 7))
    %ends_own = aten.slice.Tensor(%ends, 0, 0, 4)
    %y = aten._grouped_mm(%x, %w, %ends_own)               %w: bf16[4, 256, 512]
    %y_own = coll.own_rows(%y, %ends_own)                  zeros after the entries of the rank's own experts
    ...
    %t = aten.view(%sum, [%b, %s, 512])
    %t_sum = coll.all_reduce(%t) {mesh = "tp"}

All ranks hold all tokens, and each sorts the entries of its own experts to the front. A grouped matmul skips the rows
after its last group, so that a rank computes only its own entries, however many: none, or all. Nothing waits for the
host. A table of all experts, such as a bias, is cut like the weights. Runs after `collectives` and before `partition`:
the terms have placements, but weights are cut here.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from passes.analyses.expert_regions import ExpertRegion, Tag, expert_regions
from passes.analyses.layers import EVERYTHING, check_patterns, why_not_selected
from passes.analyses.sharding_factors import value_at
from passes.analyses.sharding_rules import row_of
from passes.sharding.on_mesh import AlongAxis, keep_statistics
from passes.sharding.partition import cut_later
from qcompiler.ir import Argument, Graph, Location, Missed, Op, Partial, Shard, Value
from qcompiler.ir.graph import PARAM
from qcompiler.pass_manager.pipeline import Effect

EXPERTS = 0
"""The axis of stacked weights that counts experts."""

UNDEFINED_AFTER_GROUPS = "aten._grouped_mm"
"""The grouped matmul of torch, which does not write rows after the last group."""


@dataclass(frozen=True)
class ExpertParallel(AlongAxis):
    """grouped_mm(x, w: [8, …], ends)  ->  grouped_mm(x, w: [4, …], ends[:4]), with the rank's own entries first.

    Attributes:
        rank: The rank whose program this is, from 0.
        layers: Patterns over weight names, of which the last match decides; other experts are on each rank.
    """

    name: ClassVar[str] = "expert-parallel"
    effect: ClassVar[Effect] = Effect.REORDERS
    absent: ClassVar[str] = "there are no grouped matmuls"

    rank: int = 0
    layers: tuple[str, ...] = EVERYTHING

    def __post_init__(self) -> None:
        """Raises PassError unless the mesh has the rank."""
        super().__post_init__()
        self.check_rank(self.rank)

    def run(self, graph: Graph) -> bool:
        """Divides the experts of all mixtures that allow it."""
        if self.ranks == 1:
            return False
        check_patterns(self.layers, graph)
        found = [region for region in expert_regions(graph)[0] if self.why_not(graph, region) is None]
        for region in found:
            self.divide(graph, region)
        return bool(found)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Why the experts of a grouped matmul are on each rank."""
        if self.ranks == 1:
            return {}
        found, missed = expert_regions(graph)
        reasons = {op.results[0].name: str(why) for op, why in missed.items()}
        for region in found:
            if not is_divided(region) and (why := self.why_not(graph, region)) is not None:
                reasons |= {op.results[0].name: str(why) for op in region.matmuls}
        return reasons

    def why_not(self, graph: Graph, region: ExpertRegion) -> Missed | None:
        """Why the experts of a mixture cannot be divided; None if they can."""
        result = region.matmuls[0].results[0]
        if is_divided(region):
            return Missed("its experts are already divided", result)
        if region.experts % self.ranks:
            nearest = _nearest(region.experts, self.ranks)
            problem = f"{region.experts} experts cannot be divided among {self.ranks} ranks"
            return Missed(f"{problem}; the nearest possible number of ranks is {nearest}", result)
        for op in region.matmuls:
            if (why := why_not_selected(self.layers, op, graph)) is not None:
                return why
        for op in (*region.matmuls, *region.lookups):
            if isinstance(axes := stacked(graph, op, region, self.ranks), Missed):
                return axes
        return None

    def divide(self, graph: Graph, region: ExpertRegion) -> None:
        """Cuts the weights, sorts own entries first, and adds the terms of all ranks."""
        own, place = region.experts // self.ranks, self.grid.place(self.rank, self.axis)
        axes: dict[Value, int] = {}
        for op in (*region.matmuls, *region.lookups):
            found = stacked(graph, op, region, self.ranks)
            axes |= found if isinstance(found, dict) else {}
        for value, axis in axes.items():
            value.type = value.tensor.placed(self.axis, Shard(axis, self.ranks)).local
            if value.op.name == PARAM and (name := str(value.op.attrs["name"])) in graph.weights:
                size = int(str(value.tensor.shape[axis]))
                cut_later(graph.weights, name, axis, place * size, size)
        for op in region.matmuls:
            graph.remark(op.results[0], f"each of {self.ranks} ranks ({self.axis}) has {own} of its experts")
        for op in region.lookups:
            self.look_up_own(graph, op, own)
        self.sort_own_first(graph, region)
        for ends in region.ends:
            after = graph.after(ends.op)
            args, names = (ends, 0, 0, own), [f"{ends.name}_own"]
            types = [replace(ends.tensor, shape=(own,))]
            cut = graph.insert(after, "aten.slice.Tensor", *args, types=types, names=names, loc=self.loc(ends.op))
            for op in region.matmuls:
                graph.replace_in(op, ends, cut.result)
        self.zero_others(graph, region)
        for value, tag in region.tags.items():
            if tag is Tag.TERM:
                value.type = value.tensor.placed(self.axis, Partial(self.ranks))
        for value in region.sums:
            self.add_terms(graph, value)

    def sort_own_first(self, graph: Graph, region: ExpertRegion) -> None:
        sort, keys = region.sort, region.sort["self"]
        attrs: dict[str, Argument] = {"groups": region.experts, "mesh": self.axis, "ranks": self.ranks}
        names = [f"{keys.name}_own"]
        own = graph.insert(sort, "coll.own_first", keys, attrs=attrs, names=names, loc=self.loc(sort))
        graph.replace_in(sort, keys, own.result)

    def zero_others(self, graph: Graph, region: ExpertRegion) -> None:
        """Makes rows of other ranks zero where they are not: after torch's matmul, and before rows become terms."""
        ends = region.ends[0]
        for op in region.matmuls:
            if op.name == UNDEFINED_AFTER_GROUPS:
                y = op.results[0]
                graph.replace(y, self.own_rows(graph, graph.after(op), y, ends))
        for op in region.returns:
            rows = op["source"] if op.name == "aten.index_add" else op["self"]
            if region.tags.get(rows) is Tag.ROWS:
                graph.replace_in(op, rows, self.own_rows(graph, op, rows, ends))

    def own_rows(self, graph: Graph, before: Op, rows: Value, ends: Value) -> Value:
        names, loc = [f"{rows.name}_own"], self.loc(rows.op)
        return graph.insert(before, "coll.own_rows", rows, ends, names=names, loc=loc).result

    def look_up_own(self, graph: Graph, op: Op, own: int) -> None:
        """Looks up rows of this rank's table; entries of other ranks, whose rows do not matter, read its last row."""
        key = next(value for _, value in op.operands() if value is not op["self"])
        args, kinds, names = (key, None, own - 1), [key.type], [f"{key.name}_own"]
        clamped = graph.insert(op, "aten.clamp", *args, types=kinds, names=names, loc=self.loc(op))
        graph.replace_in(op, key, clamped.result)

    def add_terms(self, graph: Graph, value: Value) -> None:
        """Adds the terms of all ranks; all users outside the region read the sum."""
        attrs, names = {"mesh": self.axis}, [f"{value.name}_sum"]
        after = graph.after(value.op)
        total = graph.insert(after, "coll.all_reduce", value, attrs=attrs, names=names, loc=self.loc(value.op))
        graph.replace(value, total.result)
        keep_statistics(graph, value, total.result)

    def loc(self, op: Op) -> Location:
        return replace(op.loc, made_by=self.name)


def is_divided(region: ExpertRegion) -> bool:
    """Whether the entries of a mixture are sorted for the experts of one rank."""
    return region.sort["self"].op.name == "coll.own_first"


def stacked(graph: Graph, op: Op, region: ExpertRegion, parts: int) -> dict[Value, int] | Missed:
    """The constants that a weight or a table of experts is computed from, and their axis that counts experts."""
    weight = op.args[1] if op in region.matmuls else op["self"]
    found: dict[Value, int] = {weight: EXPERTS} if isinstance(weight, Value) else {}
    readers = {*region.matmuls, *region.lookups}
    stack = list(found)
    while stack:
        value = stack.pop()
        if any(user not in readers and found.keys().isdisjoint(user.results) for user in graph.users(value)):
            return Missed("it is also read elsewhere, where it must be whole", value)
        if value.op.name == PARAM:
            continue
        row = row_of(value.op)
        factors = list(row.factors(value.op)) if row is not None and row.sizes is None else []
        wanted = [f for f in factors if any((at.slot, at.axis, at.inner) == (0, found[value], 1) for at in f.places)]
        if not wanted or wanted[0].summed:
            return Missed(f"{value.op.name} is not known to keep experts apart", value)
        for at in wanted[0].places:
            operand = value_at(value.op, at.slot)
            if operand is not None and not isinstance(at.slot, int) and operand not in found:
                found[operand] = at.axis
                stack.append(operand)
    odd = (v for v, axis in found.items() if not isinstance(n := v.tensor.shape[axis], int) or n % parts)
    bad = next(odd, None)
    return found if bad is None else Missed(f"axis {found[bad]} cannot be cut into {parts} equal parts", bad)


def _nearest(experts: int, ranks: int) -> int:
    return min((n for n in range(2, experts + 1) if experts % n == 0), key=lambda n: abs(n - ranks), default=1)
