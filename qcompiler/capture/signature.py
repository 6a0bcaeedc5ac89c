"""The calling convention of a captured model: arguments -> graph inputs, graph outputs -> the user's structure."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompiler.capture.arguments import COMPILE_WITHOUT, Added, how_to_convert, leaves_by_name
from qcompiler.capture.leeway import ANYTHING, Leeway, OptionalTensor, without_outputs
from qcompiler.errors import InputError
from qcompiler.ir.ranges import Range
from qcompiler.ir.sizes import Size, evaluate, symbols

AGAIN = "Capture the model again with an example of this size."


@dataclass(frozen=True)
class TensorSlot:
    """A flat argument that is a tensor input of the graph.

    Attributes:
        path: The argument as the user would write it, such as `kwargs['input_ids']`.
        name: The graph input's name.
        dtype: Its dtype.
        device: Its required device.
        shape: Its sizes, over the graph's symbols.
    """

    path: str
    name: str
    dtype: torch.dtype
    device: torch.device
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class NumberSlot:
    """A flat argument that is a number and an input of the graph; `value` is its symbol, if it has one."""

    path: str
    name: str
    value: Size | None


@dataclass(frozen=True)
class ConstantSlot:
    """A flat argument that capture fixed: None, a number, a string."""

    path: str
    value: Any


Slot = TensorSlot | NumberSlot | ConstantSlot


@dataclass(frozen=True)
class Condition:
    """A relation between sizes that selected a branch in the model's Python code, such as `s0 > s2`."""

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
        """Whether the relation is true; also if a side has no value: an unknown symbol, or a division by size 0."""
        if not self.symbols <= sizes.keys():
            return True
        try:
            left, right = evaluate(self.left, sizes), evaluate(self.right, sizes)
        except ZeroDivisionError:
            return True
        return RELATIONS[self.relation](left, right)


RELATIONS: Mapping[str, Callable[[int, int], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """The calling convention of a captured model.

    Attributes:
        in_spec: The structure of (args, kwargs).
        out_spec: The structure of the model's return value.
        slots: One for each leaf of `in_spec`, in order.
        symbols: The range of each symbolic size.
        parameters: Names and default values of forward's parameters that can be passed by position.
        device: The device of the model and its inputs; None if the model has no tensors.
        conditions: Relations that the sizes must meet besides their ranges.
        leeway: What a call may omit or add.
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    slots: tuple[Slot, ...]
    symbols: Mapping[str, Range]
    parameters: tuple[tuple[str, Any], ...]
    device: torch.device | None
    conditions: tuple[Condition, ...] = ()
    leeway: Leeway = field(default_factory=Leeway)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the graph's inputs, in order."""
        return tuple(slot.name for slot in self.slots if not isinstance(slot, ConstantSlot))

    def flatten(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        """Returns the graph's inputs for a call, in order; see `bind`."""
        return self.bind(args, kwargs)[0]

    def bind(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> tuple[list[Any], tuple[str, ...]]:
        """Returns the graph's inputs, in order, and the paths of outputs that the call does not have.

        Arguments captured by position may be passed by name, and vice versa; arguments that `leeway` allows may be
        omitted or added.

        Raises:
            InputError: The structure, a dtype, a device, a rank, a size or a fixed value differs from capture.
        """
        leaves, added = self._leaves(tuple(args), dict(kwargs or {}))
        inputs: list[Any] = []
        bindings: dict[str, int] = {}
        absent: list[tuple[int, TensorSlot, OptionalTensor]] = []
        for slot, leaf in zip(self.slots, leaves, strict=True):
            if isinstance(slot, ConstantSlot):
                _check_constant(slot, leaf, self.leeway)
                continue
            if isinstance(slot, TensorSlot) and (stand_in := self._stand_in(slot, leaf)) is not None:
                absent.append((len(inputs), slot, stand_in))
            elif isinstance(slot, TensorSlot):
                leaf = _checked_tensor(slot, leaf, slot.name in self.leeway.widened)
                for axis, size in enumerate(slot.shape):
                    self._bind(slot, axis, size, leaf.shape[axis], bindings)
            elif slot.value is not None:
                self._bind(slot, None, slot.value, leaf, bindings)
            inputs.append(leaf)
        for index, slot, optional in absent:
            inputs[index] = optional.make(bindings, slot.dtype, slot.device)
        self._check_rest(inputs, bindings)
        for optional, given in added:
            optional.check(given, bindings)
        return inputs, tuple(path for _, _, optional in absent for path in optional.without)

    def unflatten(self, outputs: Sequence[Any], without: Sequence[str] = ()) -> Any:
        """Converts the graph's outputs to the model's return value.

        Args:
            outputs: All outputs of the graph.
            without: Paths of the outputs that the call does not have, as `bind` returns them.
        """
        if not without:
            return pytree.tree_unflatten(list(outputs), self.out_spec)
        paths, dropped = self.output_paths(), frozenset(without)
        kept = [value for path, value in zip(paths, outputs, strict=True) if path not in dropped]
        return pytree.tree_unflatten(kept, without_outputs(self.out_spec, paths, dropped))

    def output_paths(self) -> list[str]:
        """Returns the path of each flat output in the model's return value, such as `['logits']`."""
        return [path or "the output" for path in leaf_paths(self.out_spec)]

    def _bind(self, slot: Slot, axis: int | None, size: Size, got: int, bindings: dict[str, int]) -> None:
        """Checks one size against its type: fixed sizes must be equal, symbols in range and equal everywhere."""
        if isinstance(size, int):
            if got != size:
                raise InputError(
                    f"{_named(slot, axis)} has a different size than at capture", got=got, need=size, fix=AGAIN
                )
            return
        if (solved := solve(size, got)) is None:
            return
        symbol, value = solved
        if value is None:
            raise InputError(f"{_named(slot, axis)} does not match the captured size", got=got, need=str(size))
        bounds = self.symbols.get(symbol, Range())
        if value < bounds.low or (bounds.high is not None and value > bounds.high):
            raise InputError(
                f"{_named(slot, axis)} is outside the captured range",
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
        """Checks sizes that are not linear in one symbol, once all symbols have values; and the conditions."""
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
        for condition in self.conditions:
            if not condition.holds(bindings):
                sizes = ", ".join(f"{symbol} = {bindings[symbol]}" for symbol in sorted(condition.symbols))
                problem = "the model would take a different branch for these sizes"
                raise InputError(problem, got=sizes, need=str(condition), fix=AGAIN)

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Added]:
        """Returns one leaf per slot, None for an omitted tensor; and the added arguments that must be checked."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec == self.in_spec:
            return leaves, []
        return leaves_by_name(self.in_spec, self.parameters, self.leeway, (args, kwargs))

    def _stand_in(self, slot: TensorSlot, leaf: Any) -> OptionalTensor | None:
        """Returns the replacement of an argument that is omitted, or whose entries are not read."""
        if slot.name in self.leeway.ignored and isinstance(leaf, torch.Tensor):
            return self.leeway.find(slot.path) or OptionalTensor(slot.path, ANYTHING, slot.shape)
        return self.leeway.find(slot.path) if leaf is None else None


def _named(slot: Slot, axis: int | None) -> str:
    """Names a number or a tensor dimension, for messages."""
    return slot.path if axis is None else f"dimension {axis} of {slot.path}"


def linear(size: Size) -> tuple[str, int, int] | None:
    """Returns (symbol, factor, offset) for `factor*symbol + offset`; None for any other expression."""
    if isinstance(size, int):
        return None
    terms = [(atoms, factor) for atoms, factor in size.terms if atoms]
    offset = sum(factor for atoms, factor in size.terms if not atoms)
    if len(terms) != 1 or len(terms[0][0]) != 1:
        return None
    atom, factor = terms[0][0][0], terms[0][1]
    return (atom, factor, offset) if isinstance(atom, str) else None


def solve(size: Size, number: int) -> tuple[str, int | None] | None:
    """Returns a linear size's symbol and its value for size `number` (None: not an integer); None if not linear."""
    if (form := linear(size)) is None:
        return None
    symbol, factor, offset = form
    if factor == 1:
        return symbol, number - offset
    return symbol, (number - offset) // factor if (number - offset) % factor == 0 else None


def leaf_paths(spec: pytree.TreeSpec) -> list[str]:
    """Returns the path of each leaf of a structure, such as `['batch'][0]`.

    Uses the structure alone: containers such as a cache can be rebuilt around tensors only.
    """
    if spec.is_leaf():
        return [""]
    keys = spec.context if isinstance(spec.context, list | tuple) else ()
    named = len(keys) == spec.num_children and all(isinstance(key, str | int) for key in keys)
    names = [repr(key) for key in keys] if named else [str(index) for index in range(spec.num_children)]
    return [f"[{name}]{rest}" for name, child in zip(names, spec.children(), strict=True) for rest in leaf_paths(child)]


def _check_constant(slot: ConstantSlot, leaf: Any, leeway: Leeway) -> None:
    if leeway.same_constant(slot.path, leaf, slot.value):
        return
    got = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)
    raise InputError(
        f"{slot.path} is part of the captured graph and cannot change",
        got=got,
        need=repr(slot.value),
        fix="Capture the model again with the other value.",
    )


def _checked_tensor(slot: TensorSlot, leaf: Any, widen: bool) -> Any:
    """Returns the tensor of a slot, in the captured dtype.

    Args:
        slot: The captured argument.
        leaf: The given argument.
        widen: Whether to convert integers of a narrower dtype.
    """
    if leaf is None:
        problem = f"the argument {slot.path!r} was given at capture, and the graph requires it"
        raise InputError(problem, need=f"{slot.dtype} of rank {len(slot.shape)}", fix=COMPILE_WITHOUT)
    if not isinstance(leaf, torch.Tensor):
        fix = how_to_convert(leaf)
        got = type(leaf).__name__ if fix else repr(leaf)
        raise InputError(
            f"{slot.path} must be a tensor", got=got, need=f"{slot.dtype} of rank {len(slot.shape)}", fix=fix
        )
    if leaf.dtype != slot.dtype:
        integers = not (leaf.dtype.is_floating_point or leaf.dtype.is_complex or leaf.dtype == torch.bool)
        if not (widen and integers and torch.promote_types(leaf.dtype, slot.dtype) == slot.dtype):
            fix = f"Convert it with .to({slot.dtype})." if integers else None
            problem = f"{slot.path} has a different dtype than at capture"
            raise InputError(problem, got=leaf.dtype, need=slot.dtype, fix=fix)
        leaf = leaf.to(slot.dtype)
    if leaf.device != slot.device:
        raise InputError(f"{slot.path} is on a different device than at capture", got=leaf.device, need=slot.device)
    if leaf.ndim != len(slot.shape):
        raise InputError(
            f"{slot.path} has a different rank than at capture",
            got=tuple(leaf.shape),
            need=f"[{', '.join(map(str, slot.shape))}]",
        )
    return leaf
