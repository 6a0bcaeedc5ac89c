"""Splits tensors into blocks of their last two dimensions, and joins them again."""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from qcompiler.ir.formats import ALL


def into_blocks(x: Tensor, block: Sequence[int]) -> Tensor:
    """`[..., M, K]` -> `[..., ceil(M / rows), rows, ceil(K / columns), columns]`; a view unless padding is needed.

    A block has at least one element, so amax exists; `ALL` of an empty axis is padded to one zero.
    """
    rows, columns = block
    x = x.unsqueeze(0) if x.dim() == 1 else x
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if rows == ALL else x
    *lead, m, k = x.shape
    (down, rows), (across, columns) = _cut(m, rows), _cut(k, columns)
    if _is_ragged(m, block[0]) or _is_ragged(k, block[1]):
        x = functional.pad(x, (0, across * columns - k, 0, down * rows - m))
    return x.reshape(*lead, down, rows, across, columns)


def _cut(length: int, size: int) -> tuple[int, int]:
    """The number of blocks of `size` that cover an axis, and the length of each."""
    if size == ALL:
        return 1, 1 if isinstance(length, int) and length == 0 else length
    return _ceil_div(length, size), size


def _is_ragged(length: int, size: int) -> bool:
    """Whether an axis must be padded; a symbolic axis always is, because testing divisibility would add a guard."""
    if not isinstance(length, int):
        return size not in (1, ALL)
    return length == 0 if size == ALL else length % size != 0


def out_of_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """The inverse of `into_blocks`: removes the padding; contiguous, in the shape of `like`."""
    *lead, down, rows, across, columns = blocks.shape
    flat = blocks.reshape(*lead, down * rows, across * columns)
    if like.dim() == 1:
        return flat[0, : like.shape[0]].contiguous()
    height = like.shape[-2] if lead or like.dim() == 2 else math.prod(like.shape[:-1])
    return flat[..., :height, : like.shape[-1]].reshape(like.shape).contiguous()


def spread(scale: Tensor, like: Tensor) -> Tensor:
    """Reshapes the scales of `like` to broadcast over its blocks."""
    return (scale.unsqueeze(0) if like.dim() == 1 else scale).unsqueeze(-2).unsqueeze(-1)


def describe(tensor: Tensor) -> str:
    """The dtype and shape of a tensor, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _ceil_div(size: int, by: int) -> int:
    return -(-size // by)
