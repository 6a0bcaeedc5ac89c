"""Patches that torch's own modules need for tracing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import transformer


@contextmanager
def masks_as_given() -> Iterator[None]:
    """Temporarily keeps `nn.Transformer` and its parts from comparing a mask with the causal mask.

    They read the values of a mask to select a faster kernel, which a trace cannot do, and which later calls of the
    graph must not rely on. The given mask is applied in either case.
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
    """Temporarily makes `module.to(...)` a no-op if nothing changes.

    Some models convert a layer in forward to the dtype that it already has. In eager mode that leaves the parameters
    alone; in a trace torch would replace them with converted ones, which fails.
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
