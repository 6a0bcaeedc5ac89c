"""Calibration data as users provide it: tensors, tuples or dicts, one real call of the model each."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import chain, count
from typing import Any

import torch

from qcompiler.capture.signature import Signature
from qcompiler.errors import InputError, QCompilerError

Call = tuple[tuple[Any, ...], dict[str, Any]]
TARGETS = frozenset({"labels"})
"""Arguments that datasets include for training, which a model uses only to compute a loss."""

NEED = "an iterable of calls of the model: a tensor, a tuple of arguments, or a dict of arguments by name each"


class Batches:
    """Calls of a model; can be iterated as often as the source can.

    Args:
        source: Any iterable of tensors, tuples or lists of arguments, or dicts of arguments by name.
    """

    def __init__(self, source: Iterable[Any]) -> None:
        """Raises InputError if `source` is not an iterable of batches."""
        if isinstance(source, torch.Tensor | str | bytes | Mapping) or not isinstance(source, Iterable):
            fix = "Put the one batch into a list." if isinstance(source, torch.Tensor | Mapping) else None
            raise InputError("calibration has the wrong type", got=type(source).__name__, need=NEED, fix=fix)
        self.source = source

    def first(self) -> Call:
        """Returns the first call without consuming it."""
        source = iter(self.source)
        found = next(_numbered(source), None)
        if found is None:
            raise InputError("there is no calibration data", got="no batches", need="at least one batch")
        if source is self.source:
            self.source = chain([found[1]], source)
        return as_call(found[1], 0)

    def flattened(self, signature: Signature) -> Iterable[list[Any]]:
        """Returns the graph inputs, batch by batch; a one-time iterator only if the source is one."""
        kind = _SizedFlattened if isinstance(self.source, Sized) else _Flattened
        reading = kind(self.source, signature)
        return iter(reading) if isinstance(self.source, Iterator) else reading


class _Flattened:
    """A source, read through a signature."""

    def __init__(self, source: Iterable[Any], signature: Signature) -> None:
        self.source, self.signature = source, signature

    def __iter__(self) -> Iterator[list[Any]]:
        for index, batch in _numbered(self.source):
            args, kwargs = as_call(batch, index)
            try:
                inputs = self.signature.flatten(args, self.without_targets(kwargs))
            except InputError as error:
                error.where = f"batches[{index}] of the calibration" + (f", {error.where}" if error.where else "")
                raise
            yield list(inputs)

    def without_targets(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments without labels that the graph does not accept: they only affect the loss."""
        paths = {slot.path for slot in self.signature.slots}
        optional = {name for name, default in self.signature.parameters if default is None}
        return {name: value for name, value in kwargs.items() if name in paths or name not in optional & TARGETS}


class _SizedFlattened(_Flattened):
    """Batches of known number, for a progress bar."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)


def _numbered(source: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yields the batches and their numbers; InputError if the user's code that yields them fails."""
    batches = iter(source)
    for index in count():
        try:
            batch = next(batches)
        except StopIteration:
            return
        except QCompilerError:
            raise
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            raise InputError("the calibration data cannot be read", got=got, where=f"batches[{index}]") from error
        yield index, batch


def as_call(batch: Any, index: int | None = None) -> Call:
    """Returns the arguments in a batch, by its number if it is one of several; InputError if it has none."""
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    need = "a tensor, a tuple of arguments, or a dict of arguments by name"
    where = None if index is None else f"batches[{index}]"
    raise InputError("a call of the model has the wrong type", got=type(batch).__name__, need=need, where=where)
