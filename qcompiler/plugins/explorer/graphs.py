"""Graphs for Google's Model Explorer, which draws large graphs: pip install "qcompiler[explorer]".

    Path("stages.json").write_text(json.dumps(graph_collection("my model", compiled.stages)))
    model-explorer stages.json

Model Explorer opens graph text directly: model-explorer graph.qir --extensions=qcompiler.plugins.explorer
"""

from collections.abc import Mapping
from typing import Any

from qcompiler.ir import Graph, Op, Value, print_argument, print_op

COLOURS = {"added": "#e3f5e9", "changed": "#fdf2d9"}
"""Background of operations that a stage added or changed."""

SLASH = "\N{FRACTION SLASH}"
"""Replaces a slash in a module's name: Model Explorer treats a slash as a path separator."""


def graph_collection(name: str, stages: Mapping[str, Graph]) -> dict[str, Any]:
    """Model Explorer's JSON with one graph per stage, and operations grouped by module.

    Args:
        name: The name of the collection in Model Explorer.
        stages: Graphs by name, such as `compiled.stages`; each is compared with the previous one.
    """
    graphs, before = [], None
    for number, (stage, graph) in enumerate(stages.items()):
        # Model Explorer sorts graphs by name; numbers keep their order.
        graphs.append({"id": f"{number:02} {stage}", "nodes": _nodes(graph, before)})
        before = graph
    return {"label": name, "graphs": graphs, "graphSorting": "name_asc"}


def _nodes(graph: Graph, before: Graph | None) -> list[dict[str, Any]]:
    names = {op: op.results[0].name if op.results else f"{op.name} {number}" for number, op in enumerate(graph)}
    old = None if before is None else {op.results[0].name: _line(op) for op in before if op.results}
    return [_node(op, names, _change(op, old)) for op in graph]


def _change(op: Op, old: Mapping[str, str] | None) -> str:
    """How an operation changed, compared as in `qcompiler.diff`: by its line, without the location."""
    if old is None or not op.results:
        return ""
    line = old.get(op.results[0].name)
    return "added" if line is None else "changed" if line != _line(op) else ""


def _line(op: Op) -> str:
    return print_op(op, locations=False)


def _node(op: Op, names: Mapping[Op, str], change: str) -> dict[str, Any]:
    attrs = {key: print_argument(op.attrs[key]) for key in sorted(op.attrs)} | {"line": _line(op)}
    attrs |= {"source": f"{op.loc.file}:{op.loc.line}"} if op.loc.file else {}
    attrs |= {"made by": op.loc.made_by} if op.loc.made_by else {}
    attrs |= {"change": change} if change else {}
    operands = list(op.operands())
    node: dict[str, Any] = {
        "id": names[op],
        "label": op.name,
        "namespace": "/".join(part.replace("/", SLASH) for part in op.loc.module.split(".")),
        "attrs": _pairs(attrs),
        "incomingEdges": [
            {
                "sourceNodeId": names[value.op],
                "sourceNodeOutputId": str(value.index),
                "targetNodeInputId": str(place),
            }
            for place, (_, value) in enumerate(operands)
        ],
        "inputsMetadata": [
            {"id": str(place), "attrs": _pairs({"argument": ".".join(map(str, path))})}
            for place, (path, _) in enumerate(operands)
        ],
        "outputsMetadata": [{"id": str(value.index), "attrs": _pairs(_described(value))} for value in op.results],
    }
    if change:
        node["style"] = {"backgroundColor": COLOURS[change]}
    return node


def _described(value: Value) -> dict[str, str]:
    return {"__tensor_tag": value.name, "type": str(value.type)}


def _pairs(attrs: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in attrs.items()]
