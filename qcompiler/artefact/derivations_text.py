"""How the weights that passes have made are computed from the model's, as JSON and back.

    [{"makes": {"fc1.weight_q": 0, "fc1.weight_s": 1}, "graph": ["func @part() -> …", …]}]

Weights that one graph makes together stand together: that they do is what tells whose scale is whose.
"""

from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from qcompiler.artefact.operators import check_operators
from qcompiler.artefact.strict_json import Node
from qcompiler.errors import ArtefactError, QCompilerError
from qcompiler.ir import Derivation, Graph, Type, Value
from qcompiler.ir.graph import PARAM


def derivations_to_json(derivations: Mapping[str, Derivation]) -> list[Any]:
    """All derivations; without locations, which the stages have."""
    groups: dict[Graph, dict[str, int]] = {}
    for name, derivation in derivations.items():
        groups.setdefault(derivation.graph, {})[name] = derivation.output
    return [{"makes": makes, "graph": graph.text(locations=False).splitlines()} for graph, makes in groups.items()]


def derivations_from_json(node: Node, compiled: Graph, trust: Collection[str]) -> dict[str, Derivation]:
    """What `derivations_to_json` gave; ArtefactError for anything else.

    Args:
        node: The JSON.
        compiled: The graph whose weights were made: each must be of the type that its derivation gives.
        trust: As for `load`.
    """
    found: dict[str, Derivation] = {}
    types = {str(op.attrs["name"]): op.result.type for op in compiled.ops(PARAM)}
    for item in node.items():
        graph = _graph(item["graph"], trust)
        for name, place in item["makes"].members():
            if name in found:
                place.wrong("one derivation for each weight")
            found[name] = Derivation(graph, _output(place, graph, types.get(name)))
    _check_order(found, node)
    return found


def _graph(node: Node, trust: Collection[str]) -> Graph:
    """A graph that computes constants."""
    text = "\n".join(line.text() for line in node.items())
    where = f"{node.file}, {node.place}"
    try:
        graph = Graph.parse(text, where)
        graph.verify()
    except QCompilerError as error:
        raise ArtefactError("a derivation of the artefact cannot be read", got=error, where=where) from None
    check_operators(graph, trust, where)
    if graph.inputs:
        raise ArtefactError("a derivation of the artefact has inputs", got=str(graph.inputs[0]), where=where)
    return graph


def _output(node: Node, graph: Graph, need: Type | None) -> int:
    """Which output of a graph is a weight; None for one that the compiled graph does not read any more."""
    if node.count() >= len(graph.outputs):
        node.wrong(f"the number of one of {len(graph.outputs)} outputs")
    made = graph.outputs[node.count()]
    if not isinstance(made, Value) or need not in (None, made.type):
        node.wrong(f"an output that is a tensor, as the weight is: {need}")
    return node.count()


def _check_order(derivations: Mapping[str, Derivation], node: Node) -> None:
    """ArtefactError when a weight would be made of itself."""
    try:
        TopologicalSorter({name: set(_sources(derivation.graph)) for name, derivation in derivations.items()}).prepare()
    except CycleError as error:
        circle = " <- ".join(error.args[1])
        raise ArtefactError("a weight of the artefact is made of itself", got=circle, where=str(node.file)) from None


def _sources(graph: Graph) -> Iterator[str]:
    return (str(op.attrs["name"]) for op in graph.ops(PARAM))
