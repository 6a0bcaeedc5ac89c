"""Fuses arithmetic and moves of elements, such as rotary embeddings, into one kernel each.

    %q1 = aten.mul.Tensor(%q, %cos)
    %a = aten.slice.Tensor(%q, 3, 32, …)     %n = aten.neg(%a)
    %b = aten.slice.Tensor(%q, 3, 0, 32)     %c = aten.cat([%n, %b], -1)
    %q2 = aten.mul.Tensor(%c, %sin)
    %qr = aten.add.Tensor(%q1, %q2)                                                    … and the same for %k
  ->
    %qr, %kr = kernel.pointwise(%qkv, %cos, %sin) {expressions = ["bf16(bf16(x0[i0, i2, 64*i1 + i3] * x1[…]) + …", …]}

Runs last, after the passes that fuse with quantizations, matmuls and norms. A region (see `pointwise_regions`) is fused
if it replaces at least two kernels. Regions that read a common tensor become results of one operation, if nothing reads
the results of the first before the last is computed. Expressions round where the operations did: the bits are equal,
except where a device has several ways to compute a function.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from passes.fusing.pointwise_regions import MOST_OPERANDS, PointwiseRegion, copies, grow, is_pointwise
from qcompiler.dialects.expression_nodes import Expression, Load, parts, rebuilt
from qcompiler.dialects.fused_expression import FusedExpression
from qcompiler.ir import Graph, Missed, Op, Rewriter, Size, Value
from qcompiler.pass_manager.pipeline import Effect, Pass

MOST_RESULTS = 4
MOST_EXPRESSIONS = 400
"""Maximum nodes of an expression, so that a kernel compiles quickly."""


@dataclass(frozen=True)
class Plan:
    """What to fuse.

    Attributes:
        kernels: Regions to compute in one operation each, in order.
        reasons: Operation that runs a kernel of its own -> why it is not fused.
    """

    kernels: tuple[tuple[PointwiseRegion, ...], ...]
    reasons: Mapping[Op, str]


@dataclass(frozen=True)
class FusePointwise(Pass):
    """add(mul(q, cos), mul(cat([neg(q[…]), q[…]]), sin))  ->  kernel.pointwise(q, cos, sin)."""

    name: ClassVar[str] = "fuse-pointwise"
    effect: ClassVar[Effect] = Effect.REORDERS

    def run(self, graph: Graph) -> bool:
        """Fuses all regions of the plan."""
        kernels = self.plan(graph).kernels
        now: dict[Value, Value] = {}
        for regions in kernels:
            now |= fuse(regions, graph, now, self.name)
        return bool(kernels)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Reports the operations of regions that are not fused."""
        return {op.results[0].name: why for op, why in self.plan(graph).reasons.items()}

    def plan(self, graph: Graph) -> Plan:
        """Grows regions from the last operation to the first, then joins those that read a common tensor."""
        found: list[PointwiseRegion] = []
        reasons: dict[Op, str] = {}
        inside: set[Op] = set()
        for op in reversed(graph.ops()):
            if op in inside or not is_pointwise(op) or graph.is_constant(op.results[0]):
                continue
            region = _worthwhile(graph, op)
            if isinstance(region, Missed):
                reasons[op] = str(region)
            else:
                found.append(region)
                inside |= {*region.launches}
        return Plan(tuple(map(tuple, _joined(graph, found[::-1]))), reasons)


def _worthwhile(graph: Graph, op: Op) -> PointwiseRegion | Missed:
    region = grow(graph, op.results[0])
    if isinstance(region, Missed):
        return region
    if len(region.launches) < 2:
        what = "copies elements" if copies(op) else "computes"
        return Missed(f"torch also {what} this in one kernel, and nothing around it can be fused")
    if sum(1 for _ in region.expression.expressions()) > MOST_EXPRESSIONS:
        return Missed(f"its expression has more than {MOST_EXPRESSIONS} nodes")
    for size in op.results[0].tensor.shape:
        if not isinstance(size, int) and _axis_with(size, region.operands) is None:
            return Missed(f"no axis of its operands has its size {size}")
    return region


def _joined(graph: Graph, regions: Sequence[PointwiseRegion]) -> list[list[PointwiseRegion]]:
    """Regions in order, joined with an earlier one where they read a common tensor and may run together."""
    groups: list[list[PointwiseRegion]] = []
    for region in regions:
        group = next((each for each in reversed(groups) if _may_join(graph, region, each)), None)
        if group is None:
            groups.append([region])
        else:
            group.append(region)
    return groups


def _may_join(graph: Graph, region: PointwiseRegion, group: Sequence[PointwiseRegion]) -> bool:
    operands = {value for each in group for value in each.operands}
    if not operands & {*region.operands} or len(operands | {*region.operands}) > MOST_OPERANDS:
        return False
    users = [user for each in group for user in graph.users(each.root)]
    place = graph.rank(region.root.op)
    return len(group) < MOST_RESULTS and all(graph.rank(user) > place for user in users)


def fuse(
    regions: Sequence[PointwiseRegion], graph: Graph, now: Mapping[Value, Value], made_by: str
) -> dict[Value, Value]:  # fmt: skip
    """Replaces regions by one operation, before the last of their roots; returns root -> new value.

    Args:
        regions: The regions.
        graph: The graph that contains them.
        now: Roots that are replaced already -> new values.
        made_by: The name of the pass.
    """
    operands = list(dict.fromkeys(region.read_by(load) for region in regions for load in region.expression.loads))
    last = max((region.root.op for region in regions), key=graph.rank)
    attrs = {
        "expressions": tuple(str(renumbered(region, operands)) for region in regions),
        "shapes": tuple(_shape_text(region.root.tensor.shape, operands) for region in regions),
    }
    loc = replace(last.loc, made_by=made_by)
    args = [now.get(value, value) for value in operands]
    made = graph.insert(last, "kernel.pointwise", *args, attrs=attrs, loc=loc)
    rewriter = Rewriter(graph, last, made_by)
    for region, new in zip(regions, made.results, strict=True):
        name = region.root.name
        graph.replace(region.root, new)
        rewriter.erase_unread(region.root.op)
        graph.rename(new, name)
    return {region.root: new for region, new in zip(regions, made.results, strict=True)}


def renumbered(region: PointwiseRegion, operands: Sequence[Value]) -> FusedExpression:
    """The expression of a region over the operands x0, x1, … of the fused operation."""

    def renamed(what: Expression) -> Expression:
        if isinstance(what, Load):
            return Load(f"x{operands.index(region.read_by(what))}", what.index)
        return rebuilt(what, tuple(map(renamed, parts(what))))

    definitions = tuple((name, renamed(what)) for name, what in region.expression.definitions)
    return FusedExpression(definitions, renamed(region.expression.result))


def _shape_text(shape: Sequence[Size], operands: Sequence[Value]) -> str:
    return ", ".join(str(size) if isinstance(size, int) else str(_axis_with(size, operands)) for size in shape)


def _axis_with(size: Size, operands: Sequence[Value]) -> str | None:
    """The first axis of an operand that has a size, as text; None if there is none."""
    axes = ((place, axis, n) for place, value in enumerate(operands) for axis, n in enumerate(value.tensor.shape))
    return next((f"x{place}.{axis}" for place, axis, n in axes if n == size), None)
