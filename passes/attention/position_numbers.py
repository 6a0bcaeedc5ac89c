"""Gives a graph an input for position numbers, one for each token of each row, in place of numbers that it computes.

    %place = aten.arange(%n) : i64[s1]                                    (removed by dead-code)
    %row = aten.unsqueeze(%place, 0) : i64[1, s1]
    %x = aten.embedding(%w, %row) : f32[1, s1, 32]
  ->
    %x = aten.embedding(%w, %numbers) : f32[s0, s1, 32]

Values that had one row for the whole batch get one for each row of the batch, up to the operations that combine them
with tokens. The caller proves with `sequence.analyze` that the result still reads each token's own number.
"""

from collections.abc import Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor

from passes.analyses.arithmetic import VIEWS
from passes.analyses.sequence import Sequence
from qcompiler.dialects.aten import overload_of, to_torch
from qcompiler.errors import PassError
from qcompiler.ir import DType, Graph, Op, Role, ScalarType, Size, TensorType, Type, Value, evaluate, map_tree
from qcompiler.ir.op_table import infer_types, lookup
from qcompiler.numerics.dtypes import torch_dtype

SHAPED = ("aten.expand", *VIEWS)
"""Operations whose second argument is the shape of the result, where a batch of one row may be written as 1."""


def number_positions(graph: Graph, sequence: Sequence, numbers: Value, batch: Value) -> None:
    """Replaces the position numbers of a causal graph.

    Args:
        graph: The graph, changed in place.
        sequence: Its analysis.
        numbers: i64[batch, positions], the numbers from now on.
        batch: The size of the batch, a number.

    Raises:
        PassError: An operation cannot take one row of numbers for each row of the batch.
    """
    changed: set[Value] = set()
    for value, offset in sequence.positions.items():
        users = [user for user in graph.users(value) if not any(out in sequence.positions for out in user.results)]
        if users:
            new = _like(graph, value, offset, sequence, numbers)
            for user in users:
                graph.replace_in(user, value, new)
            changed.update({new} if new.type != value.type else ())
    for op in graph.ops():
        if any(value in changed for _, value in op.operands()):
            before = tuple(value.type for value in op.results)
            for value, type in zip(op.results, _types(graph, op, sequence, batch), strict=True):
                value.type = type
            changed.update(value for value, old in zip(op.results, before, strict=True) if value.type != old)


def _like(graph: Graph, value: Value, offset: int, sequence: Sequence, numbers: Value) -> Value:
    """The numbers plus `offset`, in the element type and the rank of `value`, inserted before its first user."""
    after, dtype, rank = graph.users(value)[0], value.tensor.dtype, len(value.tensor.shape)
    label, new, shape = sequence.labels[value], numbers, numbers.tensor.shape
    if offset:
        new = graph.insert(after, "aten.add.Tensor", new, offset, types=[new.type], names=[value.name]).result
    place = next(at for at, axis in enumerate(label.axes) if any(digit.kind == "positions" for digit in axis))
    for at in (*range(1, place), *range(max(place, 1) + 1, rank)):
        shape = (*shape[:at], 1, *shape[at:])
        types = [TensorType(DType.i64, shape)]
        new = graph.insert(after, "aten.unsqueeze", new, at, types=types, names=[value.name]).result
    if dtype is not DType.i64:
        types = [TensorType(dtype, shape)]
        attrs = {"dtype": dtype}
        new = graph.insert(after, "aten._to_copy", new, attrs=attrs, types=types, names=[value.name]).result
    return new


def _types(graph: Graph, op: Op, sequence: Sequence, batch: Value) -> tuple[Type, ...]:
    """The result types of an operation after the types of its operands changed."""
    if (definition := lookup(op.name)) is not None:
        return infer_types(op) if definition.types is not None else tuple(value.type for value in op.results)
    if not any(isinstance(value.type, TensorType) for value in op.results):  # sizes keep their types
        return tuple(value.type for value in op.results)
    types = _on_meta(graph, op, sequence.batch)
    if types is None and op.name in SHAPED and isinstance(shape := op.args[1], tuple) and 1 in shape:
        at = shape.index(1)
        graph.set_args(op, (op.args[0], (*shape[:at], batch, *shape[at + 1 :]), *op.args[2:]))
        types = _on_meta(graph, op, sequence.batch)
    if types is None:
        raise PassError(
            "an operation cannot take position numbers that differ between the rows of the batch",
            got=op,
            need="an operation that broadcasts them",
            where=str(op.loc) or None,
            fix="Capture the model with position_ids as an input, [batch, positions].",
        )
    return types


def _on_meta(graph: Graph, op: Op, batch: Size) -> tuple[Type, ...] | None:
    """The result types by torch's shape functions; None if it fails or if a size other than the batch changes."""
    primes = _primes()
    names = {name for value in (*op.results, *(v for _, v in op.operands())) for name in value.type.symbols}
    bound = {name: next(primes) for name in sorted(names | {str(batch)})}

    def made(leaf: Any) -> Any:
        if not isinstance(leaf, Value):
            return to_torch(leaf)
        if isinstance(leaf.type, TensorType):
            shape = [evaluate(size, bound) for size in leaf.type.shape]
            return torch.empty(shape, dtype=torch_dtype(leaf.type.dtype), device="meta")
        return evaluate(getattr(leaf.type, "value", None) or 0, bound)

    attrs = {key: map_tree(made, arg) for key, arg in op.attrs.items()}
    if "device" in attrs:
        attrs["device"] = torch.device("meta")
    try:
        out = overload_of(op.name)(*(map_tree(made, arg) for arg in op.args), **attrs)
    except (RuntimeError, IndexError, ValueError):
        return None
    results = out if isinstance(out, tuple | list) else (out,)
    types = [_retyped(value.type, one, bound, batch) for value, one in zip(op.results, results, strict=True)]
    return None if None in types else tuple(type for type in types if type is not None)


def _retyped(type: Type, now: Any, bound: Mapping[str, int], batch: Size) -> Type | None:
    """The type of a result that is known for one binding of the symbols: a 1 may have become the batch."""

    def size(old: Size, new: int) -> Size | None:
        if evaluate(old, bound) == new:
            return old
        return batch if (old, new) == (1, evaluate(batch, bound)) else None

    if isinstance(type, TensorType) and isinstance(now, Tensor):
        added = len(now.shape) - len(type.shape)
        sizes = [size(*pair) for pair in zip((1,) * added + type.shape, now.shape, strict=False)]
        shape = tuple(each for each in sizes if each is not None)
        return TensorType(type.dtype, shape) if len(shape) == len(now.shape) else None
    if isinstance(type, ScalarType) and type.value is not None and isinstance(now, int):
        value = size(type.value, now)
        return None if value is None else ScalarType(type.kind, value)
    return None


def _primes() -> Any:
    """Primes from 101 on: products of sizes stay different."""
    return (n for n in count(101, 2) if all(n % d for d in range(3, int(n**0.5) + 1, 2)))


def batch_and_length(graph: Graph, sequence: Sequence) -> tuple[Value, Value]:
    """The two sizes of the token ids as numbers, inserted below the weights."""
    top = next(op for op in graph if op.name != "core.input" and op.role is not Role.STATE)
    return _size(graph, top, sequence.ids, 0), _size(graph, top, sequence.ids, 1)


def _size(graph: Graph, before: Op, ids: Value, axis: int) -> Value:
    types = [ScalarType("int", ids.tensor.shape[axis])]
    return graph.insert(before, "aten.sym_size.int", ids, axis, types=types, names=[("batch", "length")[axis]]).result
