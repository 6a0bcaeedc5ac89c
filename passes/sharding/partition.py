"""Reduces a graph with placements to the program of one rank: local shapes, and this rank's parts of the weights.

    %w = core.param() {name = "w"} : bf16[1024, 512]<tp = shard(axis = 0, parts = 2)>
    %h = aten.linear(%x, %w) : bf16[s0, s1, 1024]<tp = shard(axis = 2, parts = 2)>
    %q = aten.view(%h, [%b, %s, 16, 64]) : bf16[s0, s1, 16, 64]<tp = shard(axis = 2, parts = 2)>
  ->
    %w = core.param() {name = "w"} : bf16[512, 512]
    %h = aten.linear(%x, %w) : bf16[s0, s1, 512]
    %q = aten.view(%h, [%b, %s, 8, 64]) : bf16[s0, s1, 8, 64]

The text is the same for all ranks: collectives are in the same order. A weight is cut when it is first read, so that a
rank never holds more than its parts and one weight of the model; of a weight in a file, it reads its part only. A bias
of a partial sum is a term that rank 0 adds; the other ranks hold zeros. A rank looks up its own rows of a table that is
cut along its rows.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch

from passes.analyses.sharding_rules import row_of
from passes.sharding.on_mesh import OnMesh
from qcompiler.errors import PassError
from qcompiler.ir import DType, Graph, Op, Partial, Rewriter, Shard, TensorType, Value
from qcompiler.ir.graph import PARAM
from qcompiler.pass_manager.pipeline import Effect
from qcompiler.runtime.weights import Weights


@dataclass(frozen=True)
class Partition(OnMesh):
    """view(linear(x, w: [1024, 512]<…>), [b, s, 16, 64])  ->  view(linear(x, w: [512, 512]), [b, s, 8, 64]).

    Attributes:
        rank: The rank whose program this is, from 0.
    """

    name: ClassVar[str] = "partition"
    effect: ClassVar[Effect] = Effect.REORDERS

    rank: int = 0

    def __post_init__(self) -> None:
        """Raises PassError unless the mesh has the rank."""
        super().__post_init__()
        self.check_rank(self.rank)

    def run(self, graph: Graph) -> bool:
        """Cuts weights, then arguments that list sizes, then types."""
        placed = [
            (value, kind)
            for op in graph
            for value in op.results
            if isinstance(kind := value.type, TensorType) and kind.sharding
        ]
        if any(op.name == "coll.reshard" for op in graph.ops()):
            fix = "Run the pass 'collectives' before it."
            raise PassError("a reshard is not a collective yet", where=f"pass '{self.name}'", fix=fix)
        for value, kind in placed:
            self.check_ranks(value, kind)
        for value, kind in placed:
            if value.op.name == PARAM:
                self.cut_weight(graph, str(value.op.attrs["name"]), kind)
            self.cut_sizes(graph, value, kind)
        lookups = [(op, table) for op in graph.ops("aten.embedding") if (table := rows_cut(op)) is not None]
        for value, kind in placed:
            value.type = kind.local
        for op, (mesh, rows, ranks) in lookups:
            look_up_own(graph, op, mesh, rows, ranks, self.name)
        return bool(placed)

    def check_ranks(self, value: Value, kind: TensorType) -> None:
        """Raises QCompilerError if a value is placed on other ranks than the mesh has."""
        for mesh, placement in kind.sharding:
            if placement.ranks != (length := self.grid.length(mesh)):
                problem, got = f"{value} is placed on another number of ranks", f"{placement.ranks} along '{mesh}'"
                raise PassError(
                    problem, got=got, need=f"{length}, as in the mesh {self.mesh}", where="pass 'partition'"
                )

    def cut_weight(self, graph: Graph, name: str, kind: TensorType) -> None:
        """Replaces a weight by this rank's part, cut when it is first read."""
        shape: list[Any] = list(kind.shape)
        for mesh, placement in kind.sharding if name in graph.weights else ():
            place = self.grid.place(self.rank, mesh)
            if isinstance(placement, Partial):
                replace_later(graph.weights, name, partial(term_of, place=place))
                continue
            shape[placement.axis] //= placement.parts
            size = shape[placement.axis]
            cut_later(graph.weights, name, placement.axis, place // placement.copies * size, size)

    def cut_sizes(self, graph: Graph, value: Value, kind: TensorType) -> None:
        """Replaces the sizes of a result in the arguments of its operation, such as the number of heads in a view."""
        op, row = value.op, row_of(value.op)
        if row is None or row.sizes is None or value.index:
            return
        (key,) = op.path(row.sizes)
        listed, local = op.argument(row.sizes), kind.local.shape
        if isinstance(listed, tuple):
            new = tuple(
                arg if isinstance(arg, Value) or arg == -1 or here == whole else here
                for arg, here, whole in zip(listed, local, kind.shape, strict=True)
            )
            set_argument(graph, op, key, new)


def rows_cut(op: Op) -> tuple[str, int, int] | None:
    """The mesh axis, the number of rows, and the parts of an embedding's table that is cut along its rows."""
    kind = op["weight"].tensor
    for mesh, placement in kind.sharding:
        if isinstance(placement, Shard) and placement.axis == 0:
            return mesh, int(str(kind.shape[0])), placement.parts
    return None


def look_up_own(graph: Graph, op: Op, mesh: str, rows: int, ranks: int, made_by: str) -> None:
    """Makes an embedding look up the rows of this rank.

      %e = aten.embedding(%table, %ids)
    ->
      %own = coll.own_first(%ids) {groups = 96, mesh = "tp", ranks = 2}      own rows become 0 to 47
      %other = aten.ge.Scalar(%own, 48)
      %row = aten.clamp_max(%own, 47)
      %e = aten.embedding(%table, %row)
      %e_own = aten.masked_fill.Scalar(%e, aten.unsqueeze(%other, -1), 0)
    """
    ids, found, held = op["indices"], op.result, rows // ranks
    before = Rewriter(graph, op, made_by)
    attrs: dict[str, Any] = {"groups": rows, "mesh": mesh, "ranks": ranks}
    own = before.insert("coll.own_first", ids, attrs=attrs, names=[f"{ids.name}_own"]).result
    other = before.insert("aten.ge.Scalar", own, held, types=[replace(ids.tensor, dtype=DType.b8)]).result
    row = before.insert("aten.clamp_max", own, held - 1, types=[ids.tensor]).result
    wide = TensorType(DType.b8, (*ids.tensor.shape, 1))
    mask = before.insert("aten.unsqueeze", other, -1, types=[wide]).result
    graph.replace_in(op, ids, row)
    after = Rewriter(graph, graph.after(op), made_by)
    names = [f"{found.name}_own"]
    term = after.insert("aten.masked_fill.Scalar", found, mask, 0, types=[found.type], names=names).result
    graph.replace(found, term)


def term_of(whole: torch.Tensor, place: int) -> torch.Tensor:
    """What one rank adds to a partial sum: rank 0 all of it, the others zeros."""
    return whole if place == 0 else torch.zeros_like(whole)


def replace_later(weights: MutableMapping[str, Any], name: str, change: Any) -> None:
    """Replaces a weight by a function of it; in a weights store, when it is first read."""
    if isinstance(weights, Weights):
        weights.replace_later(name, change)
    else:
        weights[name] = change(weights[name])


def cut_later(
    weights: MutableMapping[str, Any], name: str, axis: int, start: int, size: int, new: str | None = None
) -> None:
    """Replaces a weight by a part of it, or adds the part as a new weight; from a file, this part alone is read."""
    if isinstance(weights, Weights):
        weights.cut_later(name, axis, start, size, new)
    else:
        part = weights[name].narrow(axis, start, size)
        weights[new or name] = part.clone(memory_format=torch.contiguous_format)


def set_argument(graph: Graph, op: Op, key: int | str, value: Any) -> None:
    """Replaces one argument or attribute."""
    if isinstance(key, int):
        graph.set_args(op, (*op.args[:key], value, *op.args[key + 1 :]))
    else:
        graph.set_args(op, op.args, {**op.attrs, key: value})
