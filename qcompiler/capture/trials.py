"""Finds out what a call may omit or add, by running the model both ways.

    model(ids)                 and  model(ids, attention_mask=ones)   return the same: the mask may be added
    model(ids, mask, labels)   and  model(ids, mask)                  return the same logits: labels may be omitted

Results must be equal bit for bit, or in FP64 if kernels differ; token ids include padding if there is such a token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompiler.capture.comparison import same_values
from qcompiler.capture.examples import Call
from qcompiler.capture.huggingface import implied_arguments, pad_token
from qcompiler.capture.leeway import ANYTHING, VALUES, Leeway, OptionalTensor, without_outputs
from qcompiler.capture.runs import ModelRefused, Runs
from qcompiler.capture.signature import Signature, TensorSlot, linear
from qcompiler.ir import Effects, Graph, Value
from qcompiler.ir.sizes import Size, substitute, symbols

NEUTRAL: Mapping[str, str] = {
    "attention_mask": "ones", "decoder_attention_mask": "ones", "token_type_ids": "zeros", "position_ids": "positions",
}  # fmt: skip
"""Argument -> the value that is tested for being equivalent to omission."""

SIZE = "aten.sym_size.int"


def with_leeway(graph: Graph, signature: Signature, model: torch.nn.Module, call: Call) -> Signature:
    """Returns the signature with the arguments that, as runs of the model show, a call may omit or add.

    Args:
        graph: The captured graph.
        signature: Its calling convention.
        model: The captured model. It runs twice for each argument that may be optional.
        call: The user's example.
    """
    args, kwargs = call
    names = [name for name, _ in signature.parameters]
    named: Call = ((), {**dict(zip(names, args, strict=False)), **kwargs}) if len(args) <= len(names) else call
    trials = _Trials(graph, signature, model, named)
    written = {op["target"].name for op in graph.updates}
    widened = tuple(
        slot.name
        for slot in signature.slots
        if isinstance(slot, TensorSlot) and slot.name not in written and _is_integer(slot.dtype)
    )
    optional = (*trials.captured(written), *trials.added())
    spare = {item.name for item in optional if item.value == ANYTHING and not item.without}
    unread = {value.name for value in graph.inputs if all(user.name == SIZE for user in graph.users(value))}
    ignored = tuple(
        slot.name for slot in trials.slots if slot.name in unread and (slot.path in spare or trials.is_bound(slot.name))
    )
    return replace(signature, leeway=Leeway(implied_arguments(model, named[1]), optional, ignored, widened))


class _Trials:
    """Runs one model with and without its optional arguments."""

    def __init__(self, graph: Graph, signature: Signature, model: torch.nn.Module, call: Call) -> None:
        self.graph, self.signature, self.runs = graph, signature, Runs(graph, signature, model)
        self.defaults = dict(signature.parameters)
        self.slots = [slot for slot in signature.slots if isinstance(slot, TensorSlot)]
        self.tokens = next((slot for slot in self.slots if _is_integer(slot.dtype) and len(slot.shape) == 2), None)
        self.args, self.kwargs = call[0], _padded(call[1], self.tokens, pad_token(model))

    def is_bound(self, name: str) -> bool:
        """Whether the sizes of an input follow from the sizes of the others."""
        rest = [size for slot in self.slots if slot.name != name for size in slot.shape if linear(size) is not None]
        bound = {symbol for size in rest for symbol in symbols(size)}
        return all(symbols(size) <= bound for slot in self.slots if slot.name == name for size in slot.shape)

    def captured(self, written: set[str]) -> Iterator[OptionalTensor]:
        """Yields the captured tensors that a call may omit."""
        for slot in self.slots:
            name = slot.path
            if name not in self.kwargs or slot.name in written or self.defaults.get(name, self) is not None:
                continue
            shape = self.shape_without(slot)
            if shape is not None and (found := self.may_leave_out(slot, NEUTRAL.get(name, ANYTHING))) is not None:
                yield replace(found, shape=shape)

    def shape_without(self, slot: TensorSlot) -> tuple[Size, ...] | None:
        """Returns the sizes of an omitted argument's tensor; None if the other inputs do not define them."""
        if self.is_bound(slot.name):
            return slot.shape
        tokens = self.kwargs.get(self.tokens.path) if self.tokens is not None else None
        if (
            self.tokens is not None
            and isinstance(tokens, torch.Tensor)
            and tokens.shape == self.kwargs[slot.path].shape
        ):
            return self.tokens.shape  # a mask may have separate symbols
        if any(self.graph.users(value) for value in self.graph.inputs if value.name == slot.name):
            return None
        least = {name: max(1, bounds.low) for name, bounds in self.signature.symbols.items()}
        return tuple(substitute(size, least) for size in slot.shape)

    def added(self) -> Iterator[OptionalTensor]:
        """Yields the tensors that were not captured but that a call may add."""
        names = [name for name in NEUTRAL if self.defaults.get(name, self) is None and self.kwargs.get(name) is None]
        if self.tokens is None or not names or self.tokens.path not in self.kwargs:
            return
        tokens = self.kwargs[self.tokens.path]
        values = {name: _like(NEUTRAL[name], tokens) for name in names}
        if not self.agree(self.kwargs, {**self.kwargs, **values}):
            names = [
                name
                for name in names[len(names) == 1 :]
                if self.agree(self.kwargs, {**self.kwargs, name: values[name]})
            ]
        yield from (OptionalTensor(name, NEUTRAL[name], self.tokens.shape) for name in names)

    def may_leave_out(self, slot: TensorSlot, value: str) -> OptionalTensor | None:
        """Returns the value that omitting a captured tensor means; None if omitting it changes the result."""
        given, paths = self.kwargs[slot.path], self.signature.output_paths()
        rest = {name: other for name, other in self.kwargs.items() if name != slot.path}
        if value != ANYTHING:
            whole = {**rest, slot.path: _like(value, given)}
            return OptionalTensor(slot.path, value, slot.shape) if self.agree(rest, whole) else None
        dropped = self.outputs_fed_by(slot.name)
        if len(dropped) == len(paths) or not self.agree(rest, self.kwargs, dropped):
            return None
        return OptionalTensor(slot.path, value, slot.shape, tuple(path for path in paths if path in dropped))

    def outputs_fed_by(self, name: str) -> frozenset[str]:
        """Returns the paths of the outputs that depend on an input's entries; all of them if state depends on it."""
        paths = self.signature.output_paths()
        seen: set[Value] = set()
        stack = [value for value in self.graph.inputs if value.name == name]
        while stack:
            seen.add(value := stack.pop())
            for user in self.graph.users(value):
                if Effects.WRITES in user.effects:
                    return frozenset(paths)
                stack += [result for result in user.results if user.name != SIZE and result not in seen]
        return frozenset(path for path, value in zip(paths, self.graph.outputs, strict=True) if value in seen)

    def agree(self, fewer: Mapping[str, Any], more: Mapping[str, Any], dropped: frozenset[str] = frozenset()) -> bool:
        """Whether the model returns the same for two calls, except for outputs that only the second one has."""
        whole, paths = self.signature.out_spec, self.signature.output_paths()
        kept = [path for path in paths if path not in dropped]
        first = partial(self.values, fewer, kept, without_outputs(whole, paths, dropped) if dropped else whole)
        try:
            return same_values(first, partial(self.values, more, paths, whole), kept)
        except (ModelRefused, _OtherStructure):
            return False

    def values(
        self, kwargs: Mapping[str, Any], paths: Sequence[str], spec: pytree.TreeSpec, *how: Any
    ) -> dict[str, Any]:
        """Returns the model's results, by path."""
        leaves, found = pytree.tree_flatten(self.runs.returned((self.args, dict(kwargs)), *how))
        if found != spec:
            raise _OtherStructure
        return dict(zip(paths, leaves, strict=True))


class _OtherStructure(Exception):
    """The model returns a different structure than the graph."""


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _like(value: str, tensor: torch.Tensor) -> torch.Tensor:
    """Creates the tensor for a value name, with the shape, dtype and device of another tensor."""
    return VALUES[value](*tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _padded(kwargs: Mapping[str, Any], tokens: TensorSlot | None, pad: int | None) -> dict[str, Any]:
    """Returns the arguments with padding at the start of each sequence: some models derive a mask from padding."""
    if tokens is None or pad is None or not isinstance(given := kwargs.get(tokens.path), torch.Tensor):
        return dict(kwargs)
    given = given.clone()
    given[:, :1] = pad
    return {**kwargs, tokens.path: given}
