"""Fuses a quantization with the arithmetic before it: the rule that two passes share.

    %h = aten.add.Tensor(%x, %r)                         %h is read elsewhere, too
    %n = aten.rms_norm(%h, [256], %w, 1e-06)
    %n_q, %n_s = kernel.quantize(%n) {…}
  ->
    %n_q, %n_s, %h = kernel.fused_quantize(%x, %r, %w) {expression = "h0 = bf16(x0 + x1); …", keep = ["h0"], …}

The fused operation is placed before the first user of its residual outputs.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from passes.analyses.arithmetic import is_row_view
from passes.fusing.fusion_regions import FusionRegion, Limits, grow
from passes.fusing.region_expressions import expression_of, in_order, residual_names
from qcompiler.dialects.expression_nodes import Name
from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Rule, Size, TensorType, Value

OPERANDS = 6
"""Maximum operands of a fused expression."""

TURNED_CODES = 4e-3
"""Relative error that a last-bit difference may cause after quantization: a changed code is off by an eighth, and one
such code among the few thousand of a small example reaches this error."""

NO_REDUCTION = Missed("it is not computed by a reduction over the row")


@dataclass(frozen=True)
class ArithmeticThenQuantize(Rule):
    """quantize(arithmetic(x, …))  ->  fused_quantize(x, …)

    Attributes:
        across: True for arithmetic with a reduction over the row, False for arithmetic without.
    """

    across: bool
    root: ClassVar[tuple[str, ...]] = ("kernel.quantize",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        x, prescale = op["x"], op.get("prescale")
        if op.format().block[0] != 1:
            return Missed("one scale covers several rows", op.results[1])
        limits = Limits(operands=OPERANDS - (prescale is not None), across=self.across)
        region = grow(graph, x, limits, consumer=op)
        if isinstance(region, Missed):
            return region
        if self.across and not region.across:
            return NO_REDUCTION
        if (strided := next(filter(_has_gaps, region.operands), None)) is not None:
            return Missed("the kernel reads rows whose columns are next to each other, and would need a copy", strided)
        return {"region": region, "prescale": prescale}

    def rewrite(self, op: Op, rewriter: Rewriter, region: FusionRegion, prescale: Value | None, **_: Any) -> None:
        graph, shape = rewriter.graph, op["x"].tensor.shape
        for late in region.late:
            graph.move(late, before=region.place)
        operands = [*region.operands, *([] if prescale is None else [prescale])]
        named = {f"x{place}": value for place, value in enumerate(operands)}
        spelled = {value: Name(name) for name, value in named.items()}
        vectors = [name for name, value in named.items() if value.tensor.shape == shape[-1:]]
        expression, order = in_order(
            expression_of(region, spelled, None if prescale is None else Name(list(named)[-1])), vectors
        )
        args = [named[name] if name in vectors else arranged(rewriter, region, named[name], shape) for name in order]
        attrs = {**op.attrs, "expression": str(expression), "keep": residual_names(region)}
        made = rewriter.insert("kernel.fused_quantize", *args, attrs=attrs)
        graph.move(made, before=region.place)
        names: dict[Value, str] = {}
        for value, new in zip(region.residuals, made.results[2:], strict=True):
            names |= keep(rewriter, region, value, new)
        rewriter.replace(op, *made.results[:2])
        for unread in (region.root.op, *reversed(region.ops)):
            rewriter.erase_unread(unread)
        for new, name in names.items():
            graph.rename(new, name)


def _has_gaps(value: Value) -> bool:
    """Whether a value holds every second column of another one, or fewer."""
    if value.op.name != "aten.slice.Tensor":
        return False
    axis, rank = value.op.argument("dim"), len(value.tensor.shape)
    return isinstance(axis, int) and axis % rank == rank - 1 and value.op.argument("step") != 1


def keep(rewriter: Rewriter, region: FusionRegion, value: Value, new: Value) -> dict[Value, str]:
    """Makes users of `value` outside its region read the result `new`; returns the names to assign at the end."""
    graph, shape, names = rewriter.graph, new.tensor.shape, {}
    users = region.residuals[value]
    # A view that arranges the rows like the fused operation is replaced by the result itself.
    views = [user for user in users if is_row_view(user) and value.tensor.shape != shape == user.result.tensor.shape]
    if others := [user for user in users if user not in views]:
        shaped = arranged(rewriter, region, new, value.tensor.shape)
        names[shaped] = value.name
        for user in others:
            graph.replace_in(user, value, shaped)
    for view in views:
        names[new] = view.result.name
        graph.replace(view.result, new)
        rewriter.erase_unread(view)
    return names


def arranged(rewriter: Rewriter, region: FusionRegion, value: Value, shape: tuple[Size, ...]) -> Value:
    """A tensor with the rows of the region, reshaped before its place to a shape that occurs in the region."""
    if value.tensor.shape == shape:
        return value
    kind = TensorType(value.tensor.dtype, shape)
    view = next((view for view in region.views if view.result.tensor.shape == shape), None)
    if view is not None:
        made = rewriter.insert("aten.reshape", value, view.args[1], types=[kind], names=[value.name])
    else:
        like = next(operand for operand in region.operands if operand.tensor.shape == shape)
        made = rewriter.insert("aten.view_as", value, like, types=[kind], names=[value.name])
    rewriter.graph.move(made, before=region.place)
    return made.result
