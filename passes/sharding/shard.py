"""Decides what each rank of a mesh holds, and writes it into the types.

    %h = aten.linear(%x, %w1) : bf16[s0, 1024]
    %y = aten.linear(%h, %w2) : bf16[s0, 512]
  ->
    %w1 = core.param() {name = "w1"} : bf16[1024, 512]<tp = shard(axis = 0, parts = 2, unit = 128)>
    %w2 = core.param() {name = "w2"} : bf16[512, 1024]<tp = shard(axis = 1, parts = 2, unit = 128)>
    %h = aten.linear(%x, %w1) : bf16[s0, 1024]<tp = shard(axis = 1, parts = 2)>
    %y = aten.linear(%h, %w2) : bf16[s0, 512]<tp = partial(parts = 2)>
    %y_sum = coll.reshard(%y) {mesh = "tp"} : bf16[s0, 512]

The tactic `tp` cuts each region of `passes.analyses.sharding_regions`: linears that compute columns, the operations on
these columns or heads, and a linear that sums over them; also the columns of large embeddings and vocabulary
projections. Values stay whole, so that the graph still computes the same bits. Runs before passes that merge, quantize
and fuse, so that these see the shapes of one rank.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from passes.analyses.layers import check_patterns
from passes.analyses.sharding_cuts import Region
from passes.analyses.sharding_regions import regions
from passes.sharding.on_mesh import keep_statistics
from passes.sharding.region_options import RegionOptions
from qcompiler import ir
from qcompiler.ir import Graph, Partial, Role, TensorType, Value
from qcompiler.pass_manager.pipeline import Effect


@dataclass(frozen=True)
class Shard(RegionOptions):
    """linear(linear(x, w1), w2)  ->  the same, with placements and a reshard of each partial sum."""

    name: ClassVar[str] = "shard"
    effect: ClassVar[Effect] = Effect.EXACT
    absent: ClassVar[str] = "no linear has a constant weight"

    def run(self, graph: Graph) -> bool:
        """Cuts the regions."""
        if self.ranks == 1 or is_placed(graph):
            return False
        check_patterns(self.layers, graph)
        found, _ = regions(graph, self.cutting)
        for region in found:
            self.place(graph, region)
        return bool(found)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Why a linear or a large table is not cut."""
        missed = regions(graph, self.cutting)[1] if self.ranks > 1 else {}
        return {op.result.name: str(why) for op, why in missed.items() if not op.result.tensor.sharding}

    def place(self, graph: Graph, region: Region) -> None:
        """Writes the placements of a region into the types, and reshards its partial sums."""
        for value, axis in region.cuts.items():
            copies = region.copies(value)
            placement = ir.Shard(axis, self.ranks // copies, region.units[value], copies)
            value.type = value.tensor.placed(self.axis, placement)
        for value in (*region.partials, *region.terms):
            value.type = value.tensor.placed(self.axis, Partial(self.ranks))
        for op, factor in region.factors.items():
            if op.role is Role.MATMUL and graph.is_constant(op["w"]):
                part = "sum" if factor.summed else "columns"
                graph.remark(op.result, f"each of {self.ranks} ranks ({self.axis}) computes a part of its {part}")
        for value in region.partials:
            self.reshard(graph, value, "sum")
        for value in region.gathered:
            self.reshard(graph, value, "whole")

    def reshard(self, graph: Graph, value: Value, suffix: str) -> None:
        """Inserts a reshard after a value; all users read its result."""
        whole, name = value.tensor.placed(self.axis, None), f"{value.name}_{suffix}"
        attrs, loc = {"mesh": self.axis}, replace(value.op.loc, made_by=self.name)
        new = graph.insert(
            graph.after(value.op), "coll.reshard", value, attrs=attrs, types=[whole], names=[name], loc=loc
        ).result
        graph.replace(value, new)
        keep_statistics(graph, value, new)


def is_placed(graph: Graph) -> bool:
    """Whether a value of a graph has placements."""
    kinds = (value.type for op in graph for value in op.results)
    return any(isinstance(kind, TensorType) and kind.sharding for kind in kinds)
