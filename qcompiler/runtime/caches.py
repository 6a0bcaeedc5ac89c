"""Key-value caches at run time: tensors on one device, allocated from their types.

caches = {name: allocate(type, device) for name, type in cache_types(graph).items()}
sum(type.bytes for type in cache_types(graph).values())     known before anything is allocated
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qcompiler.dialects.attention import reach_of
from qcompiler.ir import CacheType, Graph, Role
from qcompiler.numerics.dtypes import torch_dtype


@dataclass(frozen=True)
class Cache:
    """The keys and values of one attention layer; operations write to these tensors in place.

    Attributes:
        type: Element type and sizes.
        key: `[slots, heads, held, key]`, in the dtype of the elements or codes.
        value: `[slots, heads, held, value]`, likewise; a view of `key` if the type says that values are within it.
        key_scale: FP32 `[slots, heads, held]`; None if the cache has no format.
        value_scale: Likewise; `key_scale` itself if values are within the keys.
    """

    type: CacheType
    key: Tensor
    value: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, as operations and torch operators take them: key, value, and scales if there are any."""
        return [tensor for tensor in (self.key, self.value, self.key_scale, self.value_scale) if tensor is not None]


def allocate(type: CacheType, device: torch.device | str) -> Cache:
    """Returns a cache of zeros."""
    tensors = [torch.zeros(kind.shape, dtype=torch_dtype(kind.dtype), device=device) for kind in type.tensors]  # type: ignore[arg-type]  # sizes of caches are integers
    if type.within:
        key, *scales = tensors
        return Cache(type, key, key[..., : type.value], *scales * 2)
    return Cache(type, *tensors)


def cache_types(graph: Graph) -> dict[str, CacheType]:
    """Returns the caches that a graph reads, by name, in order."""
    return dict(_caches(graph))


class Ring(NamedTuple):
    """What a step must know of a cache that holds only the latest positions.

    Attributes:
        held: Positions that a slot holds.
        window: Latest positions that a token reads at most, its own included.
    """

    held: int
    window: int

    @property
    def chunk(self) -> int:
        """Largest number of tokens per row in one call."""
        return self.held - self.window + 1

    def keeps(self, start: int, written: int) -> bool:
        """Whether a token at position `start` finds what it reads if the positions before `written` were written."""
        return start == 0 or written - self.held <= max(start - self.window + 1, 0)


def rings(graph: Graph) -> list[Ring]:
    """Returns the different rings that a graph attends over."""
    found: dict[Ring, None] = {}
    for op in graph.ops():
        for _, value in op.operands():
            if isinstance(value.type, CacheType) and value.type.ring and (window := reach_of(op)) is not None:
                found[Ring(value.type.ring, window)] = None
    return list(found)


def _caches(graph: Graph) -> Iterator[tuple[str, CacheType]]:
    for op in graph.ops():
        if op.role is Role.STATE and isinstance(op.result.type, CacheType):
            yield str(op.attrs["name"]), op.result.type
