"""Collectives of one rank's program, seen along the sequence: all ranks have the same tokens at the same places."""

from passes.analyses.sequence_elementwise import elementwise
from passes.analyses.sequence_labels import Axis, Below, Label, Mixes, regroup
from passes.analyses.sequence_quantized import fused_quantize, linear
from passes.analyses.sequence_site import Row, Site, Table


def _gathered(site: Site) -> Label:
    """The parts of all ranks, along an axis that holds only one token's elements."""
    label = site.label("x")
    axis, axes = site.axis(label, "axis"), list(label.axes)
    site.within(axes[axis], "concatenates along")
    axes[axis] = site.fixed(site.shape()[axis])
    return site.made(axes, label)


def _cut_tokens(site: Site) -> Label:
    return _cut(site, site.label("x"))


def _cut(site: Site, label: Label) -> Label:
    """All tokens one after the other, of which each rank has a part: row i of two values is the same token."""
    return site.made([*[()] * (len(label.axes) - 2), _tokens(label), label.axes[-1]], label)


def _tokens(label: Label) -> Axis:
    """All axes but the last one, one after the other."""
    return tuple(digit for axis in label.axes[:-1] for digit in axis)


def _linear_scattered(site: Site) -> Label:
    """As a matmul and a sum of which each rank has some tokens."""
    return _cut(site, linear(site))


def _terms(site: Site) -> Label:
    """The terms of all ranks along a new first axis; each belongs to the same token."""
    label = _cut_tokens(site)
    return site.made([site.fixed(site.shape()[0]), *label.axes], label)


def _gathered_tokens(site: Site) -> Label:
    """Numbers below the number of groups remain below it."""
    label = site.label("x")
    known = label.known if isinstance(label.known, Below) else None
    return site.made(regroup(label.axes, site.shape()), label, known=known)


def _chosen(site: Site, label: Label) -> Label:
    """Zeros for tokens whose experts are on other ranks: the experts of the same token."""
    experts = site.label("experts")
    if experts.axes[0] != _tokens(label):
        raise Mixes(f"{site.op.name} reads the experts of other tokens")
    return site.made(label.axes, label, experts)


def _own_first(site: Site) -> Label:
    """Numbers below the number of groups remain below it."""
    label = site.label("x")
    return site.made(label.axes, label, known=label.known if isinstance(label.known, Below) else None)


COLLECTIVES: Table = {
    "coll.all_reduce": Row("An element of the sum depends on the ranks' elements at its own place.", elementwise),
    "coll.all_gather": Row("The parts of the ranks, which belong to the same tokens, are put side by side.", _gathered),
    "coll.own_tokens": Row("Each rank has some of the tokens, in the same order.", _cut_tokens),
    "coll.reduce_scatter_tokens": Row("An element of the sum depends on the same token on all ranks.", _cut_tokens),
    "coll.all_to_all_tokens": Row("Terms of the same token from all ranks, along an axis for the ranks.", _terms),
    "coll.all_gather_tokens": Row("The tokens of all ranks, in the same order.", _gathered_tokens),
    "coll.gather_chosen_tokens": Row(
        "The tokens of all ranks, in the same order; zeros depend on a token's own experts.",
        lambda site: _chosen(site, _gathered_tokens(site)),
    ),
    "coll.reduce_scatter_chosen_tokens": Row(
        "An element of the sum depends on the same token on all ranks, and on the experts of this token.",
        lambda site: _chosen(site, _cut_tokens(site)),
    ),
    "coll.fused_reduce_quantize": Row("A row of the sum depends on the ranks' rows at its place.", fused_quantize),
    "coll.linear_scatter_tokens": Row(
        "An element of the sum depends on the codes of the same token on all ranks.", _linear_scattered
    ),
    "coll.own_first": Row("Each number is renumbered alone.", _own_first),
}
"""Collective -> why and how it is position-wise."""
