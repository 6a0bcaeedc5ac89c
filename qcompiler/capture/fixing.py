"""Replaces sizes that are numbers, or sums of other sizes, so that passes, kernels and messages see them.

A common number is the input of a classifier after a flattened image: torch gives its rows `s1*s2` columns, for the s1
and s2 that fit the weight; a kernel needs the number of columns of the weight.

A common sum is a mask with a cache. The model asks whether the mask is too short and whether it is too long, and torch
records both answers without combining them:

    mask: i64[s0, s3] where s3 >= s1 + s2, s3 <= s1 + s2   ->   mask: i64[s0, s1 + s2]
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from qcompiler.capture.signature import Condition, ConstantSlot, Signature, Slot, TensorSlot
from qcompiler.ir.graph import Graph
from qcompiler.ir.sizes import Expr, Size, evaluate, substitute, symbol, symbols
from qcompiler.ir.types import ScalarType, TensorType, Type

MIRRORED: Mapping[str, str] = {"<=": ">=", ">=": "<=", "<": ">", ">": "<", "==": "==", "!=": "!="}


def fixed(graph: Graph, signature: Signature) -> Signature:
    """Replaces each symbol whose range is a single number by that number, in `graph` and in the signature."""
    return _replaced(
        graph, signature, {s: bounds.low for s, bounds in signature.symbols.items() if bounds.low == bounds.high}
    )


def related(graph: Graph, signature: Signature) -> Signature:
    """Replaces each symbol that the conditions equate to a sum of others, in `graph` and in the signature."""
    while (found := next(_sums(signature), None)) is not None:
        name, total = found
        bounds = signature.symbols[name]
        kept = [Condition(">=", total, bounds.low)] if bounds.low > _least(total, signature) else []
        kept += [Condition("<=", total, bounds.high)] if bounds.high is not None else []
        signature = _replaced(graph, signature, {name: total})
        signature = replace(signature, conditions=(*signature.conditions, *kept))
    return signature


def _sums(signature: Signature) -> Iterator[tuple[str, Size]]:
    """Yields each symbol that equals a sum of others, with that sum."""
    known: dict[Size, set[str]] = {}
    for condition in signature.conditions:
        difference, relation = condition.left - condition.right, condition.relation
        if isinstance(difference, Expr) and difference.terms[0][1] < 0:
            difference, relation = -difference, MIRRORED[relation]
        known.setdefault(difference, set()).add(relation)
    for difference, relations in known.items():
        if "==" not in relations and not {"<=", ">="} <= relations:
            continue
        for name in reversed(list(signature.symbols)):
            if (total := _solution(difference, name)) is not None:
                yield name, total


def _solution(difference: Size, name: str) -> Size | None:
    """Solves `difference` = 0 for `name`; None unless the result is a sum without subtractions."""
    terms = difference.terms if isinstance(difference, Expr) else ()
    factor = next((factor for atoms, factor in terms if atoms == (name,)), 0)
    if abs(factor) != 1:
        return None
    total = symbol(name) - difference * factor
    if name in symbols(total) or (isinstance(total, Expr) and any(factor < 0 for _, factor in total.terms)):
        return None
    return total


def _least(size: Size, signature: Signature) -> int:
    return evaluate(size, {name: signature.symbols[name].low for name in symbols(size)})


def _replaced(graph: Graph, signature: Signature, sizes: Mapping[str, Size]) -> Signature:
    """Returns the signature with symbols replaced by `sizes`; changes the types of `graph` in place."""
    if not sizes:
        return signature
    for value in (*graph.inputs, *(value for op in graph for value in op.results)):
        value.type = _type(value.type, sizes)
    conditions = (
        replace(c, left=substitute(c.left, sizes), right=substitute(c.right, sizes)) for c in signature.conditions
    )
    left = {name: bounds for name, bounds in signature.symbols.items() if name not in sizes}
    graph.symbols = dict(left)
    return replace(
        signature,
        slots=tuple(_slot(slot, sizes) for slot in signature.slots),
        symbols=left,
        conditions=tuple(c for c in conditions if c.symbols and c.left != c.right),
    )


def _slot(slot: Slot, sizes: Mapping[str, Size]) -> Slot:
    if isinstance(slot, TensorSlot):
        return replace(slot, shape=tuple(substitute(size, sizes) for size in slot.shape))
    return slot if isinstance(slot, ConstantSlot) else replace(slot, value=_value(slot.value, sizes))


def _type(type: Type, sizes: Mapping[str, Size]) -> Type:
    if isinstance(type, TensorType):
        return TensorType(type.dtype, tuple(substitute(size, sizes) for size in type.shape))
    return ScalarType(type.kind, _value(type.value, sizes)) if isinstance(type, ScalarType) else type


def _value(value: Size | None, sizes: Mapping[str, Size]) -> Size | None:
    return None if value is None else substitute(value, sizes)
