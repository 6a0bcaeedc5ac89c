"""How a captured model is called: a user's arguments -> the graph's inputs, its outputs -> the user's structure."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompiler.errors import InputError, did_you_mean
from qcompiler.ir.graph import Range
from qcompiler.ir.sizes import Size, evaluate, symbols

AGAIN = "Capture the model again with an example of this size."

MISSING: Any = object()
"""A parameter of forward without a default value."""


@dataclass(frozen=True)
class TensorSlot:
    """A flat argument that is an input of the graph.

    Attributes:
        path: How the user would write it, such as `kwargs['input_ids']`.
        name: The graph input's name.
        dtype: Its element type.
        device: Where it must lie.
        shape: Its sizes, over the graph's symbols.
    """

    path: str
    name: str
    dtype: torch.dtype
    device: torch.device
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class NumberSlot:
    """A flat argument that is a number and an input of the graph; `value` is a symbol where it has one."""

    path: str
    name: str
    value: Size | None


@dataclass(frozen=True)
class ConstantSlot:
    """A flat argument that capture has burned in: None, a number, a string."""

    path: str
    value: Any


Slot = TensorSlot | NumberSlot | ConstantSlot


@dataclass(frozen=True)
class Condition:
    """A relation between sizes that decided which way the model's Python code went, such as `s0 > s2`."""

    relation: str
    left: Size
    right: Size

    def __str__(self) -> str:
        return f"{self.left} {self.relation} {self.right}"

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols on both sides."""
        return symbols(self.left) | symbols(self.right)

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether the relation is true; also when a symbol has no value."""
        if not self.symbols <= sizes.keys():
            return True
        return RELATIONS[self.relation](evaluate(self.left, sizes), evaluate(self.right, sizes))


RELATIONS: Mapping[str, Callable[[int, int], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """The calling convention of one captured entry.

    Attributes:
        in_spec: The structure of (args, kwargs).
        out_spec: The structure of what the model returns.
        slots: One for each leaf of `in_spec`, in order.
        symbols: The range of each symbolic size.
        parameters: The names of forward's parameters that can be given by position, with their default values.
        device: Where the model and its inputs lie; None when the model has no tensor at all.
        conditions: What the sizes must fulfil besides their ranges.
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    slots: tuple[Slot, ...]
    symbols: Mapping[str, Range]
    parameters: tuple[tuple[str, Any], ...]
    device: torch.device | None
    conditions: tuple[Condition, ...] = ()

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the graph's inputs, in order."""
        return tuple(slot.name for slot in self.slots if not isinstance(slot, ConstantSlot))

    def flatten(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        """The graph's inputs, in order, out of a call's arguments.

        An argument may be given by name where it was captured by position, and the other way round.

        Raises:
            InputError: The structure, a dtype, a device, a rank, a size or a burned-in value is not what was captured.
        """
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
        if spec != self.in_spec:
            leaves = self._rearranged(tuple(args), dict(kwargs or {}))
        inputs: list[Any] = []
        bindings: dict[str, int] = {}
        for slot, leaf in zip(self.slots, leaves, strict=True):
            if isinstance(slot, ConstantSlot):
                _check_constant(slot, leaf)
                continue
            inputs.append(leaf)
            if isinstance(slot, TensorSlot):
                _check_tensor(slot, leaf)
                for axis, size in enumerate(slot.shape):
                    self._bind(slot, axis, size, leaf.shape[axis], bindings)
            elif slot.value is not None:
                self._bind(slot, None, slot.value, leaf, bindings)
        self._check_rest(inputs, bindings)
        for condition in self.conditions:
            if not condition.holds(bindings):
                sizes = ", ".join(f"{symbol} = {bindings[symbol]}" for symbol in sorted(condition.symbols))
                problem = "the model would take another course for these sizes"
                raise InputError(problem, got=sizes, need=str(condition), fix=AGAIN)
        return inputs

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """What the model would return, out of the graph's outputs."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)

    def output_paths(self) -> list[str]:
        """Where each flat output stands in what the model returns, such as `['logits']`."""
        return [path or "the output" for path in leaf_paths(self.out_spec)]

    def _bind(self, slot: Slot, axis: int | None, size: Size, got: int, bindings: dict[str, int]) -> None:
        """Holds one size to its type: a fixed one must be equal, a symbol must be in range and the same everywhere."""
        if isinstance(size, int):
            if got != size:
                raise InputError(
                    f"{_named(slot, axis)} has another size than at capture", got=got, need=size, fix=AGAIN
                )
            return
        if (solved := solve(size, got)) is None:
            return
        symbol, value = solved
        if value is None:
            raise InputError(f"{_named(slot, axis)} does not have a size of the captured form", got=got, need=str(size))
        bounds = self.symbols.get(symbol, Range())
        if value < bounds.low or (bounds.high is not None and value > bounds.high):
            raise InputError(
                f"{_named(slot, axis)} is outside of the captured range",
                got=got,
                need=f"{size} with {symbol} in {bounds}",
                fix=AGAIN,
            )
        if bindings.setdefault(symbol, value) != value:
            raise InputError(
                f"{_named(slot, axis)} contradicts another input",
                got=got,
                need=evaluate(size, bindings),
                where=str(size),
            )

    def _check_rest(self, inputs: Sequence[Any], bindings: Mapping[str, int]) -> None:
        """The sizes that are no linear expression of one symbol, once all symbols have values."""
        slots = [slot for slot in self.slots if not isinstance(slot, ConstantSlot)]
        for slot, leaf in zip(slots, inputs, strict=True):
            for axis, size in enumerate(slot.shape if isinstance(slot, TensorSlot) else ()):
                if isinstance(size, int) or linear(size) is not None or not symbols(size) <= bindings.keys():
                    continue
                if (need := evaluate(size, bindings)) != leaf.shape[axis]:
                    raise InputError(
                        f"dimension {axis} of {slot.path} contradicts the other inputs",
                        got=leaf.shape[axis],
                        need=f"{size} = {need}",
                    )

    def _rearranged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The leaves of a call whose arguments are spelled otherwise than at capture: by name, in another order."""
        given = self._by_name(args, kwargs)
        wanted_args, wanted_kwargs = self.in_spec.children()
        names = self._positional(wanted_args.num_children)
        wanted = dict(zip(names, wanted_args.children(), strict=True))
        wanted.update(zip(wanted_kwargs.context or [], wanted_kwargs.children(), strict=True))
        defaults = dict(self.parameters)
        for name, value in list(given.items()):
            if name not in wanted and value is defaults.get(name, MISSING):
                del given[name]
            elif name not in wanted:
                raise InputError(f"the argument {name!r} was not given at capture", fix=did_you_mean(name, wanted))
        leaves: list[Any] = []
        for name, spec in wanted.items():
            value = given.get(name, defaults.get(name, MISSING))
            if value is MISSING:
                raise InputError(f"the argument {name!r} is missing", need=", ".join(wanted))
            part, got = pytree.tree_flatten(value)
            if got != spec:
                raise InputError(
                    f"the argument {name!r} has another structure than at capture", got=_brief(got), need=_brief(spec)
                )
            leaves += part
        return leaves

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = dict(zip(self._positional(len(args)), args, strict=True))
        if twice := sorted(given.keys() & kwargs.keys()):
            raise InputError(f"the argument {twice[0]!r} is given twice")
        return {**given, **kwargs}

    def _positional(self, count: int) -> list[str]:
        names = [name for name, _ in self.parameters][:count]
        return names + [f"args[{index}]" for index in range(len(names), count)]


def _named(slot: Slot, axis: int | None) -> str:
    """A number or a dimension of a tensor, in a message."""
    return slot.path if axis is None else f"dimension {axis} of {slot.path}"


def linear(size: Size) -> tuple[str, int, int] | None:
    """(symbol, factor, offset) for `factor*symbol + offset`; None for any other expression."""
    if isinstance(size, int):
        return None
    terms = [(atoms, factor) for atoms, factor in size.terms if atoms]
    offset = sum(factor for atoms, factor in size.terms if not atoms)
    if len(terms) != 1 or len(terms[0][0]) != 1:
        return None
    atom, factor = terms[0][0][0], terms[0][1]
    return (atom, factor, offset) if isinstance(atom, str) else None


def solve(size: Size, number: int) -> tuple[str, int | None] | None:
    """The symbol of a linear `size`, and the value that makes it `number` (None: no integer); None if not linear."""
    if (form := linear(size)) is None:
        return None
    symbol, factor, offset = form
    if factor == 1:
        return symbol, number - offset
    return symbol, (number - offset) // factor if (number - offset) % factor == 0 else None


def leaf_paths(spec: pytree.TreeSpec) -> list[str]:
    """Where each leaf of a structure stands, such as `['batch'][0]`.

    Read off the structure alone: containers such as a cache cannot be rebuilt around anything but tensors.
    """
    if spec.is_leaf():
        return [""]
    keys = spec.context if isinstance(spec.context, list | tuple) else ()
    named = len(keys) == spec.num_children and all(isinstance(key, str | int) for key in keys)
    names = [repr(key) for key in keys] if named else [str(index) for index in range(spec.num_children)]
    return [f"[{name}]{rest}" for name, child in zip(names, spec.children(), strict=True) for rest in leaf_paths(child)]


def _check_constant(slot: ConstantSlot, leaf: Any) -> None:
    if type(leaf) is not type(slot.value) or leaf != slot.value:
        got = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)
        raise InputError(
            f"{slot.path} is part of the captured graph and cannot change",
            got=got,
            need=repr(slot.value),
            fix="Capture the model again for the other value.",
        )


def _check_tensor(slot: TensorSlot, leaf: Any) -> None:
    if not isinstance(leaf, torch.Tensor):
        raise InputError(
            f"{slot.path} must be a tensor", got=repr(leaf), need=f"{slot.dtype} of rank {len(slot.shape)}"
        )
    if leaf.dtype != slot.dtype:
        raise InputError(f"{slot.path} has another dtype than at capture", got=leaf.dtype, need=slot.dtype)
    if leaf.device != slot.device:
        raise InputError(f"{slot.path} lies on another device than at capture", got=leaf.device, need=slot.device)
    if leaf.ndim != len(slot.shape):
        raise InputError(
            f"{slot.path} has another rank than at capture",
            got=tuple(leaf.shape),
            need=f"[{', '.join(map(str, slot.shape))}]",
        )


def _brief(spec: pytree.TreeSpec) -> str:
    """A structure on one line: `dict with keys a, b`, `list of 2`, `a leaf`."""
    if spec.is_leaf():
        return "one value"
    name = getattr(spec.type, "__name__", str(spec.type))
    if isinstance(spec.context, list) and all(isinstance(key, str) for key in spec.context):
        return f"{name} with {', '.join(spec.context) or 'nothing'}"
    return f"{name} of {spec.num_children}"
