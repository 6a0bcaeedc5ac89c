"""Key-value caches at run time: tensors on one device, allocated from their types.

caches = {name: allocate(type, device) for name, type in cache_types(graph).items()}
sum(type.bytes for type in cache_types(graph).values())     known before anything is allocated
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.ir import CacheType, Graph, Role
from qcompiler.numerics.dtypes import torch_dtype


@dataclass(frozen=True)
class Cache:
    """The keys and values of one attention layer; operations write to these tensors in place.

    Attributes:
        type: Element type and sizes.
        key: `[slots, heads, capacity, key]`, in the dtype of the elements or codes.
        value: `[slots, heads, capacity, value]`, likewise.
        key_scale: FP32 `[slots, heads, capacity]`; None if the cache has no format.
        value_scale: Likewise.
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
    return Cache(type, *tensors)


def cache_types(graph: Graph) -> dict[str, CacheType]:
    """Returns the caches that a graph reads, by name, in order."""
    return dict(_caches(graph))


def _caches(graph: Graph) -> Iterator[tuple[str, CacheType]]:
    for op in graph.ops():
        if op.role is Role.STATE and isinstance(op.result.type, CacheType):
            yield str(op.attrs["name"]), op.result.type
