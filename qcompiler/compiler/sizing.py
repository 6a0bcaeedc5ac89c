"""Calls of a compiled model used only for their sizes: real calls, or inputs without data."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from codegen.launching.warmup import Blank
from qcompiler.capture.signature import ConstantSlot, Signature, TensorSlot
from qcompiler.errors import InputError, did_you_mean
from qcompiler.ir.sizes import Size, evaluate, symbols
from qcompiler.program.batches import as_call

USUAL_ROWS = tuple(1 << power for power in range(14))
"""Default numbers of rows, one for each range in which kernel selection differs: 1, 2, 4, … 8192."""


def calls_to_plan(
    signature: Signature, calls: Sequence[Any], rows: Iterable[int] | None, sizes: Mapping[str, int | Iterable[int]]
) -> list[list[Any]]:
    """Returns the graph inputs of each requested call; for `USUAL_ROWS` if none is requested.

    Args:
        signature: The signature of the model.
        calls: Real calls, each a tensor, a tuple of arguments, or a dict of arguments by name.
        rows: See `calls_of_rows`.
        sizes: See `calls_of_sizes`.
    """
    found = [signature.flatten(*as_call(call, index)) for index, call in enumerate(calls)]
    if sizes:
        found += calls_of_sizes(signature, sizes)
    if rows is not None or not found:
        found += calls_of_rows(signature, USUAL_ROWS if rows is None else rows)
    return found


def calls_of_sizes(signature: Signature, sizes: Mapping[str, int | Iterable[int]]) -> list[list[Any]]:
    """Returns one call for each combination of values of the free symbols; missing symbols take their minimum.

    Raises:
        InputError: A name is not a free symbol of the model, or no combination meets the model's conditions.
    """
    free = free_symbols(signature)
    if unknown := [name for name in sizes if name not in free]:
        raise InputError("the model has no such size", got=unknown[0], fix=did_you_mean(unknown[0], free))
    wanted = {name: _values(name, sizes.get(name, least(signature, name))) for name in free}
    combinations = [dict(zip(wanted, values, strict=True)) for values in product(*wanted.values())]
    return _calls(signature, combinations)


def calls_of_rows(signature: Signature, rows: Iterable[int]) -> list[list[Any]]:
    """Returns one call for each number of rows, such as tokens: one free symbol takes it, the others their minimum.

    The symbol is the last free one of the first input that has any: the sequence length of token ids, not the length
    of a cache after them. If the product of the other symbols exceeds 1, the number is divided by it. Numbers outside
    the model's ranges are clamped, and duplicate calls are dropped. A model without free sizes gets one call.
    """
    free = free_symbols(signature)
    if not free:
        return _calls(signature, [{}])
    last = _symbol_of_rows(signature) or free[-1]
    rest = {name: least(signature, name) for name in free if name != last}
    low, high = least(signature, last), signature.symbols[last].high
    wanted = [max(low, count // math.prod(rest.values())) for count in _values("rows", rows)]
    values = dict.fromkeys(value if high is None else min(value, high) for value in wanted)
    return _calls(signature, [rest | {last: value} for value in values])


def _symbol_of_rows(signature: Signature) -> str | None:
    """Returns the last free symbol of the first tensor that has one."""
    for slot in signature.slots:
        if isinstance(slot, TensorSlot) and (found := [name for size in slot.shape for name in sorted(symbols(size))]):
            return found[-1]
    return None


def free_symbols(signature: Signature) -> list[str]:
    """Returns the symbols that input sizes define, in order of appearance."""
    shapes = (size for slot in signature.slots if isinstance(slot, TensorSlot) for size in slot.shape)
    found = {name for size in (*shapes, *_numbers(signature)) for name in symbols(size)}
    return [name for name in signature.symbols if name in found]


def least(signature: Signature, symbol: str) -> int:
    """Returns the smallest value of a symbol for which inputs are not empty."""
    return max(signature.symbols[symbol].low, 1)


def _numbers(signature: Signature) -> list[Size]:
    values = (
        getattr(slot, "value", None) for slot in signature.slots if not isinstance(slot, TensorSlot | ConstantSlot)
    )
    return [value for value in values if value is not None]


def _values(name: str, given: int | Iterable[int]) -> list[int]:
    values = [given] if isinstance(given, int) else list(given)
    wrong = [value for value in values if not isinstance(value, int) or value < 0]
    if wrong or not values:
        raise InputError(f"{name} has a wrong value", got=wrong[0] if wrong else "none", need="one size or several")
    return values


def _calls(signature: Signature, combinations: Sequence[Mapping[str, int]]) -> list[list[Any]]:
    possible = [values for values in combinations if all(rule.holds(values) for rule in signature.conditions)]
    if not possible:
        need = ", ".join(map(str, signature.conditions))
        raise InputError("the model would take a different branch for these sizes", got=combinations[0], need=need)
    return [
        [_stand_in(slot, values) for slot in signature.slots if not isinstance(slot, ConstantSlot)]
        for values in possible
    ]


def _stand_in(slot: Any, values: Mapping[str, int]) -> Any:
    if isinstance(slot, TensorSlot):
        return Blank(tuple(evaluate(size, values) for size in slot.shape), slot.dtype, slot.device)
    return 1 if slot.value is None else evaluate(slot.value, values)
