"""The `attention` dialect: causal attention as one operation, whatever a model computes it with.

    %o = attention.causal(%q, %k, %v) {scale = 0.125, window = 4096} : bf16[s0, 32, s1, 128]

The mask is not an operand: query i reads the keys j with j <= i, and with a window also i - window < j. The pass
`attention` makes it from torch's attention after it has proven that the mask says the same.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.ir import Argument, Op, TensorType, Type
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
    """(query float[B, H, S, D], key float[B, G, S, D], value float[B, G, S, V], sinks [H]?) -> float[B, H, S, V]"""
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
    return (TensorType(query.dtype, (batch, heads, length, value.shape[3])),)


def causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
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
        scale: Factor of the scores.
        window: Number of latest positions that a query reads, its own included; None for all.
        softcap: Limits the scores to softcap * tanh(score / softcap), as in Gemma 2.
        key_scale: The static scale of keys in a quantized cache, which the pass `kv-cache` uses; not used here.
        value_scale: Likewise, of values.
    """
    if window is not None and isinstance(query.shape[2], int) and window >= query.shape[2]:  # not a traced size
        window = None
    if window is None and softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    length = query.shape[2]
    place = torch.arange(length, device=query.device)
    seen = place[:, None] >= place
    if window is not None:
        seen &= place[:, None] - window < place
    if softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    return attend(query, key, value, seen, sinks, scale=scale, softcap=softcap)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention over the keys that `seen` [..., queries, keys] allows, with softmax in FP32, in plain torch."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
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
        ("query", "key", "value", "sinks?"),
        {"scale": POSITIVE_FLOAT},
        {"window": WINDOW, "softcap": POSITIVE_FLOAT, "key_scale": POSITIVE_FLOAT, "value_scale": POSITIVE_FLOAT},
        types=causal_types,
        meaning=causal,
    )
)
