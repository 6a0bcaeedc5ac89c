"""Sizes that turned out to be fixed become integers, so that passes and kernels see them as such.

A classifier behind a flattened image is the usual case: to torch, its rows have `s1*s2` columns for the s1 and s2 that
its weight happens to fit; to a kernel, they have as many as the weight.
"""

from collections.abc import Mapping
from dataclasses import replace

from qcompiler.capture.signature import ConstantSlot, Signature, Slot, TensorSlot
from qcompiler.ir.graph import Graph
from qcompiler.ir.sizes import Size, substitute
from qcompiler.ir.types import ScalarType, TensorType, Type


def fixed(graph: Graph, signature: Signature) -> Signature:
    """Replaces each symbol whose range is a single number by it, in the types of `graph` and in the signature."""
    numbers = {name: bounds.low for name, bounds in signature.symbols.items() if bounds.low == bounds.high}
    if not numbers:
        return signature
    for value in (*graph.inputs, *(value for op in graph for value in op.results)):
        value.type = _type(value.type, numbers)
    conditions = (
        replace(c, left=substitute(c.left, numbers), right=substitute(c.right, numbers)) for c in signature.conditions
    )
    return replace(
        signature,
        slots=tuple(_slot(slot, numbers) for slot in signature.slots),
        symbols={name: bounds for name, bounds in signature.symbols.items() if name not in numbers},
        conditions=tuple(condition for condition in conditions if condition.symbols),
    )


def _slot(slot: Slot, numbers: Mapping[str, int]) -> Slot:
    if isinstance(slot, TensorSlot):
        return replace(slot, shape=tuple(substitute(size, numbers) for size in slot.shape))
    return slot if isinstance(slot, ConstantSlot) else replace(slot, value=_value(slot.value, numbers))


def _type(type: Type, numbers: Mapping[str, int]) -> Type:
    if isinstance(type, TensorType):
        return TensorType(type.dtype, tuple(substitute(size, numbers) for size in type.shape))
    return ScalarType(type.kind, _value(type.value, numbers)) if isinstance(type, ScalarType) else type


def _value(value: Size | None, numbers: Mapping[str, int]) -> Size | None:
    return None if value is None else substitute(value, numbers)
