"""ExportedProgram -> Graph: each fx node becomes one operation; torch's literals, sizes and stack traces are converted.

The mapping:

placeholder   -> core.param, core.buffer (one that the model writes), or an input of the graph
call_function -> aten.*, or core.* for Python arithmetic on sizes; multiple results instead of getitem
output        -> core.update for each mutated buffer and input, then the return
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch._subclasses import FakeTensor
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind

from qcompiler.capture.answers import EXPECTED
from qcompiler.capture.decompositions import Functional, is_assertion
from qcompiler.capture.locations import is_model_code, location_of
from qcompiler.capture.stored_weights import STORED_WEIGHT
from qcompiler.capture.symbols import Symbols
from qcompiler.dialects.aten import TAGS, op_name
from qcompiler.dialects.core import SCALAR_FUNCTIONS
from qcompiler.errors import CaptureError
from qcompiler.ir.formats import Format
from qcompiler.ir.graph import BUFFER, PARAM, UPDATE, Graph
from qcompiler.ir.op import Argument, Literal, Tag, Value
from qcompiler.ir.traits import Effects, traits_of
from qcompiler.ir.types import NONE, ScalarType, TensorType, Type
from qcompiler.numerics.dtypes import IR_DTYPES, ir_dtype
from qcompiler.runtime.weights import Weights
from qcompiler.text import legal_name

TAG_NAMES = {tag: name for name, tag in TAGS.items()}
SCALAR_NAMES = {function: f"core.{name}" for name, function in SCALAR_FUNCTIONS.items()}
CONSTANTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
IDENTITIES = frozenset({"aten.alias", "aten.detach", "aten.lift_fresh", "aten.lift_fresh_copy", "aten.clone"})
"""Operators without meaning in a graph without mutation; clone only if it preserves the memory format."""


def import_program(
    program: Functional, weights: Weights, *, name: str = "main", roles: Mapping[str, str] | None = None
) -> tuple[Graph, Symbols]:
    """Imports a decomposed program as a graph.

    Args:
        program: Functional ATen, as `decompose` returns it.
        weights: The source of the tensors; the graph gets a store with those that it reads.
        name: The graph's name.
        roles: Weight name -> role, such as "output_embeddings".

    Returns:
        The graph, and the mapping from torch's symbols to ours.

    Raises:
        CaptureError: A graph cannot express a part of the program; the message gives the user's line.
    """
    importer = _Importer(program, weights, name, roles or {})
    importer.placeholders()
    for node in program.graph.nodes:
        if node in importer.live and node.op not in ("placeholder", "output"):
            importer.node(node)
    importer.output()
    importer.graph.symbols = importer.symbols.ranges(program.range_constraints)
    return importer.graph, importer.symbols


def device_of_program(program: Functional) -> torch.device | None:
    """Returns the device of a program's weights, or else of its inputs; None if it has no tensor."""
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return next((t.device for t in tensors if t.ndim), tensors[0].device if tensors else None)


def guards_of_program(program: Functional) -> list[sympy.Basic]:
    """Returns the relations between sizes that the model's own Python code checked, in torch's terms.

    Relations that torch's shape rules checked select strides, or repeat what the operators require.
    """
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
    env = next((v.fake_mode.shape_env for v in values if isinstance(v, FakeTensor)), None)
    return [env.simplify(guard.expr) for guard in env.guards if is_model_code(guard.sloc.framework_loc)] if env else []


class _Importer:
    """The state of one import: the graph so far, and the value of each fx node."""

    def __init__(self, program: Functional, weights: Weights, name: str, roles: Mapping[str, str]) -> None:
        self.program, self.weights, self.roles = program, weights, roles
        self.graph = Graph(legal_name(name))
        self.symbols = Symbols()
        self.device = device_of_program(program)
        self.made: dict[torch.fx.Node, Argument] = {}
        self.targets: dict[str, Value] = {}
        self.live = _live(program.graph, self._is_check)

    def _is_check(self, node: torch.fx.Node) -> bool:
        """Whether a node asserts something that symbol ranges do not cover."""
        if not self.program.checks or node.op != "call_function":
            return False
        name = str(node.target)
        return "assert_scalar" in name or ("assert_async" in name and str(node.args[1]).startswith(EXPECTED))

    # Inputs

    def placeholders(self) -> None:
        """Adds the inputs of the graph, in the user's order, then the weights that are used."""
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        nodes = [(node, specs[node.name]) for node in self.program.graph.nodes if node.op == "placeholder"]
        for node, spec in nodes:
            if spec.kind is InputKind.USER_INPUT:
                self._user_input(node, spec)
        written = {
            spec.target for spec in self.program.graph_signature.output_specs if spec.kind is OutputKind.BUFFER_MUTATION
        }
        kept: dict[str, torch.Tensor] = {}
        for node, spec in nodes:
            if spec.kind in CONSTANTS and (node in self.live or spec.target in written):
                kept[str(spec.target)] = self.weights[str(spec.target)]
                self._weight(node, str(spec.target), spec.target in written)
            elif spec.kind not in (*CONSTANTS, InputKind.USER_INPUT) and node in self.live:
                raise CaptureError(
                    "inputs of this kind are not supported in a graph", got=f"{node.name}: {spec.kind.name.lower()}"
                )
        self.graph.weights = Weights(kept, {name: ties for name, ties in self.weights.ties.items() if name in kept})

    def _user_input(self, node: torch.fx.Node, spec: InputSpec) -> None:
        if isinstance(spec.arg, ConstantArgument):
            self.made[node] = self._literal(spec.arg.value, node) if node.users else None
            return
        value = self.graph.add_input(legal_name(node.name), self._type(node.meta["val"], node))
        self.made[node] = self.targets[node.name] = value

    def _weight(self, node: torch.fx.Node, target: str, written: bool) -> None:
        attrs: dict[str, Argument] = {"name": target}
        if not written and target in self.roles:
            attrs["role"] = self.roles[target]
        kind = self._type(node.meta["val"], node)
        op = self.graph.append(BUFFER if written else PARAM, attrs=attrs, types=[kind], names=[legal_name(target)])
        self.made[node] = self.targets[target] = op.result

    # Operations

    def node(self, node: torch.fx.Node) -> None:
        """Imports one fx node as an operation, or maps it to an existing value."""
        if node.op == "get_attr":
            raise CaptureError(
                "a sub-graph or attribute remains after export", got=str(node.target), where=_where(node)
            )
        if node.target is operator.getitem and isinstance(made := self.made[_node(node.args[0])], tuple):
            self.made[node] = made[int(node.args[1])]  # type: ignore[arg-type]  # an index, as fx builds it
            return
        if isinstance(node.target, torch._ops.OpOverload):
            self._operation(node, node.target)
        elif node.target in SCALAR_NAMES:
            self._append(node, SCALAR_NAMES[node.target], [self._argument(arg, node) for arg in node.args], {})
        else:
            raise CaptureError("this operation is not supported in a graph", got=str(node.target), where=_where(node))

    def _operation(self, node: torch.fx.Node, overload: torch._ops.OpOverload) -> None:
        if self._is_check(node):
            self._check(node)
            return
        name = op_name(overload)
        schema = overload._schema.arguments
        args = []
        for index, arg in enumerate(node.args):
            if isinstance(arg, torch.device):
                self._check_device(arg, node)
                arg = None
            args.append(self._argument(arg, node))
            if schema[index].kwarg_only:
                raise CaptureError("a keyword-only argument is given by position", got=name, where=_where(node))
        attrs = {key: self._argument(arg, node) for key, arg in self._keywords(node).items()}
        source = self.made.get(node.args[0]) if node.args and isinstance(node.args[0], torch.fx.Node) else None
        if isinstance(source, Value) and self._is_identity(name, attrs, node, source):
            self.made[node] = source
            return
        if name == STORED_WEIGHT:
            codes, scale, block, dtype, *x_scale = args
            stored = {"format": Format(codes.tensor.dtype, block), "out_dtype": dtype}  # type: ignore[union-attr,arg-type]  # as its schema says
            known = {"x_scale": x_scale[0]} if x_scale and x_scale[0] is not None else {}
            self._append(node, "quant.dequantize", [codes, scale], {**stored, **known})
            return
        self._append(node, name, args, attrs)

    def _check(self, node: torch.fx.Node) -> None:
        """Imports a torch assertion as `core.expect`."""
        condition, message = node.args[:2]
        if isinstance(condition, torch.fx.Node):  # torch has resolved all others
            known = str(message).startswith(EXPECTED)
            text = str(message) if known else f"{EXPECTED}a size that depends on tensor values differs"
            loc = location_of(node)
            self.graph.append(
                "core.expect", self._argument(condition, node), attrs={"message": text}, types=[], loc=loc
            )

    def _keywords(self, node: torch.fx.Node) -> dict[str, Any]:
        """Returns the keyword arguments, without those that only repeat a default or the model's own device."""
        kept = {}
        for key, value in node.kwargs.items():
            if isinstance(value, torch.device):
                self._check_device(value, node)
            elif value is None or (key, value) in (
                ("pin_memory", False),
                ("layout", torch.strided),
                ("non_blocking", False),
            ):
                continue
            else:
                kept[key] = value
        return kept

    def _is_identity(self, name: str, attrs: Mapping[str, Argument], node: torch.fx.Node, source: Value) -> bool:
        # Keep a copy that the caller receives: otherwise the caller would hold the memory of an input.
        if any(user.op == "output" for user in node.users):
            return False
        plain = attrs in ({}, {"memory_format": Tag("preserve_format")})
        if name == "aten._to_copy":
            return attrs in ({}, {"dtype": source.tensor.dtype})
        return name in IDENTITIES and plain

    def _append(self, node: torch.fx.Node, name: str, args: list[Argument], attrs: Mapping[str, Argument]) -> None:
        value = node.meta.get("val")
        several = isinstance(value, tuple | list)
        parts = list(value) if isinstance(value, tuple | list) else [value]
        if value is None:  # an operation without results
            parts = []
        names = [f"{node.name}.{index}" for index in range(len(parts))] if several else [node.name] * len(parts)
        op = self.graph.append(
            name,
            *args,
            attrs=attrs,
            types=[self._type(part, node) for part in parts],
            names=map(legal_name, names),
            loc=location_of(node),
        )
        self.made[node] = op.results if several or not parts else op.result

    # Outputs

    def output(self) -> None:
        """Adds the updates, then the return."""
        values: Any = self.program.graph.output_node().args[0]
        outputs = []
        for spec, item in zip(self.program.graph_signature.output_specs, values, strict=True):
            value = self._argument(item, self.program.graph.output_node())
            if spec.kind is OutputKind.USER_OUTPUT:
                outputs.append(value)
            elif spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
                self.graph.append(UPDATE, self.targets[str(spec.target)], value, types=[])
            elif spec.kind is OutputKind.PARAMETER_MUTATION:
                fix = "If this happens in its first call only, call it once before capture; otherwise make it a buffer."
                raise CaptureError("the model changes a parameter in forward", got=spec.target, fix=fix)
            else:
                raise CaptureError(
                    "outputs of this kind are not supported in a graph", got=f"{spec.target}: {spec.kind.name.lower()}"
                )
        self.graph.set_outputs(outputs)

    # Types and literals

    def _type(self, value: Any, node: torch.fx.Node) -> Type:
        if isinstance(value, torch.Tensor):
            if value.dtype not in IR_DTYPES or value.layout is not torch.strided:
                raise CaptureError(
                    f"the type of {node.name} is not supported in a graph",
                    got=f"{value.dtype}, {value.layout}",
                    where=_where(node),
                )
            return TensorType(ir_dtype(value.dtype), tuple(self.symbols.size(n) for n in value.shape))
        if isinstance(value, bool | torch.SymBool):
            return ScalarType("bool")
        if isinstance(value, torch.SymInt):
            return ScalarType("int", self.symbols.value(value))
        if isinstance(value, int):
            return ScalarType("int", value)
        if isinstance(value, float | torch.SymFloat):
            return ScalarType("float")
        if value is None:
            return NONE
        raise CaptureError(f"{node.name} is not a tensor or a number", got=type(value).__name__, where=_where(node))

    def _argument(self, arg: Any, node: torch.fx.Node) -> Argument:
        if isinstance(arg, torch.fx.Node):
            made = self.made[arg]
            return made
        if isinstance(arg, tuple | list):
            return tuple(self._argument(item, node) for item in arg)
        return self._literal(arg, node)

    def _literal(self, value: Any, node: torch.fx.Node) -> Literal:
        if isinstance(value, torch.dtype):
            return ir_dtype(value)
        if isinstance(value, torch.memory_format | torch.layout) and value in TAG_NAMES:
            return Tag(TAG_NAMES[value])
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise CaptureError(
            "this argument is not supported in a graph", got=f"{type(value).__name__} {value}", where=_where(node)
        )

    def _check_device(self, device: torch.device, node: torch.fx.Node) -> None:
        if self.device is None or (device.type == self.device.type and device.index in (None, self.device.index)):
            return
        raise CaptureError(
            "the model names a device that it is not on",
            got=device,
            need=self.device,
            where=_where(node),
            fix="Create the tensor on the device of an input, such as torch.arange(n, device=x.device).",
        )


def _live(graph: torch.fx.Graph, is_check: Callable[[torch.fx.Node], bool]) -> set[torch.fx.Node]:
    """Returns the nodes that an output depends on; the others only compute sizes for assertions."""
    live: set[torch.fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live or _has_effect(node) or is_check(node):
            live.add(node)
            live.update(node.all_input_nodes)
    return live


def _has_effect(node: torch.fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or is_assertion(node):
        return False
    return bool(traits_of(op_name(node.target)).effects & (Effects.WRITES | Effects.COMMUNICATES))


def _node(arg: Any) -> torch.fx.Node:
    if not isinstance(arg, torch.fx.Node):
        raise TypeError(f"an fx node is needed, not {arg!r}")
    return arg


def _where(node: torch.fx.Node) -> str | None:
    return str(location_of(node)) or None
