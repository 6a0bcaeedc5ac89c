"""Line diff of the texts of two graphs, without locations."""

import difflib

from qcompiler.ir.graph import Graph


def diff(before: Graph, after: Graph, *, context: int = 1) -> str:
    """A unified diff of the two texts with `context` unchanged lines around each change; empty if they are equal."""
    lines = difflib.unified_diff(
        before.text(locations=False).splitlines(),
        after.text(locations=False).splitlines(),
        "before",
        "after",
        lineterm="",
        n=context,
    )
    return "\n".join(lines)
