"""Inductor's fx graph -> Graph, with each node that our passes do not understand as one opaque operation.

    %mul: aten.mul.Tensor(embedding, rsqrt)              ->    %mul = aten.mul.Tensor(%embedding, %rsqrt)
    %quantize: qcompiler.quantize(mul, [1, 128], …)      ->    %q, %s = kernel.quantize(%mul) {format = #fp8_tile}
    %linear: qcompiler.scaled_linear(q, s, w, w_s, …)    ->    %linear = kernel.scaled_linear(%q, %s, %w, %w_s) {…}
    %attention: vllm.unified_attention(q, k, v, layer)   ->    %attention = fx.call(%q, %k, %v)

An operation that no pass changes becomes the same node again, with arguments that the graph does not show.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

import codegen.torch_ops  # noqa: F401  (registers the operators)
from qcompiler import numerics
from qcompiler.capture.locations import location_of
from qcompiler.capture.symbols import Symbols
from qcompiler.dialects.aten import TAGS, op_name
from qcompiler.dialects.fx import CALL, PURE
from qcompiler.ir import Argument, Format, Graph, Literal, Op, ScalarType, Tag, TensorType, Type, Value
from qcompiler.ir.types import NONE
from qcompiler.numerics.dtypes import IR_DTYPES, ir_dtype
from qcompiler.text import legal_name

CONVERT = "prims.convert_element_type"
OURS = "qcompiler"

TAG_NAMES = {tag: name for name, tag in TAGS.items()}

Made = Value | tuple[Value, ...] | None
"""The value of a node; several for a tuple or a list; None if the IR has no type for it."""

Read = tuple[Value, fx.Node]


@dataclass
class Imported:
    """A graph and the fx graph that it was made from.

    Attributes:
        fx_graph: The source.
        graph: One operation for each node that is not an input, the output, or an element of a tuple.
        nodes: Operation -> its node.
        reads: Operation -> its operands, in order, each with the node that holds it.
        outputs: The graph's outputs, each with the node that holds it.
        held: Value -> the node that holds it; a result of several has none if nothing reads it.
    """

    fx_graph: fx.Graph
    graph: Graph
    nodes: dict[Op, fx.Node] = field(default_factory=dict)
    reads: dict[Op, list[Read]] = field(default_factory=dict)
    outputs: list[Read] = field(default_factory=list)
    held: dict[Value, fx.Node] = field(default_factory=dict)


def import_fx(fx_graph: fx.Graph, name: str = "main") -> Imported:
    """Imports a functional fx graph whose nodes have `meta["val"]`, as after AOTAutograd."""
    return _Importer(fx_graph, name).run()


class _Importer:
    def __init__(self, fx_graph: fx.Graph, name: str) -> None:
        self.found = Imported(fx_graph, Graph(legal_name(name)))
        self.graph, self.symbols = self.found.graph, Symbols()
        self.made: dict[fx.Node, Made] = {}

    def run(self) -> Imported:
        for node in self.found.fx_graph.nodes:
            if node.op == "placeholder":
                kind = self.type(node.meta.get("val"))
                value = None if kind is None else self.graph.add_input(legal_name(node.name), kind)
                self.bind(node, value)
            elif node.op == "output":
                self.found.outputs = [*self.operands(node)]
                self.graph.set_outputs([value for value, _ in self.found.outputs])
            elif node.target is not operator.getitem or not self.picks(node):
                self.operation(node)
        self.graph.symbols = self.symbols.ranges({})
        return self.found

    def bind(self, node: fx.Node, value: Made) -> None:
        self.made[node] = value
        if isinstance(value, Value):
            self.found.held.setdefault(value, node)

    def picks(self, node: fx.Node) -> bool:
        """Binds an element of a tuple, if the tuple is known."""
        whole, index = node.args
        several = self.made[whole] if isinstance(whole, fx.Node) else None
        if not isinstance(several, tuple) or not isinstance(index, int):
            return False
        self.bind(node, several[index])
        return True

    def operation(self, node: fx.Node) -> None:
        """Imports a node as an operation with the operands that have types."""
        val = node.meta.get("val")
        several = isinstance(val, tuple | list)
        types = [self.type(part) for part in (val if several else [val])]  # type: ignore[union-attr]
        typed = [kind for kind in types if kind is not None] if None not in types else []
        spelled = self.spelled(node) if typed else None
        operands = [*self.operands(node)]
        name, args, attrs = spelled or (self.opaque(node), tuple(value for value, _ in operands), {})
        names = [legal_name(f"{node.name}.{at}" if several else node.name) for at in range(len(typed))]
        op = self.graph.append(name, *args, attrs=attrs, types=typed, names=names, loc=location_of(node))
        self.found.nodes[op] = node
        sources = dict(operands)
        self.found.reads[op] = [(value, sources[value]) for _, value in op.operands()]
        self.bind(node, None if not typed else tuple(op.results) if several else op.result)

    def operands(self, node: fx.Node) -> Iterator[Read]:
        """The values that a node reads, and the nodes that hold them."""
        for source in node.all_input_nodes:
            made = self.made[source]
            if isinstance(made, Value):
                yield made, source
            elif isinstance(made, tuple):  # the node reads a whole tuple
                yield from ((value, source) for value in made)

    def spelled(self, node: fx.Node) -> tuple[str, tuple[Argument, ...], dict[str, Argument]] | None:
        """A node as an operation that passes know; None if there is none, or an argument has no equivalent."""
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            return None
        name = op_name(target)
        try:
            args = tuple(self.argument(arg) for arg in node.args)
            attrs = {key: self.argument(arg) for key, arg in node.kwargs.items() if arg is not None}
        except KeyError:
            return None
        if name == CONVERT:
            return "aten._to_copy", args[:1], {"dtype": args[1]}
        if name == "qcompiler.quantize" and not attrs:
            _, block, dtype, profile, layout, *_ = node.args
            format = replace(numerics.format_of(block, dtype, profile), scale_layout=layout)  # type: ignore[arg-type]  # as its schema says
            return "kernel.quantize", (args[0], *args[5:]), {"format": format}
        if name == "qcompiler.scaled_linear" and not attrs:
            if not isinstance(args[0], Value) or not isinstance(args[0].tensor.shape[-1], int):
                return None  # the number of its scales is not known
            return "kernel.scaled_linear", args[: 5 if args[4] is not None else 4], _formats(node, args)
        return (name, args, attrs) if name.startswith("aten.") else None

    def opaque(self, node: fx.Node) -> str:
        """The operation for a node that passes know nothing about."""
        if any(self.made[source] is None for source in node.all_input_nodes if source.op != "placeholder"):
            return CALL  # the graph does not show what it reads
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            return PURE if target.namespace == OURS and not target._schema.is_mutable else CALL
        of_numbers = getattr(target, "__module__", "") == operator.add.__module__
        return PURE if node.op == "get_attr" or of_numbers else CALL

    def argument(self, arg: Any) -> Argument:
        """An argument of a node; KeyError if it has no equivalent."""
        if isinstance(arg, fx.Node):
            made = self.made[arg]
            if not isinstance(made, Value):
                raise KeyError(arg.name)
            return made
        if isinstance(arg, tuple | list):
            return tuple(map(self.argument, arg))
        if isinstance(arg, torch.dtype):
            return ir_dtype(arg) if arg in IR_DTYPES else _unknown(arg)
        if isinstance(arg, torch.memory_format | torch.layout):
            return Tag(TAG_NAMES[arg])
        literal: Literal = arg if arg is None or isinstance(arg, bool | int | float | str) else _unknown(arg)
        return literal

    def type(self, val: Any) -> Type | None:
        """The type of a node's value; None if the IR has none."""
        if isinstance(val, torch.Tensor):
            if val.dtype not in IR_DTYPES or val.layout is not torch.strided:
                return None
            return TensorType(ir_dtype(val.dtype), tuple(self.symbols.size(size) for size in val.shape))
        if isinstance(val, torch.SymInt):
            return ScalarType("int", self.symbols.value(val))
        if isinstance(val, bool | torch.SymBool):
            return ScalarType("bool")
        if isinstance(val, int):
            return ScalarType("int", val)
        return ScalarType("float") if isinstance(val, float | torch.SymFloat) else NONE if val is None else None


def _formats(node: fx.Node, args: Sequence[Argument]) -> dict[str, Argument]:
    """The attributes of a `scaled_linear`, which reads the scales of its activation in the layout that they have."""
    given: Any = node.args  # as its schema says
    x, w = (numerics.format_of(given[at + 5], given[2 * at].meta["val"].dtype) for at in (0, 1))
    written = args[1].op.attrs.get("format") if isinstance(args[1], Value) else None
    if isinstance(written, Format):
        x = replace(x, scale_layout=written.scale_layout)
    return {"out_dtype": args[7], "w_format": w, "x_format": x}


def _unknown(arg: Any) -> Any:
    raise KeyError(str(arg))
