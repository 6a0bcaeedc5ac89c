"""Checks indices before a GPU uses them: an index out of range kills the CUDA context, and the user's process.

The check of a captured graph tries sizes that the model may not support. On the CPU an index out of range raises; this
mode makes it raise on every device.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Indexed = Iterator[tuple[torch.Tensor, int, bool]]
"""(indices, number of addressable entries, whether negative indices count from the end)."""


class BoundsCheck(TorchDispatchMode):
    """While active, every operator that reads or writes by index raises IndexError if an index is out of range."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's constructor is untyped

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Checks the indices of `func`, then runs it."""
        if (indexed := INDEXED.get(func.overloadpacket.__name__)) is not None:
            for indices, size, from_end in indexed(args):
                _check(func, indices, size, from_end)
        return func(*args, **(kwargs or {}))


def _check(func: Any, indices: torch.Tensor, size: int, from_end: bool) -> None:
    if indices.dtype in (torch.bool, torch.uint8) or not indices.numel() or indices.is_meta:
        return
    low, high = (int(n) for n in torch.aminmax(indices))
    if low < (-size if from_end else 0) or high >= size:
        raise IndexError(f"{func}: indices from {low} to {high} are out of range for {size} entries")


def _rows(args: tuple[Any, ...]) -> Indexed:
    yield args[1], args[0].shape[0], False


def _along(args: tuple[Any, ...]) -> Indexed:
    if args[0].ndim:
        yield args[2], args[0].shape[args[1]], False


def _several(args: tuple[Any, ...]) -> Indexed:
    axis = 0
    for indices in args[1]:
        if indices is not None:
            yield indices, args[0].shape[axis] if axis < args[0].ndim else 0, True
        axis += indices.ndim if indices is not None and indices.dtype in (torch.bool, torch.uint8) else 1


def _flat(args: tuple[Any, ...]) -> Indexed:
    yield args[1], args[0].numel(), True


INDEXED: Mapping[str, Callable[[tuple[Any, ...]], Indexed]] = {
    **dict.fromkeys(("embedding",), _rows),
    **dict.fromkeys(
        (
            "gather", "index_select", "index_copy", "index_copy_", "index_add", "index_add_", "index_fill",
            "index_fill_", "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_",
        ),
        _along,
    ),
    **dict.fromkeys(("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"), _several),
    **dict.fromkeys(("take", "put", "put_"), _flat),
}  # fmt: skip
"""Operator -> its indices."""
