"""Reduces a graph with placements to the program of one rank: local shapes, and this rank's parts of the weights.

    %w = core.param() {name = "w"} : bf16[1024, 512]<tp = shard(axis = 0, parts = 2)>
    %h = aten.linear(%x, %w) : bf16[s0, s1, 1024]<tp = shard(axis = 2, parts = 2)>
    %q = aten.view(%h, [%b, %s, 16, 64]) : bf16[s0, s1, 16, 64]<tp = shard(axis = 2, parts = 2)>
  ->
    %w = core.param() {name = "w"} : bf16[512, 512]
    %h = aten.linear(%x, %w) : bf16[s0, s1, 512]
    %q = aten.view(%h, [%b, %s, 8, 64]) : bf16[s0, s1, 8, 64]

The text is the same for all ranks: collectives are in the same order. A weight is cut when it is first read, so that a
rank never holds more than its parts and one weight of the model. A bias of a partial sum is a term that rank 0 adds;
the other ranks hold zeros.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from passes.analyses.sharding_rules import row_of
from qcompiler.errors import PassError, QCompilerError
from qcompiler.ir import Graph, Mesh, Op, Partial, Shard, TensorType, Value
from qcompiler.ir.graph import PARAM
from qcompiler.pass_manager.pipeline import Effect, Pass
from qcompiler.runtime.weights import Weights


@dataclass(frozen=True)
class Partition(Pass):
    """view(linear(x, w: [1024, 512]<…>), [b, s, 16, 64])  ->  view(linear(x, w: [512, 512]), [b, s, 8, 64]).

    Attributes:
        mesh: The axes of the mesh and their sizes, such as "tp=2".
        rank: The rank whose program this is, from 0.
    """

    name: ClassVar[str] = "partition"
    effect: ClassVar[Effect] = Effect.REORDERS

    mesh: str
    rank: int = 0

    def __post_init__(self) -> None:
        """Raises PassError unless the mesh is valid and has such a rank."""
        super().__post_init__()
        try:
            size = Mesh.parse(self.mesh).size
        except QCompilerError as error:
            raise PassError(f"option 'mesh' of pass '{self.name}' is wrong: {error}") from None
        if not 0 <= self.rank < size:
            raise PassError(f"option 'rank' of pass '{self.name}' is wrong", got=self.rank, need=f"0 to {size - 1}")

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
            if value.op.name == PARAM:
                self.cut_weight(graph, str(value.op.attrs["name"]), kind)
            self.cut_sizes(graph, value, kind)
        for value, kind in placed:
            value.type = kind.local
        return bool(placed)

    def cut_weight(self, graph: Graph, name: str, kind: TensorType) -> None:
        """Replaces a weight by this rank's part, cut when it is first read."""
        for mesh, placement in kind.sharding:
            if name in graph.weights:
                place = Mesh.parse(self.mesh).place(self.rank, mesh)
                replace_later(graph.weights, name, partial(part_of, placement=placement, place=place))

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


def part_of(whole: torch.Tensor, placement: Shard | Partial, place: int) -> torch.Tensor:
    """What one rank holds of a weight, in its own memory."""
    if isinstance(placement, Partial):
        return whole if place == 0 else torch.zeros_like(whole)
    size = whole.shape[placement.axis] // placement.parts
    return whole.narrow(placement.axis, place * size, size).clone(memory_format=torch.contiguous_format)


def replace_later(weights: MutableMapping[str, Any], name: str, change: Any) -> None:
    """Replaces a weight by a function of it; in a weights store, when it is first read."""
    if isinstance(weights, Weights):
        weights.replace_later(name, change)
    else:
        weights[name] = change(weights[name])


def set_argument(graph: Graph, op: Op, key: int | str, value: Any) -> None:
    """Replaces one argument or attribute."""
    if isinstance(key, int):
        graph.set_args(op, (*op.args[:key], value, *op.args[key + 1 :]))
    else:
        graph.set_args(op, op.args, {**op.attrs, key: value})
