"""The `state` dialect: key-value caches that operations append to and attend over, in place.

    %c = state.cache() {name = "layers.0"} : cache<bf16, slots = 16, heads = 8, capacity = 8192, key = 128, value = 128>
    state.append(%c, %k, %v, %slots, %lengths)
    %o = state.attend(%c, %q, %slots, %lengths) {scale = 0.125} : bf16[s0, 32, s1, 128]

Row b of a call continues the sequence in slot `slots[b]`, which already has `lengths[b]` positions. At run time, a
cache is a list of tensors: key and value, and their scales if the cache has a format (see `CacheType.tensors`). Static
scales are operands, FP32 with one element each:

    %c = state.cache(%key_scale, %value_scale) {name = "layers.0"} : cache<#fp8_tensor, slots = 16, …>

If a cache is a ring, which holds only the latest positions, its operations have the capacity as an attribute, and
attention has a window:

    %c = state.cache() {name = "layers.0"} : cache<bf16, …, capacity = 8192, …, ring = 3072>
    state.append(%c, %k, %v, %slots, %lengths) {capacity = 8192}

In a cache with `within = true`, the values are the first elements of the keys. Their tensor is a view of the keys'
tensor, so `state.append` writes keys only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.dialects.attention import POSITIVE_FLOAT, WINDOW, causal, check_slopes, reach, reach_of
from qcompiler.dialects.attention import attend as attend_at
from qcompiler.dialects.cache_positions import check_call, check_fit, in_order
from qcompiler.errors import InputError
from qcompiler.ir import CacheType, DType, Effects, Format, Op, Role, ScalarType, TensorType, Type, Value
from qcompiler.ir.cache_type import QUANTIZED, STATIC
from qcompiler.ir.op_table import TEXT, OpDef, OpError, declare

FORMATS = {numerics.torch_dtype(format.element): format for format in QUANTIZED if format not in STATIC}
"""The dtype of a cache's codes -> its format if each token and head has a scale."""

STATIC_FORMATS = {numerics.torch_dtype(format.element): format for format in STATIC}
"""The dtype of a cache's codes -> its format if the scales are static."""

SCALE = TensorType(DType.f32, (1,))
"""The type of a static scale."""

CAPACITY = (WINDOW[0], "a positive number of positions, for a ring")


def cache_of(value: Value) -> CacheType:
    """The type of a cache; raises OpError if the value is not a cache."""
    if not isinstance(value.type, CacheType):
        raise OpError(f"{value} must be a cache, but is {value.type}", "cache")
    scales = [scale.type for _, scale in value.op.operands()]
    if scales != [SCALE, SCALE] * value.type.is_static:
        need = f"two static scales, {SCALE} each" if value.type.is_static else "no static scales"
        raise OpError(f"{value} must have {need}, but has {', '.join(map(str, scales)) or 'none'}", "cache")
    return value.type


def _check_capacity(op: Op, cache: CacheType) -> None:
    """Raises OpError unless an operation over a ring, and no other, has the attribute `capacity`."""
    need = None if cache.ring is None else cache.capacity
    if (got := op.attrs.get("capacity")) != need:
        why = "the cache is not a ring" if need is None else f"the cache is a ring of {cache.ring} positions"
        raise OpError(f"the attribute 'capacity' must be {need or 'left out'}, because {why}, but is {got}", "cache")


def append_types(op: Op) -> tuple[Type, ...]:
    """(cache, key float[B, G, S, D], value float[B, G, S, V], slots, lengths) -> nothing"""
    check_append(op, op["key"].tensor, op["value"].tensor)
    return ()


def check_append(op: Op, key: TensorType, value: TensorType) -> None:
    """Raises OpError unless keys and values of these types fit the cache, slots and lengths of an operation."""
    cache = cache_of(op["cache"])
    for name, kind, size in (("key", key, cache.key), ("value", value, cache.value)):
        if len(kind.shape) != 4 or (kind.shape[1], kind.shape[3]) != (cache.heads, size):
            raise OpError(f"the {name} must be [rows, {cache.heads}, positions, {size}], but is {kind}", name)
        if kind.dtype is not cache.element and not (isinstance(cache.element, Format) and kind.dtype.is_float):
            raise OpError(f"the {name} has elements of type {kind.dtype}, but the cache holds {cache.element}", name)
    if key.shape[:3] != value.shape[:3]:
        raise OpError(f"the value must have the key's rows and positions, but is {value}", "value")
    _check_capacity(op, cache)
    _check_rows(op, key)


def attend_types(op: Op) -> tuple[TensorType]:
    """(cache, query float[B, H, S, D], slots, lengths, sinks [H]?, start int?, slopes f32[H]?) -> float[B, H, S, V]"""
    cache, query = cache_of(op["cache"]), op["query"].tensor
    if len(query.shape) != 4 or query.shape[3] != cache.key:
        raise OpError(f"the query must be [rows, heads, positions, {cache.key}], but is {query}", "query")
    heads = query.shape[1]
    if not isinstance(heads, int) or heads % cache.heads:
        raise OpError(f"the query has {heads} heads, which is not a multiple of the cache's {cache.heads}", "query")
    if isinstance(cache.element, DType) and query.dtype is not cache.element:
        raise OpError(f"the query has elements of type {query.dtype}, but the cache holds {cache.element}", "query")
    if op.argument("sinks") is not None and op["sinks"].tensor.shape != (heads,):
        raise OpError(f"the sinks must be one number per head, [{heads}]", "sinks")
    if isinstance(start := op.argument("start"), Value) and not isinstance(start.type, ScalarType):
        raise OpError(f"the start must be one number of the host, but is {start}", "start")
    check_slopes(op, heads)
    _check_capacity(op, cache)
    read = reach_of(op)
    if cache.ring is not None and not (read is not None and read <= cache.ring):
        raise OpError(f"the window must be at most the ring of {cache.ring} positions, but is {read}", "cache")
    _check_rows(op, query)
    return (TensorType(query.dtype, (*query.shape[:3], cache.value)),)


def _check_rows(op: Op, new: TensorType) -> None:
    need = TensorType(DType.i64, new.shape[:1])
    for name in ("slots", "lengths"):
        if op[name].type != need:
            raise OpError(f"the {name} must be {need}, but are {op[name].type}", name)


def append(
    cache: Sequence[Tensor], key: Tensor, value: Tensor, slots: Tensor, lengths: Tensor, *, capacity: int | None = None
) -> None:  # fmt: skip
    """Writes keys and values to positions `lengths[b]` … `lengths[b] + S - 1` of slot `slots[b]`, in place.

    Args:
        cache: Key and value, or their codes followed by the scales of both.
        key: `[B, G, S, D]`; with a format, each head of each token is quantized with a scale of its own, or all with
            the static scale, beyond which they saturate.
        value: `[B, G, S, V]`; the first elements of the keys if the cache has its values within them.
        slots: `[B]`, all different.
        lengths: `[B]`.
        capacity: Maximum length of a sequence if the cache is a ring; None if it is not.

    Raises:
        InputError: A row is outside the slots or the capacity, or has more tokens than a ring; nothing is written.
    """
    check_fit(cache, slots, lengths, key.shape[2], capacity)
    check_call(cache[0].shape[2], key.shape[2], capacity)
    rows = slots[:, None]
    places = (lengths[:, None] + torch.arange(key.shape[2], device=key.device)) % cache[0].shape[2]
    for index, new in enumerate((key,) if is_within(cache) else (key, value)):
        format = FORMATS.get(cache[index].dtype)
        if is_static(cache):
            new = quantized(new, cache[2 + index], cache[index].dtype)
        elif format is not None:
            new, scale = numerics.quantize(new, format)
            cache[2 + index][rows, :, places] = scale[..., 0].transpose(1, 2)
        cache[index][rows, :, places] = new.transpose(1, 2)


def attend(
    cache: Sequence[Tensor], query: Tensor, slots: Tensor, lengths: Tensor, sinks: Tensor | None = None,
    start: int | None = None, slopes: Tensor | None = None, *, scale: float, window: int | None = None,
    chunk: int | None = None, softcap: float | None = None, capacity: int | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention over a cache; reads only the positions that each row needs.

    Args:
        cache: As in `append`, which has already written the keys and values of this call.
        query: `[B, H, S, D]`; query i of row b is at position `lengths[b] + i`.
        slots: `[B]`.
        lengths: `[B]`, the number of positions before this call.
        sinks: As in `attention.causal`, also for `slopes`, `scale`, `window`, `chunk` and `softcap`.
        start: The length of every row, if the host knows that all are equal; else None or negative. Changes no number,
            but kernels for whole chunks of a prompt need it.
        slopes: FP32 `[H]`.
        scale: Factor of the scores.
        window: Number of latest positions that a query reads, its own included; None for all.
        chunk: A query reads only its own chunk of so many positions; None for all.
        softcap: Limits the scores to softcap * tanh(score / softcap).
        capacity: As in `append`.

    Returns:
        `[B, H, S, V]`, with the memory order of `[B, S, H, V]`. Scores and softmax are in FP32.

    Raises:
        InputError: A row is outside the slots or the capacity, its length is not `start`, or the call has more tokens
            than the ring allows.
    """
    rows, heads, new, _ = query.shape
    check_fit(cache, slots, lengths, new, capacity)
    check_call(cache[0].shape[2], new, capacity, reach(window, chunk))
    if start is not None and start >= 0 and lengths.tolist() != [start] * rows:
        raise InputError("the rows do not all have the length that the host promises", got=lengths.tolist(), need=start)
    out = query.new_empty((rows, new, heads, cache[1].shape[3])).transpose(1, 2)
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        end = length + new
        first = first_position(length, window, chunk)
        part = part_of(cache, slot, first, end)
        if new == 1:
            out[row] = _one_token(part, query[row], sinks, slopes, scale, softcap)
        else:
            own, place = (torch.arange(at, end, device=query.device) for at in (length, first))
            forms: dict[str, Any] = {"scale": scale, "window": window, "chunk": chunk, "softcap": softcap}
            out[row] = _several_tokens(part, query[row], own, place, sinks, slopes, **forms)
    return out


def first_position(length: int, window: int | None, chunk: int | None) -> int:
    """The first position that the query at position `length` reads."""
    first = 0 if window is None else max(0, length + 1 - window)
    return first if chunk is None else max(first, length // chunk * chunk)


def is_static(cache: Sequence[Tensor]) -> bool:
    """Whether the scales in a cache are static."""
    return len(cache) > 2 and cache[2].dim() == 1


def is_within(cache: Sequence[Tensor | None]) -> bool:
    """Whether the values in a cache are a view of the first elements of its keys."""
    value = cache[1]
    return value is not None and value.stride(2) > value.shape[3]


def part_of(cache: Sequence[Tensor], slot: int, start: int, end: int) -> list[Tensor]:
    """Keys, values and their scales at some positions of a slot, `[G, end - start, …]`."""
    count = end - start
    found = [in_order(tensor.select(0, slot), start, count) for tensor in (cache[:2] if is_static(cache) else cache)]
    return found + [scale.expand(cache[0].shape[1], count) for scale in cache[len(found) :]]


def quantized(new: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes of keys or values with a static scale."""
    codes = numerics.quantize_static(new.flatten(0, -2), scale.reshape(1, 1), STATIC_FORMATS[dtype])
    return codes.reshape(new.shape)


def _one_token(
    cache: Sequence[Tensor], query: Tensor, sinks: Tensor | None, slopes: Tensor | None,
    scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """One row with one query, the last position, which reads all of `cache`: two batched matrix-vector products."""
    key, value, *scales = cache
    wide = torch.promote_types(query.dtype, torch.float32)
    heads, _, size = query.shape
    scores = query.reshape(key.shape[0], -1, size).to(wide) @ _numbers(key, wide).transpose(1, 2) * scale
    if scales:
        scores *= scales[0][:, None]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores + linear_bias(slopes, scores)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide).reshape(*scores.shape[:2], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[1]]
    if scales:
        weights = weights * scales[1][:, None]
    return (weights @ _numbers(value, wide)).reshape(heads, 1, -1).to(query.dtype)


def linear_bias(slopes: Tensor, scores: Tensor) -> Tensor:
    """What slopes add to the scores [G, H / G, K] of the last of K positions."""
    distance = torch.arange(1 - scores.shape[2], 1, device=scores.device)
    return slopes.to(scores.dtype).reshape(*scores.shape[:2], 1) * distance


def _numbers(stored: Tensor, wide: torch.dtype) -> Tensor:
    """Elements or codes as numbers, without scales."""
    format = FORMATS.get(stored.dtype)
    return stored.to(wide) if format is None else numerics.decode(stored, format).to(wide)


def _several_tokens(
    cache: Sequence[Tensor], query: Tensor, own: Tensor, place: Tensor, sinks: Tensor | None, slopes: Tensor | None,
    **forms: Any,
) -> Tensor:  # fmt: skip
    """One row with several queries at the positions `own`, over a cache with the positions `place`."""
    key, value = cache[:2]
    if len(cache) > 2:
        wide = torch.promote_types(query.dtype, torch.float32)
        key, value = (
            _numbers(codes, wide) * scales[..., None] for codes, scales in zip(cache[:2], cache[2:], strict=True)
        )
    query, key, value = query[None].to(key.dtype), key[None], value[None]
    if len(own) == len(place) and forms["window"] is None:  # at the beginning of the slot or of a chunk
        return causal(query, key, value, sinks, slopes, **forms)[0]
    return attend_at(query, key, value, own, place, sinks, slopes, **forms)[0]


declare(
    OpDef(
        "state.cache",
        "A key-value cache of the caller.",
        ("key_scale?", "value_scale?"),
        attributes={"name": TEXT},
        role=Role.STATE,
        effects=Effects.READS,
    )
)
declare(
    OpDef(
        "state.append",
        "Writes keys and values after the positions that each row's slot already has, in place.",
        ("cache", "key", "value", "slots", "lengths"),
        optional={"capacity": CAPACITY},
        types=append_types,
        meaning=append,
        effects=Effects.WRITES,
    )
)
ATTEND = declare(
    OpDef(
        "state.attend",
        "Causal attention of queries over the slots of a cache, after this call's keys and values are appended.",
        ("cache", "query", "slots", "lengths", "sinks?", "start?", "slopes?"),
        {"scale": POSITIVE_FLOAT},
        {"window": WINDOW, "softcap": POSITIVE_FLOAT, "chunk": WINDOW, "capacity": CAPACITY},
        types=attend_types,
        meaning=attend,
        effects=Effects.READS,
    )
)
