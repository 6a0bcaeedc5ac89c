"""Elements of stored tensors that follow a rule: constants, position numbers, triangles.

    position_ids = [[0, 1, 2, …]]                   element [b, i] is i
    bias = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]        element [q, k] is 1 if q - k >= 0, else 0

Models register such tensors as buffers. Their data is compared, element by element.
"""

import torch
from torch import Tensor

from passes.analyses.index_expressions import Element, Index, Number, constant
from passes.analyses.inequalities import negation, nonnegative


def stored_element(tensor: Tensor, at: Index) -> Element | None:
    """An element of a stored tensor at an index within its shape; None if its data follows no rule."""
    if tensor.is_meta or tensor.is_complex() or tensor.numel() == 0:
        return None
    first = tensor.flatten()[0]
    if bool((tensor == first).all()):
        return constant(first.item())
    if is_count(tensor):
        return constant(int(first) + at[-1])
    triangle = _triangle(tensor)
    if triangle is None:
        return None
    lower = nonnegative(at[-2] - at[-1])
    return Element(((lower, triangle[0]), (negation(lower), triangle[1])))


def is_count(tensor: Tensor) -> bool:
    """Whether integers count up by 1 along the last axis, from the same number in each row."""
    if tensor.is_floating_point() or tensor.dtype is torch.bool or not tensor.dim():
        return False
    numbers = torch.arange(tensor.shape[-1], device=tensor.device) + tensor.flatten()[0]
    return bool((tensor == numbers).all())


def _triangle(tensor: Tensor) -> tuple[Number, Number] | None:
    """The number on and below the diagonal, and the number above it, in each matrix; None if there are others."""
    if tensor.dim() < 2 or 1 in tensor.shape[-2:]:
        return None
    below = torch.ones(tensor.shape[-2:], dtype=torch.bool, device=tensor.device).tril()
    low, high = tensor[..., 0, 0].flatten()[0], tensor[..., 0, 1].flatten()[0]
    if not bool((tensor == torch.where(below, low, high)).all()):
        return None
    return _number(low), _number(high)


def _number(scalar: Tensor) -> Number:
    number = scalar.item()
    return int(number) if isinstance(number, bool) else number
