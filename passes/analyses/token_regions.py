"""Regions of operations that treat tokens independently, between sums over ranks and readers of several tokens.

    %s = coll.all_reduce(%y) {mesh = "tp"}      : bf16[s0, s1, 512]     a sum over ranks
    %h = aten.add.Tensor(%x, %s)                                        in the region; %x is whole
    %n = aten.rms_norm(%h, [512], %w)                                   in the region; %w belongs to all tokens
    %g = aten.linear(%n, %w1)                                           outside: %n must be gathered

All axes of a value but the last count tokens. In a region, each rank can compute a part of the tokens: then the sum is
scattered, and only what others read is gathered. A view may count the tokens in another way, as long as their order and
the last axis stay:

    %v = aten.view(%h, [%t, 512])                           : bf16[s0*s1, 512]
    %n = aten.rms_norm(%v, [512], %w)                                   in the region, and so is the view

Routers are in the region, too (`passes.analyses.routers`): what they choose is gathered, not what they read. So are
layers that are whole on each rank, if only the region reads them:

    %g = aten.linear(%n, %w1)                                           in the region, if each rank has all of %w1
    %y = aten.linear(aten.silu(%g), %w2)                                and %w2
    %o = aten.add.Tensor(%h, %y)                                        in the region
"""

from collections.abc import Collection, Container
from dataclasses import dataclass, field

import networkx as nx

from passes.analyses.routers import routers
from passes.analyses.sent_bytes import Sending
from passes.analyses.sharding_factors import value_at
from passes.analyses.sharding_rules import row_of
from qcompiler.dialects.coll_tokens import tokens_of
from qcompiler.ir import Graph, Missed, Op, Role, ScalarType, Size, TensorType, Value
from qcompiler.ir.op import Path

ALONE = Missed("no operation after it treats tokens independently")

RECOUNTING = (
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten.using_ints", "aten.unsqueeze", "aten.squeeze",
    "aten.squeeze.dim", "aten.squeeze.dims",
)  # fmt: skip
"""Views whose elements keep their order."""

UNBOUNDED = 1 << 62
"""A slice up to such a place ends at the last element."""


@dataclass
class TokenRegion:
    """Sums over ranks and the operations after them, in the order of the graph.

    Attributes:
        sums: The all-reduces.
        ops: The operations that treat tokens independently.
        gathered: Results of both that other operations read, directly or through views in `kept`.
        kept: Views that other operations read, too: these read a view of all tokens.
        routed: The operations of `ops` that belong to routers: their tokens are their rows.
    """

    sums: list[Op] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    gathered: list[Value] = field(default_factory=list)
    kept: list[Op] = field(default_factory=list)
    routed: set[Op] = field(default_factory=set)

    def why_not(self, graph: Graph, sending: Sending) -> Missed | None:
        """Why it is not worth cutting, if ranks send tokens in these formats; None if it is."""
        if not self.ops:
            return ALONE
        if all(op.result.tensor.shape[-1] == 1 for op in self.sums):
            return Missed("it sums one number for each token, which takes as long as a scatter", self.sums[0].result)
        scattered, gathered = self.sent(graph, sending)
        whole = sum(Sending().scattered(op) for op in self.sums)
        if scattered + gathered > 2 * whole:
            why = f"scatters and gathers would send {scattered} + {gathered} bytes of each token in its region"
            return Missed(f"{why}, more than the {2 * whole} of its all-reduces", self.tokens[-1])
        return None

    @property
    def tokens(self) -> list[Value]:
        """The gathered values that are not choices of routers."""
        return [value for value in self.gathered if value.op not in self.routed]

    def sent(self, graph: Graph, sending: Sending) -> tuple[int, int]:
        """Bytes of a token that are scattered, and that are gathered, if ranks send tokens in these formats.

        The choices of routers are not counted: they are a small part (`routers.SMALL`).
        """
        inside = {*self.sums, *self.ops}.difference(self.kept)
        users = {value: [op for op in graph.users(value) if op not in inside] for value in self.tokens}
        gathered = sum(sending.gathered(graph, value, readers) for value, readers in users.items())
        return sum(map(sending.scattered, self.sums)), gathered


def token_regions(graph: Graph, mesh: str) -> list[TokenRegion]:
    """All regions after sums over the ranks of an axis of the mesh."""
    joined: nx.Graph[Op] = nx.Graph()
    routed = routers(graph)
    for op in graph.ops():
        if _is_sum(op, mesh):
            joined.add_node(op)
        elif _continues(op, joined, routed):
            branches = [member for _, value in op.operands() for member in _branch(graph, value, op, joined)]
            joined.add_edges_from(
                (value.op, member)
                for member in (*branches, op)
                for _, value in member.operands()
                if value.op in joined or value.op in branches
            )
    for op in sorted(joined, key=graph.rank, reverse=True):
        if op not in routed and recounts_tokens(op) and joined.degree(op) == 1 and not _is_gathered(graph, op, joined):
            joined.remove_node(op)  # nothing in the region reads it
    regions = [_region(graph, mesh, members, routed) for members in nx.connected_components(joined)]
    return sorted(regions, key=lambda region: graph.rank(region.sums[0]))


def _is_gathered(graph: Graph, view: Op, joined: Container[Op]) -> bool:
    """Whether others read only a view of a value that is computed for a rank's tokens: then it is gathered instead."""
    source = view["self"]
    computed = source.op.name != "coll.all_reduce" and not recounts_tokens(source.op)
    return computed and all(user in joined for user in graph.users(source))


def _continues(op: Op, joined: Container[Op], routed: Collection[Op]) -> bool:
    """Whether an operation treats tokens of a region independently; what reads only choices of a router is outside."""
    read = {value.op for _, value in op.operands() if value.op in joined}
    return bool(read) and (op in routed or (not read.issubset(routed) and (keeps_tokens(op) or recounts_tokens(op))))


def _branch(graph: Graph, value: Value, user: Op, joined: Container[Op]) -> set[Op]:
    """The operations that compute an operand of a region from its values, token by token, if only it reads them."""
    found: set[Op] = set()
    reached, stack = False, [value.op] if holds_tokens(value, lead(user.results[0])) else []
    while stack:
        op = stack.pop()
        if op in joined:
            reached = True
        elif op not in found and not all(map(graph.is_constant, op.results)):
            if not (is_whole_linear(op, graph) or keeps_tokens(op)):
                return set()
            found.add(op)
            stack += [operand.op for _, operand in op.operands()]
    readers = {reader for op in found for made in op.results for reader in graph.users(made)}
    useful = reached and any(op.role is Role.MATMUL for op in found)
    return found if useful and readers <= {*found, user} else set()


def is_whole_linear(op: Op, graph: Graph) -> bool:
    """Whether an operation is a linear whose weight each rank has, so that it treats tokens independently."""
    if op.name != "aten.linear" or any(_is_placed(value) for value in (op.result, *(v for _, v in op.operands()))):
        return False
    return all(graph.is_constant(value) for _, value in op.operands() if value is not op["input"])


def _region(graph: Graph, mesh: str, members: set[Op], routed: set[Op]) -> TokenRegion:
    region = TokenRegion(routed=members & routed)
    for op in sorted(members, key=graph.rank, reverse=True):
        (region.sums if _is_sum(op, mesh) else region.ops).insert(0, op)
        inside = members.difference(region.kept)
        read = [value for value in op.results if any(user not in inside for user in graph.users(value))]
        if read and op not in routed and recounts_tokens(op):
            region.kept.insert(0, op)
        else:
            region.gathered[:0] = read
    for view in list(region.kept):
        inside = members.difference(region.kept)
        if [user for user in graph.users(view["self"]) if user not in inside] == [view]:  # it is gathered instead
            region.gathered[region.gathered.index(view["self"])] = view.result
            region.kept.remove(view)
    return region


def lead(value: Value) -> tuple[Size, ...]:
    """The sizes that count the tokens of a value."""
    return value.tensor.shape[:-1]


def holds_tokens(value: Value, sizes: tuple[Size, ...]) -> bool:
    """Whether a value has these tokens."""
    return isinstance(value.type, TensorType) and len(value.tensor.shape) > 1 and lead(value) == sizes


def keeps_tokens(op: Op) -> bool:
    """Whether each token of the results depends only on the same token of the operands, which all ranks hold alike."""
    if any(_is_placed(value) for value in (*op.results, *(value for _, value in op.operands()))):
        return False
    row = row_of(op)
    if row is None or row.sizes is not None or op.effects or op.role in (Role.MATMUL, Role.VIEW):
        return _is_full_slice(op)
    if any(isinstance(value.type, ScalarType) for _, value in op.operands()):
        return False
    if not op.results or not all(isinstance(value.type, TensorType) and value.tensor.shape for value in op.results):
        return False
    sizes = lead(op.results[0])
    if not sizes or not all(holds_tokens(value, sizes) for value in op.results):
        return False
    tokens = {path for path, value in op.operands() if holds_tokens(value, sizes)}
    return bool(tokens) and all(_along(op, axis, tokens) for axis, size in enumerate(sizes) if size != 1)


def recounts_tokens(op: Op) -> bool:
    """Whether an operation is a view that keeps the order of tokens and the last axis: [b, s, n] -> [b * s, n]."""
    return is_recount(op) and not _is_placed(op.result)


def is_recount(op: Op) -> bool:
    """Whether an operation is such a view, also of a value of which ranks hold parts or terms."""
    if op.name not in RECOUNTING:
        return False
    old, new = op["self"].tensor.shape, op.result.tensor.shape
    if min(len(old), len(new)) < 2 or old[-1] != new[-1] or not isinstance(new[-1], int):
        return False
    tokens = tokens_of(old)
    known = {*old, tokens, *(kind.value for _, value in op.operands() if isinstance(kind := value.type, ScalarType))}
    return tokens == tokens_of(new) and all(isinstance(size, int) or size in known for size in new[:-1])


def _is_placed(value: Value) -> bool:
    """Whether ranks hold different parts or terms of a value."""
    return isinstance(value.type, TensorType) and bool(value.type.sharding)


def _along(op: Op, axis: int, tokens: set[Path]) -> bool:
    """Whether an operation has a factor along an axis of tokens, of exactly the operands that have tokens."""
    row = row_of(op)
    for factor in row.factors(op) if row is not None else ():
        places = {place.slot: place for place in factor.places}
        if 0 in places and places[0].axis == axis and not factor.summed:
            operands = {slot for slot in places if not isinstance(slot, int) and value_at(op, slot) is not None}
            return operands == tokens and all(place.axis == axis and place.inner == 1 for place in factor.places)
    return False


def _is_full_slice(op: Op) -> bool:
    """Whether an operation slices all elements along an axis of any size, or slices the last axis."""
    if op.name != "aten.slice.Tensor" or not isinstance(dim := op.argument("dim"), int):
        return False
    shape = op["self"].tensor.shape
    start, end = op.argument("start"), op.argument("end")
    fixed = all(arg is None or type(arg) is int for arg in (start, end)) and op.argument("step") == 1
    whole = start in (None, 0) and (end is None or (isinstance(end, int) and end >= UNBOUNDED))
    return len(shape) > 1 and fixed and (whole or dim % len(shape) == len(shape) - 1)


def _is_sum(op: Op, mesh: str) -> bool:
    if op.name != "coll.all_reduce" or op.attrs["mesh"] != mesh:
        return False
    shape = op.result.tensor.shape
    return len(shape) > 1 and isinstance(shape[-1], int) and not op.result.tensor.sharding
