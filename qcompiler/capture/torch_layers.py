"""What torch's own transformer layers need to be traced."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
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
