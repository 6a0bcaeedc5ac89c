"""Attention of a chunk of a prompt over a cache, by torch's causal kernels.

    cache [slots, G, capacity, D] of codes  ->  keys and values bf16[B, G, start + S, D]  ->  flash attention

The keys and values are those that the cache stores, as in `state.attend`: codes times scales, rounded to the dtype of
the query. So cutting a prompt into other chunks changes nothing but this rounding and the order of additions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from codegen.launching.launch import FLOATS, on
from codegen.launching.replay import empty, replayed
from codegen.operators.cache_operands import cache_tensors
from codegen.targets.cuda import gpu_at
from codegen.templates.read_cache import READ_CACHE, ReadOperands, ReadProblem
from qcompiler.dialects.state import FORMATS, is_static

LEAST_TOKENS = 512
"""Fewer tokens do not pay for the launches that copy the keys and values."""

LARGEST_SIZE = 256
"""Largest head size of torch's flash attention."""


def why_not_chunk(cache: Sequence[Tensor], query: Tensor, start: int, reach: int | None, *, beside: bool) -> str | None:
    """Why torch's kernels do not run a chunk, all of whose rows have `start` positions before it; None if they do.

    Args:
        cache: As for `attend_to_cache`.
        query: As for `attend_to_cache`.
        start: Positions before the chunk.
        reach: The smallest of window and chunk of a mask; None without both.
        beside: Whether the scores have a limit, sinks or slopes.
    """
    tokens, size, value_size = query.shape[2], query.shape[3], cache[1].shape[3]
    end = start + tokens
    if tokens < LEAST_TOKENS:
        return f"it has {tokens} tokens, fewer than {LEAST_TOKENS}"
    if end > cache[0].shape[2]:
        return f"it ends at position {end}, after the last one of a slot"
    if reach is not None and reach < end:
        return f"its mask of {reach} positions hides some of {end}"
    if beside:
        return "torch's kernels have no limit of scores, no sinks and no slopes"
    if query.dtype not in FLOATS or query.dtype == torch.float32:
        return f"torch's kernels do not compute in {query.dtype}"
    if size != value_size or size > LARGEST_SIZE:
        return f"its heads of {size} and {value_size} elements are not equal, or larger than {LARGEST_SIZE}"
    return None


def attend_to_chunk(cache: Sequence[Tensor], query: Tensor, slots: Tensor, start: int, scale: float) -> Tensor:
    """Causal attention of the queries `[B, H, S, D]` at the positions `start`, `start + 1`, … of each slot.

    Args:
        cache: As for `attend_to_cache`; holds `start + S` positions of each slot.
        query: `[B, H, S, D]`.
        slots: int64 `[B]`.
        start: Positions before the chunk.
        scale: Factor of the scores.

    Returns:
        `[B, H, S, D]` in the dtype of the query, with the memory order of `[B, S, H, D]`.
    """
    tokens = query.shape[2]
    read = stored_on_gpu if query.is_cuda else stored
    key, value = read(cache, slots, start + tokens, query.dtype)
    bias = None if start == 0 else causal_lower_right(tokens, start + tokens)
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=start == 0, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # a no-op after torch's flash attention


def stored(cache: Sequence[Tensor], slots: Tensor, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first `end` keys `dtype[B, G, end, D]` and values of some slots, in plain torch."""
    key, value = (_stored(cache, index, slots, end, dtype) for index in (0, 1))
    return key, value


def _stored(cache: Sequence[Tensor], index: int, slots: Tensor, end: int, dtype: torch.dtype) -> Tensor:
    whole = cache[index][:, :, :end]
    if whole.dtype not in FORMATS:
        return whole.index_select(0, slots).to(dtype)
    codes = whole.view(torch.int8).index_select(0, slots).view(whole.dtype).to(dtype)
    scales = cache[2 + index]
    if not is_static(cache):
        scales = scales[:, :, :end].index_select(0, slots)[..., None]
    return torch.mul(codes, scales, out=codes)  # computed in FP32, rounded once


def stored_on_gpu(cache: Sequence[Tensor], slots: Tensor, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `stored`, in one kernel."""
    return replayed(_read, ("read_cache", len(cache), end, dtype), (*cache, slots), cache, slots, end, dtype)


def _read(cache: Sequence[Tensor], slots: Tensor, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tensors, device = cache_tensors(cache), slots.device
    groups, size, value_size = tensors.key.shape[1], tensors.key.shape[3], tensors.value.shape[3]
    key = empty((len(slots), groups, end, size), dtype, device)
    value = empty((len(slots), groups, end, value_size), dtype, device)
    family = READ_CACHE.family(gpu_at(device))
    config = family.choose(ReadProblem(len(slots) * groups * end, max(size, value_size)))
    with on(device):
        family.launch(config, ReadOperands(tensors, slots, key, value))
    return key, value
