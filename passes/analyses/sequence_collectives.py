"""Collectives of one rank's program, seen along the sequence: all ranks have the same tokens at the same places."""

from passes.analyses.sequence_elementwise import elementwise
from passes.analyses.sequence_labels import Label
from passes.analyses.sequence_site import Row, Site, Table


def _gathered(site: Site) -> Label:
    """The parts of all ranks, along an axis that holds only one token's elements."""
    label = site.label("x")
    axis, axes = site.axis(label, "axis"), list(label.axes)
    site.within(axes[axis], "concatenates along")
    axes[axis] = site.fixed(site.shape()[axis])
    return site.made(axes, label)


COLLECTIVES: Table = {
    "coll.all_reduce": Row("An element of the sum depends on the ranks' elements at its own place.", elementwise),
    "coll.all_gather": Row("The parts of the ranks, which belong to the same tokens, are put side by side.", _gathered),
}
"""Collective -> why and how it is position-wise."""
