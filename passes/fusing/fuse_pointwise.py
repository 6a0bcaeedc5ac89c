"""Fuses arithmetic and moves of elements, such as rotary embeddings, into one kernel each.

    %q1 = aten.mul.Tensor(%q, %cos)
    %a = aten.slice.Tensor(%q, 3, 32, …)     %n = aten.neg(%a)
    %b = aten.slice.Tensor(%q, 3, 0, 32)     %c = aten.cat([%n, %b], -1)
    %q2 = aten.mul.Tensor(%c, %sin)
    %qr = aten.add.Tensor(%q1, %q2)                                                    … and the same for %k
  ->
    %qr, %kr = kernel.pointwise(%qkv, %cos, %sin) {expressions = ["bf16(bf16(x0[i0, i2, 64*i1 + i3] * x1[…]) + …", …]}

Runs last, after the passes that fuse with quantizations, matmuls and norms. Regions (see `pointwise_regions`) become
results of one operation if they read a common tensor, or if no other kernel runs between them, and if nothing reads the
results of the first before the last is computed. An operation is fused if it replaces at least two kernels. Expressions
round where the operations did: the bits are equal, except where a device has several ways to compute a function.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from passes.analyses.integer_elements import is_integer
from passes.analyses.short_sums import LONGEST, sum_of_terms
from passes.fusing.pointwise_regions import MOST_OPERANDS, PointwiseRegion, copies, grow, is_operand, is_pointwise
from qcompiler.dialects.expression_nodes import Expression, Load, parts, rebuilt, renamed, resized
from qcompiler.dialects.fused_expression import FusedExpression
from qcompiler.ir import Graph, Missed, Op, Rewriter, Role, Size, TensorType, Value
from qcompiler.pass_manager.pipeline import Effect, Pass

MOST_RESULTS = 6
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
            region = _possible(graph, op)
            if isinstance(region, Missed):
                reasons[op] = str(region)
            else:
                found.append(region)
                inside |= {*region.launches}
        kernels = _joined(graph, found[::-1])
        for region, *others in kernels:
            if not others and len(region.launches) < 2 and sum_of_terms(region.root.op) is None:
                what = "copies" if copies(region.root.op) else "computes"
                why = f"torch also {what} this in one kernel, and nothing around it can be fused"
                reasons[region.root.op] = why
        ordered = {op: reasons[op] for op in sorted(reasons, key=graph.rank, reverse=True)}
        return Plan(tuple(tuple(each) for each in kernels if each[0].root.op not in reasons), ordered)


def _possible(graph: Graph, op: Op) -> PointwiseRegion | Missed:
    """The region of an operation, whose operands have all its sizes."""
    region = grow(graph, op.results[0])
    if isinstance(region, Missed):
        return region
    if sum(1 for _ in region.expression.expressions()) > MOST_EXPRESSIONS:
        return Missed(f"its expression has more than {MOST_EXPRESSIONS} nodes")
    for size in op.results[0].tensor.shape:
        if not isinstance(size, int) and _axis_with(size, region.operands) is None:
            sized = next((value for value in graph.inputs if is_operand(value) and size in value.tensor.shape), None)
            if sized is None:
                return Missed(f"no axis of its operands has its size {size}")
            region = replace(region, operands=(*region.operands, sized))
    return region


def _joined(graph: Graph, regions: Sequence[PointwiseRegion]) -> list[list[PointwiseRegion]]:
    """Regions in order, joined with an earlier one where they may run together."""
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
    if len(group) >= MOST_RESULTS or len(operands | {*region.operands}) > MOST_OPERANDS:
        return False
    users = [user for each in group for user in graph.users(each.root)]
    place = graph.rank(region.root.op)
    if not all(graph.rank(user) > place for user in users):
        return False
    return bool(operands & {*region.operands}) or _are_adjacent(graph, (*group, region))


def _are_adjacent(graph: Graph, regions: Sequence[PointwiseRegion]) -> bool:
    """Whether only views and operations on integers and sizes are between the operations of regions without norms."""
    if any(region.expression.across for region in regions):
        return False
    own = {op for region in regions for op in region.launches}
    first, last = min(map(graph.rank, own)), max(map(graph.rank, own))
    return all(_is_small(graph, op) for op in graph if first < graph.rank(op) < last and op not in own)


def _is_small(graph: Graph, op: Op) -> bool:
    """Whether an operation runs no kernel, or only computes integers."""
    if op.role is Role.VIEW or not op.results:
        return op.role is Role.VIEW
    results = (value for value in op.results if isinstance(value.type, TensorType))
    return graph.is_constant(op.results[0]) or all(map(is_integer, results))


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
    operands = _operands(regions)
    last = max((region.root.op for region in regions), key=graph.rank)
    attrs = {
        "expressions": tuple(str(_renumbered(region, operands)) for region in regions),
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


def _operands(regions: Sequence[PointwiseRegion]) -> list[Value]:
    """The tensors that the regions read, and others only for sizes that none of these has."""
    operands = list(dict.fromkeys(region.operands[source] for region in regions for source in region.sources()))
    for region in regions:
        for size in region.root.tensor.shape:
            if not isinstance(size, int) and _axis_with(size, operands) is None:
                operands.append(next(value for value in region.operands if size in value.tensor.shape))
    return operands


def _renumbered(region: PointwiseRegion, operands: Sequence[Value]) -> FusedExpression:
    """The expression of a region over the operands x0, x1, … of the fused operation."""

    def name(old: str) -> str:
        return f"x{operands.index(region.operands[int(old[1:])])}"

    def written(what: Expression) -> Expression:
        what = resized(what, lambda size: renamed(size, name))
        if isinstance(what, Load):
            return Load(name(what.name), what.index)
        return rebuilt(what, tuple(map(written, parts(what))))

    definitions = tuple((each, written(what)) for each, what in region.expression.definitions)
    return FusedExpression(definitions, written(region.expression.result))


def _shape_text(shape: Sequence[Size], operands: Sequence[Value]) -> str:
    return ", ".join(str(size) if isinstance(size, int) else str(_axis_with(size, operands)) for size in shape)


def _axis_with(size: Size, operands: Sequence[Value]) -> str | None:
    """The first axis of an operand that has a size, or a multiple of it, as text; None if there is none."""
    axes = [(place, axis, n) for place, value in enumerate(operands) for axis, n in enumerate(value.tensor.shape)]
    for times in range(1, LONGEST + 1):
        for place, axis, n in axes:
            if n == size * times:
                return f"x{place}.{axis}" if times == 1 else f"x{place}.{axis}/{times}"
    return None
