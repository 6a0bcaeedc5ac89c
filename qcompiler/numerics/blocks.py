"""Tensors cut into blocks of their last two dimensions, and put together again."""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from qcompiler.ir.formats import ALL


def into_blocks(x: Tensor, block: Sequence[int]) -> Tensor:
    """`[..., M, K]` -> `[..., ceil(M / rows), rows, ceil(K / columns), columns]`; a view where nothing is ragged.

    A block has one element at least, so that there is an amax; one that is `ALL` of nothing is a zero.
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
    """How many blocks of `size` cover an axis, and how long each is."""
    if size == ALL:
        return 1, 1 if isinstance(length, int) and length == 0 else length
    return _ceil_div(length, size), size


def _is_ragged(length: int, size: int) -> bool:
    """Whether an axis must be padded; a symbolic one is padded unasked, since whether it divides would be a guard."""
    if not isinstance(length, int):
        return size not in (1, ALL)
    return length == 0 if size == ALL else length % size != 0


def out_of_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """The inverse of `into_blocks`, without the padding, in the shape of `like`; contiguous."""
    *lead, down, rows, across, columns = blocks.shape
    flat = blocks.reshape(*lead, down * rows, across * columns)
    if like.dim() == 1:
        return flat[0, : like.shape[0]].contiguous()
    height = like.shape[-2] if lead or like.dim() == 2 else math.prod(like.shape[:-1])
    return flat[..., :height, : like.shape[-1]].reshape(like.shape).contiguous()


def spread(scale: Tensor, like: Tensor) -> Tensor:
    """The scales of `like` in the shape of its blocks, with ones for the rows and columns of a block."""
    return (scale.unsqueeze(0) if like.dim() == 1 else scale).unsqueeze(-2).unsqueeze(-1)


def describe(tensor: Tensor) -> str:
    """The dtype and the shape of a tensor, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _ceil_div(size: int, by: int) -> int:
    return -(-size // by)
