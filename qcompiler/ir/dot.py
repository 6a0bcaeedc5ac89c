"""Graph -> Graphviz DOT, with a cluster for each module.

Path("graph.dot").write_text(graph.to_dot())            dot -Tsvg graph.dot -o graph.svg
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from qcompiler.ir.op import Op
from qcompiler.ir.structure import Structure
from qcompiler.ir.traits import Role

ENDS = ("core.input", "core.return")
COLOURS = {"quant": "#ede7f9", "kernel": "#dff2f6"}
"""Dialect -> fill color of its operations; others are white."""

HEAD = """\
  rankdir = TB
  node [shape = box, style = "rounded, filled", fillcolor = white, fontname = "monospace", fontsize = 10]
  edge [color = "#808890", fontname = "monospace", fontsize = 8]"""

BOX = 'labeljust = l; color = "#c0c6cc"; fontname = "monospace"; fontsize = 10'


@dataclass
class _Cluster:
    """A module: its operations and its submodules."""

    ops: list[Op] = field(default_factory=list)
    inside: dict[str, "_Cluster"] = field(default_factory=dict)


def dot_of(graph: Structure, *, weights: bool = True) -> str:
    """The DOT text of a graph, ending without a newline.

    Args:
        graph: The graph to draw.
        weights: Whether parameters and buffers are nodes.
    """
    drawn = [op for op in graph if weights or op.role is not Role.STATE]
    names = {op: f"n{number}" for number, op in enumerate(drawn)}
    root = _Cluster()
    for op in drawn:
        cluster = root
        for part in op.loc.module.split(".") if op.loc.module else ():
            cluster = cluster.inside.setdefault(part, _Cluster())
        cluster.ops.append(op)
    lines = [*_cluster(root, names, "", "  "), *_edges(drawn, names)]
    return "\n".join([f"digraph {_quoted(graph.name)} {{", HEAD, *lines, "}"])


def _cluster(cluster: _Cluster, names: dict[Op, str], path: str, indent: str) -> Iterator[str]:
    for op in cluster.ops:
        yield f"{indent}{names[op]} [{', '.join(f'{key} = {value}' for key, value in _looks(op).items())}]"
    for part, inner in cluster.inside.items():
        inside = f"{path}.{part}" if path else part
        yield f"{indent}subgraph {_quoted(f'cluster_{inside}')} {{"
        yield f"{indent}  label = {_quoted(part)}; {BOX}"
        yield from _cluster(inner, names, inside, indent + "  ")
        yield f"{indent}}}"


def _looks(op: Op) -> dict[str, str]:
    """The attributes of a node; its label is the op name above its results."""
    label = "\n".join([op.name, *(f"{value}: {value.type}" for value in op.results)])
    looks = {"label": _quoted(label)}
    if op.name in ENDS or op.role is Role.STATE:
        looks |= {"shape": "ellipse", "fillcolor": _quoted("#f2f3f4")}
    elif (colour := COLOURS.get(op.name.partition(".")[0])) is not None:
        looks["fillcolor"] = _quoted(colour)
    return looks


def _edges(drawn: list[Op], names: dict[Op, str]) -> Iterator[str]:
    """One edge for each distinct operand of an operation."""
    for op in drawn:
        for value in dict.fromkeys(value for _, value in op.operands()):
            if value.op in names:
                tip = f" [label = {_quoted(str(value))}]" if len(value.op.results) > 1 else ""
                yield f"  {names[value.op]} -> {names[op]}{tip}"


def _quoted(text: str) -> str:
    """A DOT string literal: backslashes are escaped, and unprintable characters are spelled out."""
    seen = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return '"' + seen.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
