"""Matches calls whose arguments differ from capture: by name, in another order, with more or fewer arguments."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompiler.capture.huggingface import cache_layers, lacks_memory
from qcompiler.capture.leeway import Leeway, OptionalTensor
from qcompiler.errors import InputError, did_you_mean

MISSING: Any = object()
"""A parameter of forward without a default value."""

COMPILE_WITH = "Omit it here, or compile with it among the example inputs."
COMPILE_WITHOUT = "To call without it, compile with example inputs that omit it."

ALLOCATE = "Allocate it first: cache.early_initialization(batch_size, num_heads, head_dim, dtype, device)."

Added = list[tuple[OptionalTensor, Any]]
"""Tensors that were not captured, and the values that they must have to change nothing."""


def leaves_by_name(
    spec: pytree.TreeSpec, parameters: Sequence[tuple[str, Any]], leeway: Leeway, call: tuple[Any, Any]
) -> tuple[list[Any], Added]:
    """Returns the leaves of a call in captured order, None for an omitted tensor; and the added arguments.

    Args:
        spec: The captured structure of (args, kwargs).
        parameters: Names and default values of forward's parameters.
        leeway: The arguments that may be omitted or added.
        call: The (args, kwargs) of the call.

    Raises:
        InputError: An argument is missing, has another structure, or was not captured and changes the result.
    """
    args, kwargs = call
    positional, named = spec.children()
    given = dict(zip(_names(parameters, len(args)), args, strict=True))
    if twice := sorted(given.keys() & kwargs.keys()):
        raise InputError(f"the argument {twice[0]!r} is given twice")
    given.update(kwargs)
    wanted = dict(zip(_names(parameters, positional.num_children), positional.children(), strict=True))
    wanted.update(zip(named.context or [], named.children(), strict=True))
    added = _added(given, list(wanted), dict(parameters), leeway)
    defaults = {**dict.fromkeys(leeway.implied), **dict(parameters)}
    leaves: list[Any] = []
    for name, part in wanted.items():
        value = given.get(name, defaults.get(name, MISSING))
        if value is MISSING:
            raise InputError(f"the argument {name!r} is missing", need=", ".join(wanted))
        leaves += _leaves(name, value, part)
    return leaves, added


def _added(given: Mapping[str, Any], wanted: Sequence[str], defaults: Mapping[str, Any], leeway: Leeway) -> Added:
    """Returns the arguments that were not captured and whose entries decide whether they change the result."""
    found: Added = []
    for name, value in given.items():
        if name in wanted or leeway.may_add(name, value, defaults.get(name, MISSING)):
            continue
        if (optional := leeway.find(name)) is not None:
            found.append((optional, value))
            continue
        problem = f"the argument {name!r} was not given at capture"
        if name not in defaults and name not in leeway.implied:
            raise InputError(problem, fix=did_you_mean(name, wanted))
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise InputError(problem, got=got, need=", ".join(wanted), fix=COMPILE_WITH)
    return found


def _leaves(name: str, value: Any, spec: pytree.TreeSpec) -> list[Any]:
    """Returns the leaves of one argument, checked against the captured structure."""
    leaves, got = pytree.tree_flatten(value)
    if got != spec:
        problem = f"the argument {name!r} has a different structure than at capture"
        found, wanted = _brief(got, value), _brief(spec, spec)
        same_class = got.type is spec.type and isinstance(got.context, Mapping)
        if same_class and (fields := list(_differences(got, spec, ""))):
            path, mine, captured = next((each for each in fields if not isinstance(each[2], Mapping)), fields[0])
            found, wanted = f"{path} = {mine!r}", f"{path} = {captured!r}"
        raise InputError(problem, got=found, need=wanted, fix=ALLOCATE if _is_empty(value) else how_to_convert(value))
    return leaves


def _is_empty(value: Any) -> bool:
    """Whether this is a cache of fixed length without memory, which the first call of the model would allocate."""
    return any(map(lacks_memory, cache_layers(value)))


def _differences(got: Any, want: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields fields in which two structures differ, such as a cache's `layers[0].batch_size`, with both values."""
    if isinstance(got, pytree.TreeSpec) and isinstance(want, pytree.TreeSpec):
        yield from _differences(got.context, want.context, path)
        for index, pair in enumerate(zip(got.children(), want.children(), strict=False)):
            yield from _differences(*pair, f"{path}[{index}]")
    elif isinstance(got, Mapping) and isinstance(want, Mapping):
        for key in (key for key in got if key in want):
            below = path if key == "s" else f"{path}.{key}".lstrip(".")  # transformers' name for an object's state
            yield from _differences(got[key], want[key], below)
    elif isinstance(got, list | tuple) and isinstance(want, list | tuple) and len(got) == len(want):
        for index, pair in enumerate(zip(got, want, strict=True)):
            yield from _differences(*pair, f"{path}[{index}]")
    elif got != want and path:
        yield path, got, want


def how_to_convert(value: Any) -> str | None:
    """Returns how to convert a value that is not a tensor; None if it cannot be converted."""
    if isinstance(value, Mapping):
        return "Pass its entries by name: model(**batch)."
    numbers = isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple | int | float)
    return "Convert it with torch.as_tensor." if numbers or hasattr(value, "__array__") else None


def _names(parameters: Sequence[tuple[str, Any]], count: int) -> list[str]:
    """Returns the names of the first positional arguments."""
    names = [name for name, _ in parameters][:count]
    return names + [f"args[{index}]" for index in range(len(names), count)]


def _brief(spec: pytree.TreeSpec, value: Any = None) -> str:
    """Describes a structure on one line: `dict with a, b`, `list of 2`, or the type of a single value."""
    if spec.is_leaf():
        return "one value" if value is spec or isinstance(value, torch.Tensor) else type(value).__name__
    name = getattr(spec.type, "__name__", str(spec.type))
    if isinstance(spec.context, list) and all(isinstance(key, str) for key in spec.context):
        return f"{name} with {', '.join(spec.context) or 'nothing'}"
    return f"{name} of {spec.num_children}"
