"""Decomposes simple composite operators in place, so that most graphs need not be traced a second time.

aten.reshape(x, [s0, s1, 576])   ->   aten.clone, aten._unsafe_view      (or aten.view, if the strides of x allow it)
aten.to.dtype(x, float32)        ->   aten._to_copy                      (or x)
aten.add_.Tensor(x, y)           ->   aten.add.Tensor

`ExportedProgram.run_decompositions` runs the whole program twice more, under functionalization. For a decoder of 30
layers that takes more than twice as long as torch.export itself. Programs whose in-place operators only write to
intermediate tensors do not need it.
"""

import operator
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import sympy
import torch
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qcompiler.capture.writes import Writes, layout

SIMPLE = frozenset(
    {
        "aten::__and__.Scalar", "aten::__and__.Tensor", "aten::__or__.Scalar", "aten::__or__.Tensor", "aten::concat",
        "aten::contiguous", "aten::diff", "aten::dropout", "aten::expand_as", "aten::feature_dropout",
        "aten::flatten.using_ints", "aten::float_power.Tensor_Scalar", "aten::greater.Scalar", "aten::greater.Tensor",
        "aten::less.Scalar", "aten::less.Tensor", "aten::max.other", "aten::min.other", "aten::movedim.int",
        "aten::movedim.intlist", "aten::mT", "aten::multiply.Scalar", "aten::multiply.Tensor", "aten::narrow",
        "aten::not_equal.Scalar", "aten::not_equal.Tensor", "aten::numpy_T", "aten::ravel", "aten::reshape",
        "aten::reshape_as", "aten::resolve_conj", "aten::resolve_neg", "aten::square", "aten::subtract.Scalar",
        "aten::subtract.Tensor", "aten::swapaxes", "aten::swapdims", "aten::to.device", "aten::to.dtype",
        "aten::to.dtype_layout", "aten::to.other", "aten::true_divide.Scalar", "aten::true_divide.Tensor",
        "aten::type_as", "aten::view_as",
    }
)  # fmt: skip
"""Composites made of primitives only; others may contain an operator that graphs keep whole, such as a convolution."""

HARMLESS = frozenset({"aten::detach_"})
"""In-place operators that change no data: the model's constants pass through them."""


class _Unfit(Exception):
    """The program needs more than this module supports."""


def inline(
    program: ExportedProgram, is_composite: Callable[[Any], bool], is_assertion: Callable[[Node], bool]
) -> Graph | None:
    """Returns a copy of the program's graph without composites; None if the program must be traced again.

    Args:
        program: The result of torch.export; unchanged.
        is_composite: Whether an operator must be decomposed.
        is_assertion: Whether a node only checks something.
    """
    writes = Writes(program.graph)
    if any(_needs_trace(node, is_composite, writes) and not is_assertion(node) for node in program.graph.nodes):
        return None
    try:
        with torch.no_grad():
            return _Copy(program.graph, is_composite, writes).made()
    except _Unfit:
        return None


def _needs_trace(node: Node, is_composite: Callable[[Any], bool], writes: Writes) -> bool:
    if node.op != "call_function":
        return node.op == "get_attr"
    if not isinstance(node.target, torch._ops.OpOverload):
        return isinstance(node.target, torch._ops.OperatorBase)
    name = _name(node.target)
    if node.target._schema.is_mutable:
        return name not in HARMLESS and writes.functional(node) is None
    return is_composite(node.target) and (name not in SIMPLE or "unbacked_bindings" in node.meta)


def _name(target: Any) -> str:
    return target.name().removesuffix(".default") if isinstance(target, torch._ops.OpOverload) else ""


class _Copy:
    """A graph copied node by node; `made_of` maps each original node to its copy."""

    def __init__(self, original: Graph, is_composite: Callable[[Any], bool], writes: Writes) -> None:
        self.original, self.is_composite, self.writes = original, is_composite, writes
        self.graph = Graph()
        self.made_of: dict[Node, Any] = {}
        self.sizes: dict[sympy.Expr, Node] = {}

    def made(self) -> Graph:
        """The finished graph."""
        for node in self.original.nodes:
            if _name(node.target) in HARMLESS:
                self.made_of[node] = self.made_of[node.args[0]]
            elif node.op == "call_function" and self.writes.functional(node) is not None:
                self._written(node)
            elif isinstance(node.target, torch._ops.OpOverload) and self.is_composite(node.target):
                self.made_of[node] = self._inlined(node, node.target)
            elif node.target is operator.getitem and isinstance(self.made_of[node.args[0]], tuple | list):
                self.made_of[node] = self.made_of[node.args[0]][node.args[1]]
            else:
                self._copied(node)
        return self.graph

    def _copied(self, node: Node) -> None:
        new = self.made_of[node] = self.graph.node_copy(node, lambda old: self.made_of[old])
        if node.op == "placeholder":
            new.name = (
                node.name
            )  # the signature refers to this name, which fx changes if it is a builtin, such as `input`
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            self.sizes.setdefault(value.node.expr, new)

    def _written(self, node: Node) -> None:
        new = self._inlined(node, self.writes.functional(node))
        if layout(new.meta["val"]) != layout(node.meta["val"]):
            raise _Unfit  # later operators may depend on the dtype and strides of the written tensor
        for same in self.writes.same(node):
            self.made_of[same] = new

    def _inlined(self, node: Node, target: Any) -> Any:
        args, kwargs = pytree.tree_map_only(Node, lambda arg: arg.meta["val"], (node.args, node.kwargs))
        mode = next((x.fake_mode for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)), None)
        if mode is None:
            raise _Unfit
        known = {id(arg.meta["val"]): self.made_of[arg] for arg in node.all_input_nodes}
        with mode, _Recorder(self, node.meta, known) as recorder:
            out = target(*args, **kwargs)
        return pytree.tree_map(recorder.node_of, out)

    def size(self, expression: sympy.Expr) -> Node:
        """Returns the node of a size: an existing one, or arithmetic on existing nodes."""
        if expression not in self.sizes:
            self.sizes[expression] = self._read(expression) if expression.is_Symbol else self._arithmetic(expression)
        return self.sizes[expression]

    def _arithmetic(self, expression: sympy.Expr) -> Node:
        if not (expression.is_Add or expression.is_Mul):
            raise _Unfit
        function = operator.add if expression.is_Add else operator.mul
        parts: list[Any] = [int(part) if part.is_Integer else self.size(part) for part in expression.args]
        return reduce(partial(self._applied, function), parts)  # type: ignore[no-any-return]  # at least two parts

    def _applied(self, function: Callable[[Any, Any], Any], left: Any, right: Any) -> Node:
        new = self.graph.call_function(function, (left, right))
        new.meta["val"] = function(*(part.meta["val"] if isinstance(part, Node) else part for part in (left, right)))
        return new

    def _read(self, symbol: sympy.Symbol) -> Node:
        """Returns a node that reads a symbol from an input."""
        for node in self.original.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                    new = self.graph.call_function(torch.ops.aten.sym_size.int, (self.made_of[node], axis))
                    new.meta["val"] = size
                    return new
        raise _Unfit


class _Recorder(TorchDispatchMode):
    """While active, records each operator that runs as a node of the copy."""

    def __init__(self, copy: _Copy, meta: Mapping[str, Any], known: dict[int, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's constructor is untyped
        self.copy, self.known = copy, known
        self.meta = {key: meta[key] for key in ("stack_trace", "nn_module_stack") if key in meta}
        self.alive: list[Any] = []  # keeps tensors alive, because ids are reused after a tensor is freed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs `func` and records it."""
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.device):  # a device query
            return out
        if not isinstance(out, torch.Tensor) or func._schema.is_mutable:
            raise _Unfit
        new_args, new_kwargs = pytree.tree_map(self.node_of, (args, dict(kwargs or {})))
        node = self.copy.graph.call_function(func, new_args, new_kwargs)
        node.meta = {**self.meta, "val": out}
        self.known[id(out)] = node
        self.alive.append(out)
        return out

    def node_of(self, value: Any) -> Any:
        """Returns the node of a tensor or size; anything else unchanged."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self.known:
                raise _Unfit
            return self.known[id(value)]
        return self.copy.size(value.node.expr) if isinstance(value, torch.SymInt) else value
