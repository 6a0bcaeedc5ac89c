"""The weights store: name -> tensor, loaded on first read, shared between copies until one of them writes.

A store never copies or changes a tensor. A write by a pass replaces the entry in its own store only; other stores
keep the old tensor.

    model ──from_module──> Weights ──copy()──> Weights of a rewritten graph
              (views)         shares every tensor; a write affects only the store that wrote
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Protocol, runtime_checkable

import torch

from qcompiler.ir import TensorType
from qcompiler.numerics.dtypes import ir_dtype

Loader = Callable[[], torch.Tensor]
"""Creates a tensor when it is first read, for instance from a checkpoint file."""


@runtime_checkable
class Source(Protocol):
    """A loader that can read a part of its tensor, such as one over a file, without the rest."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """The element type of the tensor."""

    def __call__(self) -> torch.Tensor:
        """Reads the tensor."""

    def part(self, axis: int, start: int, size: int) -> "Source":
        """The source of the elements `start` to `start + size` along an axis."""


class _Entry:
    """One tensor or its loader; shared between copies of a store, so that a tensor is loaded once."""

    __slots__ = ("loader", "tensor")

    def __init__(self, source: torch.Tensor | Loader) -> None:
        self.tensor = source if isinstance(source, torch.Tensor) else None
        self.loader = None if isinstance(source, torch.Tensor) else source

    def read(self) -> torch.Tensor:
        if self.tensor is None:
            if self.loader is None:
                raise RuntimeError("the weight has neither a tensor nor a loader")
            self.tensor, self.loader = self.loader(), None
        return self.tensor

    def part(self, axis: int, start: int, size: int) -> "_Entry":
        """The entry of a part, read on demand; from a source, nothing else is read."""
        if self.tensor is None and isinstance(self.loader, Source):
            return _Entry(self.loader.part(axis, start, size))
        return _Entry(lambda: self.read().narrow(axis, start, size).clone(memory_format=torch.contiguous_format))


class Weights(MutableMapping[str, torch.Tensor]):
    """A mapping from names to tensors.

    Args:
        entries: Name -> tensor, or a function without arguments that loads it.
        ties: Groups of names for the same tensor of the model, as `tied_names` finds them. A group may contain names
            that are not in the store, such as the second name of an embedding that is also the head.
    """

    def __init__(
        self,
        entries: Mapping[str, torch.Tensor | Loader] | None = None,
        ties: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self._entries = {name: _Entry(source) for name, source in (entries or {}).items()}
        self._ties = dict(ties or {})

    @classmethod
    def from_module(cls, model: torch.nn.Module) -> "Weights":
        """Returns a store over the parameters and buffers of a model, tied ones under each of their names.

        The store holds detached views that share the model's memory, and does not keep the model alive.
        """
        return cls.from_tensors(named_tensors(model))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "Weights":
        """Returns a store over views of `tensors`; names that hold the same object are tied."""
        views = {id(tensor): tensor.detach() for tensor in tensors.values()}
        return cls({name: views[id(tensor)] for name, tensor in tensors.items()}, tied_names(tensors))

    @property
    def ties(self) -> Mapping[str, tuple[str, ...]]:
        """Name -> all names of the same parameter or buffer, itself included, for those with several names."""
        return dict(self._ties)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in memory: tied tensors count once, tensors not loaded yet do not count."""
        loaded = {id(e.tensor): e.tensor for e in self._entries.values() if e.tensor is not None}
        return sum(tensor.nbytes for tensor in loaded.values())

    def type_of(self, name: str) -> TensorType | None:
        """Returns the type of a weight; None if it is not known, because checking would load the weight."""
        entry = self._entries[name]
        known = entry.loader if isinstance(entry.loader, Source) else entry.tensor
        return None if known is None else TensorType(ir_dtype(known.dtype), tuple(known.shape))

    def copy(self) -> "Weights":
        """Returns a store that shares every tensor with this one; writes and deletions stay separate."""
        twin = Weights(ties=self._ties)
        twin._entries = dict(self._entries)
        return twin

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._entries[name].read()

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        """Replaces an entry; the name is then no longer tied."""
        self._untie(name)
        self._entries[name] = _Entry(tensor)

    def replace_later(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces an entry by a function of its tensor, which is called on first read; the name is no longer tied."""
        self._untie(name)
        old = self._entries[name]
        self._entries[name] = _Entry(lambda: change(old.read()))

    def cut_later(self, name: str, axis: int, start: int, size: int, new: str | None = None) -> None:
        """Replaces an entry by a part of its tensor, which is read on first use; the name is no longer tied.

        With `new`, the part is another entry, and this one stays.
        """
        self._untie(new or name)
        self._entries[new or name] = self._entries[name].part(axis, start, size)

    def load_later(self, sources: Mapping[str, Loader]) -> None:
        """Replaces tensors by loaders; names tied to one of `sources` stay tied, and share what is loaded."""
        made: dict[str, _Entry] = {}
        for name in self._entries:
            known = next((each for each in self._ties.get(name, (name,)) if each in sources), None)
            if known is not None:
                self._entries[name] = made.setdefault(known, _Entry(sources[known]))

    def load_apart(self) -> None:
        """Stops sharing with other stores the tensors that are not read yet and have a source."""
        own = {id(entry): _Entry(entry.loader) for entry in self._entries.values() if isinstance(entry.loader, Source)}
        self._entries = {name: own.get(id(entry), entry) for name, entry in self._entries.items()}

    def __delitem__(self, name: str) -> None:
        """Drops the reference to a tensor; its memory is freed if there are no other references."""
        del self._entries[name]
        self._untie(name)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # the inherited test would load the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<Weights: {len(self)} tensors, {self.nbytes} bytes in memory>"

    def _untie(self, name: str) -> None:
        rest = tuple(other for other in self._ties.pop(name, ()) if other != name)
        for other in rest:
            if len(rest) > 1:
                self._ties[other] = rest
            else:
                self._ties.pop(other, None)


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns all parameters and buffers of a model, non-persistent ones included, under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def tied_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """Returns name -> all names of the same object, for objects with several names.

    Only object identity counts: two tensors at one address may be different views, and addresses are reused after a
    tensor is freed.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}
