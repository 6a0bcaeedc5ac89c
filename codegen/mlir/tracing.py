"""Traces a graph to torch.fx: core ATen only, weights as arguments, symbolic sizes, a source line for each node.

    %y = quant.linear(%x_q, %x_s, %w_q, %w_s) {…}      ->      sym_size, convert_element_type, view, mul, … , mm

Each operation runs on tensors without data, and its calls are recorded. Our operations are thereby decomposed into
their torch definitions, and scales stay ordinary values. Equal operations on equal types are recorded once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from codegen.mlir.examples import Examples
from codegen.mlir.interface import Interface, interface_of, output_values, stored_tensors
from codegen.mlir.meanings import MEANINGS
from codegen.mlir.reshaping import spell_out_views
from codegen.mlir.unsupported import OPERATION, Refusals
from qcompiler.dialects.aten import overload_of, to_torch
from qcompiler.errors import QCompilerError
from qcompiler.interpreter import makes_tensors
from qcompiler.ir import Argument, Graph, Op, Role, Value, map_tree
from qcompiler.ir.op_table import lookup

Table = Mapping[Any, Callable[..., Any]]
"""Torch operator -> its decomposition."""


@dataclass(frozen=True)
class Traced:
    """A graph in torch.fx.

    Attributes:
        graph: One placeholder for each parameter of the interface, and one output for each result.
        interface: Its parameters and results.
    """

    graph: FxGraph
    interface: Interface


def trace(graph: Graph, table: Table) -> Traced:
    """Records what a graph computes.

    Args:
        graph: Any legal graph; its weights are not read.
        table: Decompositions of torch operators.

    Raises:
        CodegenError: Some operations cannot be recorded; the message lists all of them.
    """
    refusals = Refusals("cannot be traced without data")
    interface = interface_of(graph)
    with torch.no_grad():
        built = _Builder(graph, Examples(graph), dict(table), refusals).build()
    refusals.check()
    return Traced(built, interface)


@dataclass(frozen=True)
class _Fragment:
    """One operation on operands of certain types, recorded."""

    module: GraphModule

    @property
    def results(self) -> Sequence[Any]:
        """Nodes of the fragment, or literals."""
        (returned,) = (node.args[0] for node in self.module.graph.nodes if node.op == "output")
        return returned  # type: ignore[no-any-return]  # a tuple: that is what `record` returns


class _Builder:
    """Appends the fragment of each operation to one graph."""

    def __init__(self, source: Graph, examples: Examples, table: Table, refusals: Refusals) -> None:
        self.source, self.examples, self.table, self.refusals = source, examples, table, refusals
        self.graph = FxGraph()
        self.made: dict[Value, Any] = {}
        self.updates: dict[Value, Any] = {}
        self.fragments: dict[str, _Fragment] = {}
        self.sizes: dict[Any, Node] = {}

    def build(self) -> FxGraph:
        """The whole graph."""
        stored = stored_tensors(self.source)
        for value in (*self.source.inputs, *(op.result for op in stored)):
            node = self.graph.placeholder(value.name.replace(".", "_"))
            node.meta["val"] = self.examples.of(value.type)
            self.made[value] = node
        by_name = {str(op.attrs["name"]): self.made[op.result] for op in stored}
        for op in self.source.ops():
            if op.role is Role.STATE:
                self.made[op.result] = by_name[str(op.attrs["name"])]
            elif op.role is Role.UPDATE:
                self.updates[op["target"]] = self.made[op["value"]]
            else:
                self.add(op)
        outputs = [self.made[value] for value in output_values(self.source)]
        self.graph.output((*outputs, *(self.updates[op["target"]] for op in self.source.updates)))
        self.graph.eliminate_dead_code()
        return self.graph

    def add(self, op: Op) -> None:
        """Appends the fragment of one operation; reports it if recording fails."""
        try:
            fragment = self.fragment(op)
        except Exception as error:  # torch raises arbitrary exceptions if data are missing
            self.refusals.add(op, error)
            self.made.update((value, self.stand_in(value)) for value in op.results)
            return
        operands = iter(self.operands(op))
        twins: dict[Node, Any] = {}
        for node in fragment.module.graph.nodes:
            if node.op == "placeholder":
                twins[node] = self.made[next(operands)]
            elif node.op == "call_function":
                twins[node] = self.copy(node, twins, op)
        results = (twins[result] if isinstance(result, Node) else result for result in fragment.results)
        self.made.update(zip(op.results, results, strict=True))

    def copy(self, node: Node, twins: Mapping[Node, Any], op: Op) -> Node:
        """A copy of a fragment's node in the whole graph; nodes for sizes are shared."""
        args, keywords = torch.fx.map_arg((node.args, node.kwargs), twins.__getitem__)
        is_size = isinstance(node.meta.get("val"), torch.SymInt)
        if is_size and (known := self.sizes.get((node.target, args))) is not None:
            return known
        twin = self.graph.call_function(node.target, args, keywords)  # type: ignore[arg-type]  # is callable here
        twin.meta = {"val": node.meta["val"], OPERATION: op}
        if op.loc.file:  # in the format that the importer expects
            twin.meta["stack_trace"] = f'File "{op.loc.file}", line {op.loc.line}, in {op.loc.module}'
        if is_size:
            self.sizes[node.target, args] = twin
        return twin

    def stand_in(self, value: Value) -> Node:
        """A placeholder of the declared type, so that later operations can be checked."""
        node = self.graph.placeholder("missing")
        node.meta["val"] = self.examples.of(value.type)
        return node

    def operands(self, op: Op) -> list[Value]:
        """The values that an operation reads and whose number is not known."""
        return [value for _, value in op.operands() if not isinstance(self.examples.of(value.type), int | None)]

    def fragment(self, op: Op) -> _Fragment:
        """The fragment of one operation; equal operations share it."""
        if op.written:
            raise QCompilerError("it writes state during the call, and a function of MLIR has no state")
        key = _key(op)
        if key not in self.fragments:
            self.fragments[key] = self.record(op)
        return self.fragments[key]

    def record(self, op: Op) -> _Fragment:
        function, operands = _meaning(op), self.operands(op)

        def run(*given: Any) -> tuple[Any, ...]:
            known = iter(given)

            def read(leaf: Any) -> Any:
                if not isinstance(leaf, Value):
                    return to_torch(leaf)
                return next(known) if leaf in operands else self.examples.of(leaf.type)

            args = [map_tree(read, arg) for arg in op.args]
            keywords = {key: map_tree(read, op.attrs[key]) for key in sorted(op.attrs)}
            if lookup(op.name) is None and makes_tensors(op):
                keywords.setdefault("device", torch.device("cpu"))
            out = function(*args, **keywords)
            several = isinstance(out, tuple | list)
            return tuple(out) if several else (out,)

        examples = [self.examples.fresh(value.type) for value in operands]
        with self.examples.mode, enable_python_dispatcher():
            module = make_fx(dispatch_functionalize(run), decomposition_table=self.table)(*examples)
            module.graph.eliminate_dead_code()
            spell_out_views(module.graph)
        self.examples.check_guards()
        fragment = _Fragment(module)
        self.check_results(op, fragment)
        return fragment

    def check_results(self, op: Op, fragment: _Fragment) -> None:
        """Checks recorded results against the types that the graph declares."""
        if len(fragment.results) != len(op.results):
            raise QCompilerError(
                "it returned a different number of results", got=len(fragment.results), need=len(op.results)
            )
        for value, result in zip(op.results, fragment.results, strict=True):
            got = result.meta["val"] if isinstance(result, Node) else result
            want = self.examples.of(value.type)
            if not _alike(got, want):
                raise QCompilerError(f"%{value.name} has a different type", got=got, need=value.type)


def _alike(got: Any, want: Any) -> bool:
    if isinstance(want, torch.Tensor):
        same = isinstance(got, torch.Tensor) and got.dtype == want.dtype and got.dim() == want.dim()
        return same and all(statically_known_true(a == b) for a, b in zip(got.shape, want.shape, strict=True))
    return want is None if got is None else bool(statically_known_true(got == want))


def _meaning(op: Op) -> Callable[..., Any]:
    definition = lookup(op.name)
    source = definition.implements or op.name if definition else op.name
    found = MEANINGS.get(source) or (definition.meaning if definition else overload_of(op.name))
    if found is None:
        raise QCompilerError("it has no implementation in torch")
    return found


def _key(op: Op) -> str:
    """Equal for operations that do the same to operands of the same types."""

    def show(leaf: Any) -> str:
        return str(leaf.type) if isinstance(leaf, Value) else repr(leaf)

    trees: list[tuple[str, Argument]] = [("", op.args), *sorted(op.attrs.items())]
    return f"{op.name} {[(name, map_tree(show, tree)) for name, tree in trees]}"
