"""Appends one step to key-value caches and attends over them, bit-equal to `state.append` and `state.attend`.

Rows are written to slices, and read from slices, because gathers by tensors of indices cost several times as much.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from codegen.cpu.quantize import decoded, quantize
from qcompiler.dialects import state
from qcompiler.dialects.attention import reach
from qcompiler.dialects.cache_positions import check_call, pieces
from qcompiler.ir import Format

MOST_ROWS = 16
"""Rows up to which one copy for each is faster than one indexed write for all."""


def append(
    cache: Sequence[Tensor], key: Tensor, value: Tensor, slots: Tensor, lengths: Tensor, capacity: int | None = None
) -> None:  # fmt: skip
    """`state.append`; the same errors."""
    tokens, held = key.shape[2], cache[0].shape[2]
    places = _places(cache, slots, lengths, tokens, capacity)
    if not places or len(places) > MOST_ROWS or tokens > held:
        state.append(cache, key, value, slots, lengths, capacity=capacity)
        return
    new, into = ([key], cache[::2]) if state.is_within(cache) else ([key, value], cache)
    format = state.FORMATS.get(cache[0].dtype)
    if state.is_static(cache):
        scales = into[len(new) :]
        new = [state.quantized(each, scale, cache[0].dtype) for each, scale in zip(new, scales, strict=True)]
    elif format is not None:
        new = _quantized(new, cache[0].dtype, format)
    for row, (slot, start) in enumerate(places):
        for first, count, done in pieces(start, tokens, held):
            for stored, each in zip(into[: len(new)], new, strict=True):
                stored.select(0, slot).narrow(1, first, count).copy_(each[row].narrow(1, done, count))


def _quantized(new: Sequence[Tensor], dtype: torch.dtype, format: Format) -> list[Tensor]:
    """Codes of keys, and of values, then their scales."""
    if len({each.shape for each in new}) == 1:
        codes, scale = quantize(torch.stack([*new]), format.block, dtype, format.profile)
        return [*codes, *scale.squeeze(-1)]
    made = [quantize(each, format.block, dtype, format.profile) for each in new]
    return [codes for codes, _ in made] + [scale.squeeze(-1) for _, scale in made]


def attend(
    cache: Sequence[Tensor], query: Tensor, slots: Tensor, lengths: Tensor, sinks: Tensor | None, start: int | None,
    slopes: Tensor | None, scale: float, window: int | None, softcap: float | None, chunk: int | None,
    capacity: int | None = None,
) -> Tensor:  # fmt: skip
    """`state.attend`; the same errors."""
    rows, heads, tokens, _ = query.shape
    check_call(cache[0].shape[2], tokens, capacity, reach(window, chunk))
    places = _places(cache, slots, lengths, tokens, capacity) if tokens == 1 else []
    if not places:
        return state.attend(
            cache, query, slots, lengths, sinks, start, slopes, scale=scale, window=window, chunk=chunk,
            softcap=softcap, capacity=capacity,
        )  # fmt: skip
    found = []
    for row, (slot, length) in enumerate(places):
        part = state.part_of(cache, slot, state.first_position(length, window, chunk), length + 1)
        found.append(_one_token(part, query[row], sinks, slopes, scale, softcap))
    joined = found[0] if rows == 1 else torch.stack(found)
    return joined.to(query.dtype).view(rows, 1, heads, -1).transpose(1, 2)


def _one_token(
    cache: Sequence[Tensor], query: Tensor, sinks: Tensor | None, slopes: Tensor | None, scale: float,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """The result of one query `[heads, 1, size]` that reads all of `cache`, `[groups, heads / groups, value size]`."""
    key, value, *scales = cache
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.reshape(key.shape[0], -1, key.shape[2]).to(wide) @ _numbers(key, wide).transpose(1, 2)
    scores.mul_(scale)
    if scales:
        scores.mul_(scales[0].unsqueeze(1))
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if slopes is not None:
        scores.add_(state.linear_bias(slopes, scores))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide).reshape(*scores.shape[:2], 1)], -1)
    weights = torch.softmax(scores, -1)
    if sinks is not None:
        weights = weights[..., :-1]
    if scales:
        weights = weights * scales[1].unsqueeze(1)
    return weights @ _numbers(value, wide)


def _numbers(stored: Tensor, wide: torch.dtype) -> Tensor:
    """Elements or codes as numbers, without scales."""
    return (decoded(stored) if stored.dtype in state.FORMATS else stored).to(wide)


def _places(
    cache: Sequence[Tensor], slots: Tensor, lengths: Tensor, tokens: int, capacity: int | None
) -> list[tuple[int, int]]:
    """Slot and length of each row; nothing if some row does not fit, which `state` reports."""
    count, _, held, _ = cache[0].shape
    last = (capacity or held) - tokens
    places = list(zip(slots.tolist(), lengths.tolist(), strict=True))
    fits = all(0 <= slot < count and 0 <= length <= last for slot, length in places)
    return places if fits else []
