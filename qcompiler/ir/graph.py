"""A graph: one function with its weights, remarks, and text form.

Build it with `add_input`, `append` and `set_outputs`; change it with `insert`, `replace`, `erase`, which are defined in
`qcompiler.ir.structure`. This module adds weights, remarks, text, verification, export, and copies.
"""

from collections.abc import MutableMapping
from html import escape
from typing import Any, NamedTuple

import networkx as nx

from qcompiler.ir.dot import dot_of
from qcompiler.ir.op import Op, Value, map_tree, print_op
from qcompiler.ir.parser import parse_graph
from qcompiler.ir.printer import print_graph
from qcompiler.ir.structure import Structure
from qcompiler.ir.traits import Role
from qcompiler.ir.verifier import verify_graph

UPDATE = "core.update"
PARAM, BUFFER = "core.param", "core.buffer"


class Derivation(NamedTuple):
    """How a weight created by a pass is computed from others: a graph without inputs, and the output index."""

    graph: "Graph"
    output: int


class Graph(Structure):
    """One function. Build it with `add_input`, `append` and `set_outputs`; change it with `insert`, `replace`, `erase`.

    Attributes:
        weights: Name -> tensor for the parameters and buffers; empty in a graph without weights.
        derivations: Name -> how a weight created by a pass is computed from the model's weights.
        remarks: Value name -> remark of a pass; the pipeline runner collects and clears them.
        calibration: Statistics of its values on real inputs, see `qcompiler.calibration`; None before calibration.
    """

    def __init__(self, name: str = "main") -> None:
        super().__init__(name)
        self.weights: MutableMapping[str, Any] = {}
        self.derivations: dict[str, Derivation] = {}
        self.remarks: dict[str, str] = {}
        self.calibration: Any = None

    def remark(self, value: Value, text: str) -> None:
        """Records for the report what a pass did to a value, or why it did nothing."""
        known = self.remarks.get(value.name)
        self.remarks[value.name] = f"{known}; {text}" if known else text

    @property
    def updates(self) -> list[Op]:
        """The operations that write a buffer or an input at the end of the call."""
        return [op for op in self.ops() if op.role is Role.UPDATE]

    # Forms

    def clone(self, *, weights: bool = True) -> "Graph":
        """An independent copy of the structure; with `weights`, it shares tensors, derivations, and calibration."""
        copy = Graph(self.name)
        copy.symbols = dict(self.symbols)
        if weights:
            copy.weights = self.weights.copy() if hasattr(self.weights, "copy") else dict(self.weights)
            copy.calibration = self.calibration
            copy.derivations = dict(self.derivations)
        twin: dict[Value, Value] = {}
        made: dict[Op, Op] = {self.return_op: copy.return_op}
        for op in self:
            if op is not self.return_op:
                types, names = [value.type for value in op.results], [value.name for value in op.results]
                made[op] = copy.append(op.name, types=types, names=names, loc=op.loc)
                twin.update(zip(op.results, made[op].results, strict=True))

        def swap(leaf: object) -> object:
            return twin.get(leaf, leaf) if isinstance(leaf, Value) else leaf

        for op, double in made.items():
            copy.set_args(double, map_tree(swap, op.args), {key: map_tree(swap, arg) for key, arg in op.attrs.items()})
        copy.return_op.loc = self.return_op.loc
        return copy

    @classmethod
    def parse(cls, text: str, filename: str = "<text>") -> "Graph":
        """Parses a graph; raises ParseError with file:line:column if `text` is malformed."""
        graph = cls()
        parse_graph(text, filename, graph)
        return graph

    def text(self, *, locations: bool = True) -> str:
        """The text form; without `locations`, it is shorter and still parses."""
        return print_graph(self, locations=locations)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<Graph @{self.name}: {len(self)} operations>"

    def _repr_html_(self) -> str:
        """The text without locations, for notebooks; wide lines scroll."""
        return f'<pre style="white-space: pre; overflow-x: auto">{escape(self.text(locations=False))}</pre>'

    def verify(self, after: str = "") -> None:
        """Checks the rules of `qcompiler.ir.verifier`; raises VerifyError with the rule and the pass `after`."""
        verify_graph(self, self.weights, after)

    def to_networkx(self) -> "nx.MultiDiGraph[Op]":
        """A copy of the network, with the operations in order, for networkx to draw, walk or write.

        The graph has the attribute `name`. Each node is an operation with attributes `op` (itself), `name`, `index`
        (its position in the order), and `text` (its line). Each edge has attributes `value` (the name), `type`,
        `result` (result index in its source), and `path` (position in the arguments of its target).
        """
        net: nx.MultiDiGraph[Op] = nx.MultiDiGraph(name=self.name)
        for index, op in enumerate(self):
            net.add_node(op, op=op, name=op.name, index=index, text=print_op(op, locations=False))
        for op in self:
            for path, value in op.operands():
                net.add_edge(value.op, op, value=value.name, type=str(value.type), result=value.index, path=path)
        return net

    def to_dot(self, *, weights: bool = True) -> str:
        """The graph in Graphviz DOT, with modules as clusters; without `weights`, parameters are omitted."""
        return dot_of(self, weights=weights)
