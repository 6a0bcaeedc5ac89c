"""Runs a graph op by op in plain torch; the reference for all passes and kernels.

A declared operation runs its torch definition; a torch operation runs as is. Nothing is compiled or fused.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from itertools import islice
from typing import Any

import torch

from qcompiler.dialects.aten import overload_of, to_torch
from qcompiler.dialects.coll import is_whole
from qcompiler.errors import InputError, QCompilerError
from qcompiler.ir import Argument, CacheType, Effects, Graph, Op, Role, Value, map_tree
from qcompiler.ir.dataflow import parameters_of, part_of
from qcompiler.ir.op_table import lookup
from qcompiler.runtime.caches import Cache, allocate

Observer = Callable[[Op, tuple[Any, ...]], None]


def interpret(
    graph: Graph,
    inputs: Sequence[Any],
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    updates: dict[str, torch.Tensor] | None = None,
    caches: Mapping[str, Cache] | None = None,
    observe: Observer | None = None,
    replaced: Mapping[Value, torch.Tensor] | None = None,
) -> tuple[Any, ...]:
    """Runs `graph` and returns its outputs.

    Args:
        graph: Any valid graph.
        inputs: One tensor or number for each graph input, in order.
        weights: Name -> tensor; defaults to the weights of the graph.
        updates: Receives the new values of the buffers and inputs that the graph writes, by value name.
            `weights` and `inputs` are not changed.
        caches: Name -> cache, changed in place; by default, the graph starts with empty caches.
        observe: Called with each operation and its results, in execution order.
        replaced: Results of operations -> tensors that their users read instead.

    Returns:
        The outputs, in order.

    Raises:
        InputError: The type or number of inputs is wrong, or a weight is missing.
        QCompilerError: An operation failed; the message names the operation and its source line.
    """
    if isinstance(inputs, torch.Tensor):
        raise InputError(f"the inputs of @{graph.name} are of a wrong type", got="a tensor", need="a list of inputs")
    if len(inputs) != len(graph.inputs):
        raise InputError(f"@{graph.name} takes {len(graph.inputs)} inputs", got=len(inputs), need=len(graph.inputs))
    store = graph.weights if weights is None else weights
    machine = _Machine(graph, dict(zip(graph.inputs, inputs, strict=True)), store, caches, observe, replaced or {})
    with torch.no_grad():
        for op in graph.ops():
            machine.step(op)
    if updates is not None:
        updates.update(machine.updates)
    return tuple(machine.read(arg) for arg in graph.outputs)


def evaluate(op: Op, graph: Graph) -> tuple[Any, ...]:
    """The results of a constant operation; loads only the weights that it depends on."""
    read = [str(param.attrs["name"]) for param in parameters_of(op.results[0])]
    names = read or islice(graph.weights, 1)  # any weight determines the device for literals
    return interpret(part_of(op), [], {name: graph.weights[name] for name in names})


class _Machine:
    """Holds the live values and runs one operation at a time."""

    def __init__(
        self,
        ops: Iterable[Op],
        values: dict[Value, Any],
        weights: Mapping[str, torch.Tensor],
        caches: Mapping[str, Cache] | None,
        observe: Observer | None,
        replaced: Mapping[Value, torch.Tensor],
    ) -> None:
        self.values, self.weights, self.caches, self.observe = values, weights, caches, observe
        self.replaced = replaced
        self.updates: dict[str, torch.Tensor] = {}
        self.written = {value for op in ops for value in op.written}
        self.uses_left = Counter(value for op in ops for _, value in op.operands())
        tensors = (value for value in values.values() if isinstance(value, torch.Tensor))
        first = next(tensors, None)
        if first is None:
            first = next(iter(weights.values()), None)
        self.device = first.device if first is not None else torch.device("cpu")

    def read(self, arg: Argument) -> Any:
        """The argument with each value replaced by its tensor or number."""
        return map_tree(lambda leaf: self.values[leaf] if isinstance(leaf, Value) else to_torch(leaf), arg)

    def step(self, op: Op) -> None:
        """Runs one operation and frees the values that have no remaining users."""
        results = self.run(op)
        if self.observe is not None:
            self.observe(op, results)
        if len(results) != len(op.results):
            raise QCompilerError(
                f"{op.name} returned a number of results that does not match the graph",
                got=len(results),
                need=len(op.results),
                where=str(op.loc) or None,
            )
        for value, result in zip(op.results, results, strict=True):
            self.values[value] = self.replaced.get(value, result)
        self.uses_left.subtract(value for _, value in op.operands())
        for value in (*(value for _, value in op.operands()), *op.results):
            if not self.uses_left[value]:
                self.values.pop(value, None)

    def run(self, op: Op) -> tuple[Any, ...]:
        """The results of one operation."""
        if op.role is Role.STATE:
            if isinstance(kind := op.result.type, CacheType):
                return ([*self.cache(str(op.attrs["name"]), kind), *map(self.read, op.args)],)
            return (self.state(op) if op.result in self.written else self.weight(op),)
        if op.role is Role.UPDATE:
            self.updates[op["target"].name] = self.read(op["value"])
            return ()
        if Effects.COMMUNICATES in op.effects and is_whole(op):
            return (self.read(op["x"]),)
        definition = lookup(op.name)
        function = definition.meaning if definition else overload_of(op.name)
        if function is None:
            raise QCompilerError("the operation has no torch definition to run", got=op.name)
        keywords = {key: self.read(arg) for key, arg in op.attrs.items()}
        if definition is None and makes_tensors(op):
            keywords.setdefault("device", self.device)
        try:
            out = function(*map(self.read, op.args), **keywords)
        except Exception as error:
            raise QCompilerError(f"{op.name} failed: {error}", where=str(op.loc) or None) from error
        if not op.results:
            return ()
        return tuple(out) if isinstance(out, tuple | list) and len(op.results) > 1 else (_only(out),)

    def cache(self, name: str, kind: CacheType) -> list[torch.Tensor]:
        """The tensors of a cache of the caller, or of a new one."""
        if self.caches is None:
            return allocate(kind, self.device).tensors
        if name not in self.caches or self.caches[name].type != kind:
            got = self.caches[name].type if name in self.caches else "no cache of this name"
            raise InputError(f"the cache {name!r} that the graph reads is missing", got=got, need=kind)
        return self.caches[name].tensors

    def state(self, op: Op) -> Any:
        """A copy of the state that later operations write, and that `updates` reports."""
        self.updates[op.result.name] = copy = deepcopy(self.weight(op))
        return copy

    def weight(self, op: Op) -> torch.Tensor:
        """The tensor of a parameter or buffer."""
        name = str(op.attrs["name"])
        if name not in self.weights:
            fix = "Pass the weights of this graph."
            raise InputError("a weight that the graph reads is missing", got=name, fix=fix)
        return self.weights[name]


def _only(out: Any) -> Any:
    """Unwraps a single result, which torch sometimes returns in a list or tuple."""
    return out[0] if isinstance(out, tuple | list) and len(out) == 1 else out


def makes_tensors(op: Op) -> bool:
    """Whether an operation creates a tensor without tensor operands, so it needs an explicit device."""
    from_tensor = any(hasattr(value.type, "dtype") for _, value in op.operands())
    return not from_tensor and _takes_device(op.name)


@cache
def _takes_device(name: str) -> bool:
    return any(argument.name == "device" for argument in overload_of(name)._schema.arguments)
