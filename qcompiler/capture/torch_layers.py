"""What torch's own modules need to be traced."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import transformer


@contextmanager
def masks_as_given() -> Iterator[None]:
    """Keeps `nn.Transformer` and its parts from comparing a mask with the causal one, for the duration.

    They look at the values of a mask to find a faster kernel, which a trace cannot do and another call of the captured
    graph must not rely on. The mask that is given is applied in either case.
    """
    before = transformer._detect_is_causal_mask

    def declared(mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    transformer._detect_is_causal_mask = declared
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = before


@contextmanager
def idle_conversions() -> Iterator[None]:
    """Makes `module.to(...)` do nothing where nothing changes, for the duration.

    Some models convert a layer to the dtype that it already has, in forward. Outside of a trace that leaves the
    parameters alone; in a trace torch would swap them for converted ones, which fails.
    """
    before = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, order = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*self.parameters(), *self.buffers()]
        placed = device is None or all(tensor.device == device for tensor in tensors)
        typed = dtype is None or all(tensor.dtype == dtype for tensor in tensors if tensor.is_floating_point())
        return self if placed and typed and order is None else before(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.to = before  # type: ignore[method-assign]
