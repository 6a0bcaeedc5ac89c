"""The parameters and results of an MLIR function, in order, with their names and types in the graph."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qcompiler.ir import Argument, Graph, Op, Type, Value
from qcompiler.ir.graph import BUFFER, PARAM


@dataclass(frozen=True)
class Parameter:
    """One argument of the function.

    Attributes:
        name: The name of the graph input, or the tensor's name in the weights store.
        type: Its type in the graph, with symbolic sizes.
        kind: "input", "weight", or "state" for a buffer that the model updates.
    """

    name: str
    type: Type
    kind: Literal["input", "weight", "state"]

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.type}"


@dataclass(frozen=True)
class Result:
    """One result of the function.

    Attributes:
        name: The name of the graph value; for an update, the name of the updated parameter.
        type: Its type in the graph, with symbolic sizes.
        kind: "output" or "update".
    """

    name: str
    type: Type
    kind: Literal["output", "update"]

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.type}"


@dataclass(frozen=True)
class Interface:
    """The parameters and results of a graph's function: inputs first, then weights and state; outputs, then updates."""

    parameters: tuple[Parameter, ...]
    results: tuple[Result, ...]


def interface_of(graph: Graph) -> Interface:
    """The interface of the function that a graph becomes."""
    inputs = [Parameter(value.name, value.type, "input") for value in graph.inputs]
    updated = {op["target"] for op in graph.updates}
    stored = [
        Parameter(str(op.attrs["name"]), op.result.type, "state" if op.result in updated else "weight")
        for op in stored_tensors(graph)
    ]
    outputs = [Result(value.name, value.type, "output") for value in output_values(graph)]
    updates = [Result(_stored_name(op["target"]), op["target"].type, "update") for op in graph.updates]
    return Interface((*inputs, *stored), (*outputs, *updates))


def stored_tensors(graph: Graph) -> list[Op]:
    """The operations that read the weights store, one for each name."""
    return list({str(op.attrs["name"]): op for op in graph.ops() if op.name in (PARAM, BUFFER)}.values())


def output_values(graph: Graph) -> list[Value]:
    """The values that the graph returns; a graph may also return literals."""
    return [value for output in graph.outputs for value in _values(output)]


def _values(argument: Argument) -> Iterator[Value]:
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, tuple):
        for item in argument:
            yield from _values(item)


def _stored_name(target: Value) -> str:
    return str(target.op.attrs["name"]) if target.op.name == BUFFER else target.name
