"""The `attention` dialect: causal attention as one operation, whatever a model computes it with.

    %o = attention.causal(%q, %k, %v) {scale = 0.125, window = 4096} : bf16[s0, 32, s1, 128]

The mask is not an operand: query i reads the keys j with j <= i, with a window also i - window < j, with chunks only
keys of its own chunk. The pass `attention` makes it from torch's attention after it has proven that the mask says the
same.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.ir import Argument, DType, Op, TensorType, Type
from qcompiler.ir.op_table import AttributeCheck, OpDef, OpError, declare

POSITIVE_FLOAT: tuple[AttributeCheck, str] = (
    lambda a: isinstance(a, float) and math.isfinite(a) and a > 0,
    "a positive number",
)
WINDOW: tuple[AttributeCheck, str] = (
    lambda a: isinstance(a, int) and not isinstance(a, bool) and a > 0,
    "a positive number of positions",
)


def causal_types(op: Op) -> tuple[Type, ...]:
    """(query float[B, H, S, D], key [B, G, S, D], value [B, G, S, V], sinks [H]?, slopes f32[H]?) -> [B, H, S, V]"""
    query, key, value = (op[name].tensor for name in ("query", "key", "value"))
    if not len(query.shape) == len(key.shape) == len(value.shape) == 4:
        raise OpError("query, key and value must have four dimensions: batch, heads, positions and head size")
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    if key.shape != (batch, groups, length, size):
        raise OpError(f"the key must be [{batch}, heads, {length}, {size}], but is {key}", "key")
    if value.shape[:3] != key.shape[:3]:
        raise OpError(f"the value must have the key's first three dimensions, but is {value}", "value")
    if not (isinstance(heads, int) and isinstance(groups, int) and heads % groups == 0):
        raise OpError(f"the query has {heads} heads, which is not a multiple of the key's {groups}", "query")
    sinks: Argument = op.argument("sinks")
    if sinks is not None and op["sinks"].tensor.shape != (heads,):
        raise OpError(f"the sinks must be one number a head, [{heads}]", "sinks")
    check_slopes(op, heads)
    return (TensorType(query.dtype, (batch, heads, length, value.shape[3])),)


def check_slopes(op: Op, heads: int) -> None:
    """Raises OpError unless the slopes of an attention are absent or f32[heads]."""
    need = TensorType(DType.f32, (heads,))
    if op.argument("slopes") is not None and op["slopes"].type != need:
        raise OpError(f"the slopes must be {need}, but are {op['slopes'].type}", "slopes")


def reach(window: int | None, chunk: int | None) -> int | None:
    """The number of positions that a query reads at most; None for all."""
    return min((each for each in (window, chunk) if each is not None), default=None)


def reach_of(op: Op) -> int | None:
    """The number of positions that a query of an attention reads at most; None for all."""
    window, chunk = (value if isinstance(value := op.attrs.get(name), int) else None for name in ("window", "chunk"))
    return reach(window, chunk)


def causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    key_scale: float | None = None,
    value_scale: float | None = None,
) -> Tensor:
    """Causal attention in plain torch.

    Args:
        query: [batch, heads, length, size].
        key: [batch, groups, length, size]; each of its heads serves heads / groups neighboring query heads.
        value: [batch, groups, length, value size].
        sinks: [heads], logits that join the softmax and have no value, as in gpt-oss.
        slopes: FP32 [heads]; query i adds slope * (j - i) to its score of key j, as in ALiBi.
        scale: Factor of the scores.
        window: Number of latest positions that a query reads, its own included; None for all.
        chunk: A query reads only keys of its own chunk of so many positions, as in Llama 4; None for all.
        softcap: Limits the scores to softcap * tanh(score / softcap), as in Gemma 2, before slopes are added.
        key_scale: The static scale of keys in a quantized cache, which the pass `kv-cache` uses; not used here.
        value_scale: Likewise, of values.
    """
    length = query.shape[2]
    if isinstance(length, int):  # not a traced size
        window = None if window is not None and window >= length else window
        if chunk is not None and chunk < length:
            options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
            parts = zip(*(operand.split(chunk, 2) for operand in (query, key, value)), strict=True)
            return torch.cat([causal(q, k, v, sinks, slopes, **options) for q, k, v in parts], 2)
        chunk = None
    if window is None and chunk is None and softcap is None and sinks is None and slopes is None:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    place = torch.arange(length, device=query.device)
    return attend(
        query, key, value, place, place, sinks, slopes, scale=scale, window=window, chunk=chunk, softcap=softcap
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, own: Tensor, place: Tensor, sinks: Tensor | None,
    slopes: Tensor | None, *, scale: float, window: int | None, chunk: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Attention of queries at the positions `own` to keys at the positions `place`, in plain torch.

    For the arguments, see `causal`. Without a limit of scores and without sinks, it is torch's attention, to which
    a bias is given in the element type of the query; otherwise the softmax is in FP32.
    """
    distance = place - own[:, None]
    seen = distance <= 0
    if window is not None:
        seen &= distance > -window
    if chunk is not None:
        seen &= place >= own[:, None] // chunk * chunk
    bias = None if slopes is None else slopes[:, None, None] * distance
    if softcap is None and sinks is None:
        mask = seen if bias is None else bias.masked_fill(~seen, -torch.inf).to(query.dtype)[None]
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        beside = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, beside], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]].to(value.dtype)
    return weights @ value


declare(
    OpDef(
        "attention.causal",
        "Attention in which each position reads itself and earlier positions.",
        ("query", "key", "value", "sinks?", "slopes?"),
        {"scale": POSITIVE_FLOAT},
        {
            "window": WINDOW,
            "chunk": WINDOW,
            "softcap": POSITIVE_FLOAT,
            "key_scale": POSITIVE_FLOAT,
            "value_scale": POSITIVE_FLOAT,
        },
        types=causal_types,
        meaning=causal,
    )
)
