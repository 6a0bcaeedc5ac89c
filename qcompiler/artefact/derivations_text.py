"""Converts derivations of weights, from the model's own weights, to JSON and back.

    [{"makes": {"fc1.weight_q": 0, "fc1.weight_s": 1}, "graph": ["func @part() -> …", …]}]

Weights computed by one graph share an entry: this links codes to their scale.
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
    """Serializes all derivations, without locations, which are in the stages."""
    groups: dict[Graph, dict[str, int]] = {}
    for name, derivation in derivations.items():
        groups.setdefault(derivation.graph, {})[name] = derivation.output
    return [{"makes": makes, "graph": graph.text(locations=False).splitlines()} for graph, makes in groups.items()]


def derivations_from_json(node: Node, compiled: Graph, trust: Collection[str]) -> dict[str, Derivation]:
    """Parses the output of `derivations_to_json`. Raises ArtefactError for anything else.

    Args:
        node: The JSON.
        compiled: The graph that reads the weights; each must have the type that its derivation computes.
        trust: As for `load`.
    """
    found: dict[str, Derivation] = {}
    types = {str(op.attrs["name"]): op.result.type for op in compiled.ops(PARAM)}
    for item in node.items():
        graph = _graph(item["graph"], trust)
        for name, place in item["makes"].members():
            if name in found:
                place.wrong("one derivation per weight")
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
    """The index of the output that computes a weight. Without `need`, the compiled graph no longer reads the weight."""
    if node.count() >= len(graph.outputs):
        node.wrong(f"the number of one of {len(graph.outputs)} outputs")
    made = graph.outputs[node.count()]
    if not isinstance(made, Value) or need not in (None, made.type):
        node.wrong(f"an output that is a tensor, as the weight is: {need}")
    return node.count()


def _check_order(derivations: Mapping[str, Derivation], node: Node) -> None:
    """Raises ArtefactError if derivations are cyclic."""
    try:
        TopologicalSorter({name: set(_sources(derivation.graph)) for name, derivation in derivations.items()}).prepare()
    except CycleError as error:
        circle = " <- ".join(error.args[1])
        raise ArtefactError("a weight of the artefact depends on itself", got=circle, where=str(node.file)) from None


def _sources(graph: Graph) -> Iterator[str]:
    return (str(op.attrs["name"]) for op in graph.ops(PARAM))
