"""Graph -> the fx graph that it was imported from, changed in place: only new operations become new nodes.

%q, %s = kernel.fused_quantize(%x, %gain) {…}    ->    fused: qcompiler.fused_quantize([x, gain], …); getitem(fused, 0)
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from codegen.operator_calls import operator_arguments, operator_of
from qcompiler.dialects.aten import overload_of, to_torch
from qcompiler.errors import CodegenError
from qcompiler.inductor.fx_import import Imported, Read
from qcompiler.ir import Argument, Op, Value

VIEW_AS = "aten.view_as"


def export_fx(imported: Imported) -> None:
    """Makes the fx graph compute what the graph computes, in its order.

    Raises:
        CodegenError: No torch operator runs a new operation; the fx graph is then incomplete.
    """
    _Exporter(imported).run()


class _Exporter:
    def __init__(self, imported: Imported) -> None:
        self.source, self.graph, self.fx_graph = imported, imported.graph, imported.fx_graph
        self.end = self.fx_graph.output_node()
        self.held = dict(imported.held)
        self.fake_mode = detect_fake_mode([node.meta.get("val") for node in self.fx_graph.nodes])

    def run(self) -> None:
        """Visits the operations in order; each node, with its elements if it is a tuple, moves to the end."""
        elements = self.elements()
        for op in self.graph.ops():
            if (node := self.source.nodes.get(op)) is None:
                self.create(op)
                continue
            self.rewire(node, (value for _, value in op.operands()), self.source.reads[op])
            for each in (node, *elements.get(node, ())):
                self.end.prepend(each)
        self.rewire(self.end, self.graph.outputs, self.source.outputs)
        alive = {*self.graph.ops()}
        removed = [node for op, node in self.source.nodes.items() if op not in alive]
        for node in reversed(removed):
            for each in (*elements.get(node, ()), node):
                self.fx_graph.erase_node(each)
        self.fx_graph.lint()

    def elements(self) -> Mapping[fx.Node, Sequence[fx.Node]]:
        """Node with several results -> the nodes that pick one of them, without operations of the graph."""
        found: dict[fx.Node, list[fx.Node]] = {}
        operations = {*self.source.nodes.values()}
        for node in self.fx_graph.nodes:
            if node.target is operator.getitem and node not in operations:
                found.setdefault(node.args[0], []).append(node)
        return found

    def rewire(self, node: fx.Node, values: Iterable[Argument], reads: Sequence[Read]) -> None:
        """Replaces the inputs of a node for which passes have substituted other values."""
        for value, (before, old) in zip(values, reads, strict=True):
            if value is not before:
                if isinstance(old.meta["val"], tuple | list):
                    raise CodegenError("an operation reads a whole tuple, and a pass changed one of its elements",
                                       got=node.name)  # fmt: skip
                node.replace_input_with(old, self.argument(value))

    def create(self, op: Op) -> None:
        """Inserts the call of a new operation before the output."""
        target, args, kwargs = self.call(op)
        node = self.insert(target, args, kwargs)
        if len(op.results) == 1 and not isinstance(node.meta["val"], tuple | list):
            self.held[op.result] = node
            return
        for at, value in enumerate(op.results):
            self.held[value] = self.insert(operator.getitem, (node, at), {})

    def call(self, op: Op) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The torch function that runs an operation, and its arguments."""
        if (overload := operator_of(op)) is not None:
            return overload, tuple(map(self.argument, operator_arguments(op, overload._schema))), {}
        if op.name == VIEW_AS:  # Inductor lowers only what it decomposes to
            like = self.argument(op["other"])
            sizes = [
                size if isinstance(size, int) else self.insert(torch.ops.aten.sym_size.int, (like, axis), {})
                for axis, size in enumerate(op.result.tensor.shape)
            ]
            return torch.ops.aten.reshape.default, (self.argument(op["self"]), sizes), {}
        if not op.name.startswith("aten."):
            raise CodegenError("no torch operator runs this operation", got=op.name)
        attrs = {name: self.argument(arg) for name, arg in op.attrs.items()}
        return overload_of(op.name), tuple(map(self.argument, op.args)), attrs

    def argument(self, arg: Argument) -> Any:
        if isinstance(arg, Value):
            if arg not in self.held:  # an element of a tuple that no node has picked
                self.held[arg] = self.insert(operator.getitem, (self.source.nodes[arg.op], arg.index), {})
            return self.held[arg]
        return [self.argument(item) for item in arg] if isinstance(arg, tuple) else to_torch(arg)

    def insert(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """A call before the output, with the value that later passes of Inductor read."""
        with self.fx_graph.inserting_before(self.end):
            node = self.fx_graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda each: each.meta["val"])
        if self.fake_mode is None:
            node.meta["val"] = target(*values[0], **values[1])
        else:
            with self.fake_mode:
                node.meta["val"] = target(*values[0], **values[1])
        return node
