"""How operations treat the sequence: position-wise with a proof, causal, or refused with a reason.

    aten.softmax.int(%x, -1)     [batch, positions, 64] -> [batch, positions, 64]
    aten.softmax.int(%x, 1)      refused: aten.softmax.int normalizes over the positions

An operation that is in no table is refused. Only `attention.causal` reads other positions: earlier ones.
"""

from collections.abc import Callable

from passes.analyses.sequence_collectives import COLLECTIVES
from passes.analyses.sequence_elementwise import ELEMENTWISE, ELEMENTWISE_RULES
from passes.analyses.sequence_experts import EXPERTS
from passes.analyses.sequence_labels import Fact, Label, Mixes, Unplaced, counted, has_tokens
from passes.analyses.sequence_moves import MOVES
from passes.analyses.sequence_quantized import QUANTIZED
from passes.analyses.sequence_reductions import REDUCTIONS
from passes.analyses.sequence_site import Answer, Row, Site, Table
from qcompiler.dialects.aten import is_pointwise
from qcompiler.ir.op_table import lookup

CAUSAL = "attention.causal"


def _causal(site: Site) -> Label:
    """Batch and positions must be whole axes of query, key and value."""
    labels = [site.label(name) for name in ("query", "key", "value")]
    site.free("sinks")
    site.free("slopes")
    for name, label in zip(("query", "key", "value"), labels, strict=True):
        batch, heads, positions, size = label.axes
        kinds = [[digit.kind for digit in axis] for axis in (batch, positions)]
        if kinds != [["batch"], ["positions"]] or has_tokens(heads) or has_tokens(size):
            raise Mixes(f"the {name} of {CAUSAL} is {label}, not [batch, heads, positions, size]")
    query, _, value = labels
    return site.made([*query.axes[:3], value.axes[3]], *labels)


def _always(why: str) -> Callable[[Site], Answer]:
    def apply(site: Site) -> Answer:
        raise Mixes(f"{site.op.name} {why}")

    return apply


def _convolution(site: Site) -> Answer:
    """A convolution over an axis without tokens is refused, too, but with the reason that no row covers it."""
    axes = site.label("input").axes[2:]
    names = [name for axis in axes if (name := counted(axis)) is not None]
    raise Mixes(f"{site.op.name} {f'convolves over {names[0]}' if names else NO_ROW}")


NO_ROW = "is not known to treat each position by itself"

REFUSED: Table = {
    name: Row("It is never position-wise.", apply)
    for names, apply in (
        (("aten.conv1d", "aten.conv2d", "aten.conv1d.padding", "aten.convolution"), _convolution),
        (
            ("aten.scaled_dot_product_attention",),
            _always("reads all positions: the pass attention has not shown that its mask is causal"),
        ),
        (("aten.sum", "aten.mean", "aten.max", "aten.min", "aten.any", "aten.all"), _always("combines all tokens")),
        (("core.buffer",), _always("reads a buffer that earlier calls changed")),
        (("core.update",), _always("writes a buffer, which later calls read")),
    )
    for name in names
}
"""Operation that is refused -> the reason, more specific than that it has no row."""

RULES: Table = {
    **ELEMENTWISE_RULES,
    **MOVES,
    **REDUCTIONS,
    **EXPERTS,
    **QUANTIZED,
    **COLLECTIVES,
    CAUSAL: Row("Position p reads positions up to p.", _causal),
    **REFUSED,
}
"""Operation -> why and how it is position-wise; operations that torch tags as pointwise need no row."""


def row_of(name: str) -> Row | None:
    """The row of an operation, or of the operation that it implements; None if nothing is known about it."""
    definition = lookup(name)
    if definition is not None and definition.implements is not None:
        name = definition.implements
    return RULES.get(name) or (ELEMENTWISE if is_pointwise(name) else None)


def facts_of(site: Site) -> tuple[Fact, ...]:
    """The facts of an operation's results; raises Mixes if it is not position-wise."""
    row = row_of(site.op.name)
    if row is None:
        raise Mixes(f"{site.op.name} {NO_ROW}")
    if row is ELEMENTWISE and site.op.effects:
        raise Mixes(f"{site.op.name} has effects other than its result")
    try:
        answer = row.apply(site)
    except Unplaced as reason:
        raise Mixes(f"{site.op.name} mixes tokens: {reason.why}") from None
    return answer if isinstance(answer, tuple) else (answer,)
