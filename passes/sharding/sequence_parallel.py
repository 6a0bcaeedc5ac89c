"""Sequence-parallel norms: each rank adds, normalizes and quantizes only its own tokens between two matmuls.

    %s = coll.all_reduce(%y) {mesh = "tp"} : bf16[s0, s1, 512]
    %h = aten.add.Tensor(%x, %s)
    %n = aten.rms_norm(%h, [512], %w)
    %g = aten.linear(%n, %w1)
  ->
    %s_part = coll.reduce_scatter_tokens(%y) {few = 64, mesh = "tp", ranks = 2}
    %x_part = coll.own_tokens(%x) {few = 64, mesh = "tp", ranks = 2}
    %h_part = aten.add.Tensor(%x_part, %s_part)
    %n_part = aten.rms_norm(%h_part, [512], %w)
    %n = coll.all_gather_tokens(%n_part, [%b, %s]) {few = 64, mesh = "tp", ranks = 2} : bf16[s0, s1, 512]
    %g = aten.linear(%n, %w1)

An all-reduce sends as many bytes as a scatter and a gather, so that norms and residual sums of other ranks' tokens are
saved; `gather-quantized` then gathers codes. A region that would send more bytes than its all-reduces stays whole, and
the options say which of them will be codes. Runs after `collectives`, when types still say what ranks hold alike, and
before `partition`. A rank's tokens are counted over all rows of the batch, so that a decode step of many sequences is
cut, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from passes.analyses.layers import EVERYTHING
from passes.analyses.sent_bytes import Sending
from passes.analyses.sharding_rules import row_of
from passes.analyses.token_regions import TokenRegion, holds_tokens, lead, recounts_tokens, token_regions
from passes.sharding.on_mesh import AlongAxis
from passes.sharding.partition import set_argument
from qcompiler.dialects.coll_tokens import share, share_shape
from qcompiler.dialects.terms import MOST_TERMS
from qcompiler.errors import PassError
from qcompiler.ir import Argument, Format, Graph, Location, Op, Role, ScalarType, Size, TensorType, Value, map_tree
from qcompiler.ir.sizes import product
from qcompiler.pass_manager.pipeline import Effect

FEW = 512
"""Tokens below which a second collective costs more than the norms of all tokens, on two H200s."""


@dataclass(frozen=True)
class SequenceParallel(AlongAxis):
    """norm(x + all_reduce(y))  ->  all_gather_tokens(norm(own_tokens(x) + reduce_scatter_tokens(y))).

    Attributes:
        few: With fewer tokens in a call, each rank computes all of them, as without this pass.
        reads: The format in which layers will quantize what they read; None if they will not.
        layers: Patterns over the weight names of these layers, of which the last match decides.
        sums: The format in which ranks will send the terms of sums; by default the dtype of the model.
    """

    name: ClassVar[str] = "sequence-parallel"
    effect: ClassVar[Effect] = Effect.REORDERS
    absent: ClassVar[str] = 'there is no sum over ranks to cut by tokens: put tp or ep before it, as in "tp; sp"'

    few: int = FEW
    reads: Format | None = None
    layers: tuple[str, ...] = EVERYTHING
    sums: Format | None = None

    def __post_init__(self) -> None:
        """Raises PassError unless the mesh has the axis, and `few` is positive."""
        super().__post_init__()
        if self.few < 1:
            raise self.wrong("few", self.few, "at least 1")

    def run(self, graph: Graph) -> bool:
        """Cuts all regions of tokens."""
        if self.ranks == 1:
            return False
        sending = self.sending
        found = [region for region in token_regions(graph, self.axis) if region.why_not(graph, sending) is None]
        for region in found:
            _Cut(self, graph, region).run()
        return bool(found)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Why the region of an all-reduce is not cut."""
        found, sending = token_regions(graph, self.axis) if self.ranks > 1 else [], self.sending
        missed = [(region, region.why_not(graph, sending)) for region in found]
        return {region.sums[0].result.name: str(why) for region, why in missed if why is not None}

    @property
    def sending(self) -> Sending:
        """The formats in which ranks will send tokens."""
        return Sending(self.reads, self.layers, self.sums if self.ranks <= MOST_TERMS else None)


class _Cut:
    """Rewrites one region."""

    def __init__(self, step: SequenceParallel, graph: Graph, region: TokenRegion) -> None:
        self.step, self.graph, self.region = step, graph, region
        self.inside = {*region.sums, *region.ops}
        self.attrs: dict[str, Argument] = {"few": step.few, "mesh": step.axis, "ranks": step.ranks}
        self.parts: dict[Value, Value] = {}
        self.wholes: dict[Value, Value] = {}

    def run(self) -> None:
        """Inserts the operations on parts, gathers what others read, and erases the operations on all tokens."""
        old = sorted(self.inside, key=self.graph.rank)
        for op in old:
            if op in self.region.sums:
                self.scatter(op)
            elif op in self.region.routed:
                self.route(op)
            elif recounts_tokens(op):
                self.recount(op)
            else:
                self.compute(op)
            for value in op.results:
                if value in self.region.gathered:
                    self.gather(op, value)
        names = {value: value.name for op in old for value in op.results}
        for op in reversed(old):
            if op not in self.region.kept:
                self.graph.erase(op)
        for value, name in names.items():
            self.graph.rename(self.parts[value], f"{name}_part")
            if value in self.wholes:
                self.graph.rename(self.wholes[value], name)

    def loc(self, op: Op) -> Location:
        return replace(op.loc, made_by=self.step.name)

    def scatter(self, op: Op) -> None:
        made = self.graph.insert(op, "coll.reduce_scatter_tokens", op["x"], attrs=self.attrs, loc=self.loc(op))
        self.parts[op.result] = made.result

    def recount(self, op: Op) -> None:
        """Inserts a view of this rank's tokens with as many axes as the view of all tokens has."""
        local = self.local(op.result.tensor)
        sizes: list[int] = [*[1] * (len(local.shape) - 2), -1, int(str(local.shape[-1]))]
        args: tuple[Argument, ...] = (self.parts[op["self"]], tuple(sizes))
        made = self.graph.insert(op, "aten.reshape", *args, types=[local], loc=self.loc(op))
        self.parts[op.result] = made.result

    def compute(self, op: Op) -> None:
        """Inserts an operation on the tokens of this rank."""
        sizes = lead(op.results[0])
        for _, value in op.operands() if op.role is not Role.MATMUL else ():
            if value not in self.parts and holds_tokens(value, sizes):
                names = [f"{value.name}_part"]
                own = self.graph.insert(
                    op, "coll.own_tokens", value, attrs=self.attrs, names=names, loc=self.loc(op)
                )  # fmt: skip
                self.parts[value] = own.result

        self.insert(op, [self.local(value.tensor) for value in op.results])

    def route(self, op: Op) -> None:
        """Inserts an operation of a router on the rows of this rank's tokens."""
        shapes = [
            (share(shape[0], self.step.ranks, self.step.few), *shape[1:])
            for shape in (value.tensor.shape for value in op.results)
        ]
        types = [replace(value.tensor, shape=shape) for value, shape in zip(op.results, shapes, strict=True)]
        made, row = self.insert(op, types), row_of(op)
        if row is not None and row.sizes is not None:
            (key,) = op.path(row.sizes)
            set_argument(self.graph, made, key, (-1, *(int(str(size)) for size in shapes[0][1:])))

    def insert(self, op: Op, types: Sequence[TensorType]) -> Op:
        """Inserts an operation with the parts of its operands; its results are the parts of the results of `op`."""

        def swap(leaf: object) -> object:
            return self.parts.get(leaf, leaf) if isinstance(leaf, Value) else leaf

        attrs = {key: map_tree(swap, arg) for key, arg in op.attrs.items()}
        made = self.graph.insert(op, op.name, *map_tree(swap, op.args), attrs=attrs, types=types, loc=self.loc(op))
        self.parts.update(zip(op.results, made.results, strict=True))
        return made

    def local(self, kind: TensorType) -> TensorType:
        return replace(kind, shape=share_shape(kind.shape, self.step.ranks, self.step.few))

    def gather(self, op: Op, value: Value) -> None:
        """Gathers a value after the operation that computes a rank's part of it; users outside the region read it."""
        sizes = self.sizes(op, lead(value))
        args, kind = (self.parts[value], sizes), value.type
        made = self.graph.insert(
            op, "coll.all_gather_tokens", *args, attrs=self.attrs, types=[kind], loc=self.loc(op)
        )  # fmt: skip
        self.wholes[value] = made.result
        self.parts[made.result] = self.parts[value]  # a view that is kept reads it
        for user in self.graph.users(value):
            if user not in self.inside or user in self.region.kept:
                self.graph.replace_in(user, value, made.result)

    def sizes(self, op: Op, shape: tuple[Size, ...]) -> tuple[Argument, ...]:
        """The sizes of all tokens as arguments of an operation: integers, or values that are known before it."""
        known = _known_sizes(self.graph, op)
        return tuple(size if isinstance(size, int) else known.get(size) or self.read(op, size) for size in shape)

    def read(self, op: Op, size: Size) -> Argument:
        """A size that is read from a value before an operation, the first one that has it, or a product of sizes."""
        kinds, loc = [ScalarType("int", size)], self.loc(op)
        for value in (value for other in self.graph for value in other.results):
            kind = value.type
            if value.op is op:
                break
            outside = value.op not in self.inside or value.op in self.region.kept
            if isinstance(kind, TensorType) and size in kind.shape and not kind.partials and outside:
                args = (value, kind.shape.index(size))
                return self.graph.insert(op, "aten.sym_size.int", *args, types=kinds, loc=loc).result
        leads = (lead(value) for member in self.inside for value in member.results)
        if (counted := next((each for each in leads if size not in each and product(each) == size), None)) is not None:
            return self.multiplied(op, counted)
        raise PassError("a size is not known as a number", got=size, where=f"pass '{self.step.name}'")

    def multiplied(self, op: Op, shape: tuple[Size, ...]) -> Argument:
        """The product of sizes, computed before an operation."""
        total, *others = self.sizes(op, shape)
        for at, size in enumerate(others, 2):
            kinds, loc = [ScalarType("int", product(shape[:at]))], self.loc(op)
            total = self.graph.insert(op, "core.mul", total, size, types=kinds, loc=loc).result
        return total


def _known_sizes(graph: Graph, before: Op) -> Mapping[Size, Value]:
    """The sizes that are known as numbers before an operation."""
    found: dict[Size, Value] = {}
    for op in graph.ops():
        kind = op.results[0].type if len(op.results) == 1 else None
        if isinstance(kind, ScalarType) and kind.value is not None and graph.rank(op) < graph.rank(before):
            found.setdefault(kind.value, op.result)
    return found
