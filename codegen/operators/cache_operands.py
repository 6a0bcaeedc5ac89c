"""Operands of the KV cache operators, and their checks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from codegen.launching.launch import FLOATS
from qcompiler.dialects.state import FORMATS, is_within
from qcompiler.errors import CodegenError


class CacheTensors(NamedTuple):
    """The tensors of a cache.

    Attributes:
        key: `[slots, groups, held, size]`, contiguous; `held` is the size of a ring, or the capacity.
        value: `[slots, groups, held, value size]`, contiguous, or a view of the first elements of the keys.
        key_scale: FP32 `[slots, groups, held]`, contiguous, or `[1]`, static; None unless the cache is quantized.
        value_scale: Likewise.
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None


def cache_tensors(cache: Sequence[Tensor]) -> CacheTensors:
    """The tensors of a cache by name; raises CodegenError unless a kernel can read and write them."""
    key, value, *scales = cache
    quantized = key.dtype in FORMATS
    if len(scales) != (2 if quantized else 0) or value.dtype != key.dtype or key.dtype not in (*FLOATS, *FORMATS):
        raise CodegenError(
            "the tensors do not form a cache",
            got=", ".join(_described(tensor) for tensor in cache),
            need="key and value of one dtype, and two FP32 scales if they are 8-bit codes",
        )
    sizes = key.shape[:3]
    fits = key.dim() == value.dim() == 4 and value.shape[:3] == sizes
    shapes = {scale.shape for scale in scales}
    fits &= shapes <= {sizes} or shapes == {torch.Size([1])}
    fits &= all(scale.dtype == torch.float32 for scale in scales)
    if fits and is_within(cache):
        fits = value.stride() == key.stride() and value.data_ptr() == key.data_ptr()
        cache = (key, *scales)
    if not fits or not all(tensor.is_contiguous() for tensor in cache):
        raise CodegenError(
            "the tensors of the cache do not match each other",
            got=", ".join(_described(tensor) for tensor in cache),
            need="[slots, heads, positions, size] and FP32 scales [slots, heads, positions] or [1], contiguous",
        )
    return CacheTensors(key, value, *(scales or (None, None)))


def check_rows(new: Tensor, heads: int | None, size: int, slots: Tensor, lengths: Tensor) -> None:
    """Raises CodegenError unless `new` is `[batch, heads, tokens, size]` and each row has a slot and a length."""
    if (
        new.dim() != 4
        or new.shape[3] != size
        or (heads is not None and new.shape[1] != heads)
        or new.dtype not in FLOATS
    ):
        shape = f"[batch, {'heads' if heads is None else heads}, tokens, {size}]"
        raise CodegenError("the operand does not fit the cache", got=_described(new), need=f"floating point {shape}")
    for name, each in (("slots", slots), ("lengths", lengths)):
        if each.shape != new.shape[:1] or each.dtype != torch.int64 or not each.is_contiguous():
            raise CodegenError(
                f"the {name} must be one number for each row of the batch",
                got=_described(each),
                need=f"int64[{new.shape[0]}], contiguous",
            )


def with_contiguous_sizes(x: Tensor) -> Tensor:
    """`x`, copied if the elements of a head are not next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _described(tensor: Tensor) -> str:
    strided = "" if tensor.is_contiguous() else f" with strides {list(tensor.stride())}"
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}{strided}"
