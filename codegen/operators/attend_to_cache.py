"""The operator `attend_to_cache`: on a GPU flash decoding, or torch's causal kernel; elsewhere `state.attend`.

A chunk of a prompt, for which the host knows the length so far, runs torch's kernel over the keys and values that the
cache holds, as `chunk_attention` reads them. All other calls run our own kernel, which reads lengths on the device.

The result has the memory order [batch, tokens, heads, value size], which the output projection reads as rows.
"""

from collections.abc import Sequence

from torch import Tensor

from codegen.cpu.cache import attend
from codegen.launching.launch import on
from codegen.launching.replay import empty, replayed
from codegen.operators.cache_operands import cache_tensors, check_rows, with_contiguous_sizes
from codegen.operators.chunk_attention import attend_to_chunk, why_not_chunk
from codegen.operators.operator import Operator, declare
from codegen.targets.cuda import gpu_at
from codegen.templates.attend_to_cache import ATTEND_TO_CACHE, AttendOperands, AttendProblem
from qcompiler.errors import CodegenError


def attend_to_cache_on_gpu(
    cache: Sequence[Tensor], query: Tensor, slots: Tensor, lengths: Tensor, sinks: Tensor | None, start: int | None,
    scale: float, window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Causal attention over a cache to which this call's keys and values are already appended.

    Deterministic, and independent of everything in the cache that a row does not read. The host does not wait for slots
    and lengths. One kernel for one split of the cache's length, else two.

    Args:
        cache: Contiguous key and value, then the scales of both if they are codes.
        query: `[batch, heads, tokens, size]`, any strides; token i of row b is at position `lengths[b] + i`.
        slots: int64 `[batch]`.
        lengths: int64 `[batch]`.
        sinks: `[heads]`, logits that join the softmax and have no value.
        start: The length of every row, if the host knows that all are equal; else None or negative.
        scale: Factor of the scores.
        window: Number of latest positions that a token reads, its own included.
        softcap: Limits the scores to softcap * tanh(score / softcap).

    Returns:
        `[batch, heads, tokens, value size]` in the dtype of the query.

    Raises:
        CodegenError: An operand does not fit the cache, or no kernel supports the head size.
    """
    if start is not None and start >= 0 and why_not_chunk(cache, query, sinks, start, window, softcap) is None:
        return attend_to_chunk(cache, query, slots, start, scale)
    operands = (*cache, query, slots, lengths, sinks)
    what = ("attend_to_cache", len(cache), scale, window, softcap)
    rows = replayed(_attend, what, operands, cache, query, slots, lengths, sinks, scale, window, softcap)
    return rows.transpose(1, 2)


def attend_to_cache_on_cpu(
    cache: Sequence[Tensor], query: Tensor, slots: Tensor, lengths: Tensor, sinks: Tensor | None, start: int | None,
    scale: float, window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """As on a GPU, but raises InputError for a slot or a position that the cache does not have."""
    return attend(cache, query, slots, lengths, sinks, start, scale, window, softcap)


def attend_to_cache_fake(
    cache: Sequence[Tensor], query: Tensor, slots: Tensor, lengths: Tensor, sinks: Tensor | None, start: int | None,
    scale: float, window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """A result without data."""
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, cache[1].shape[3])).transpose(1, 2)


def _attend(
    cache: Sequence[Tensor], query: Tensor, slots: Tensor, lengths: Tensor, sinks: Tensor | None, scale: float,
    window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    gpu = gpu_at(query.device)
    family = ATTEND_TO_CACHE.family(gpu)
    tensors = cache_tensors(cache)
    _, groups, capacity, size = tensors.key.shape
    value_size = tensors.value.shape[3]
    check_rows(query, None, size, slots, lengths)
    batch, heads, tokens, _ = query.shape
    if heads % groups or (sinks is not None and sinks.shape != (heads,)):
        got = f"{heads} query heads" + ("" if sinks is None else f" and sinks {list(sinks.shape)}")
        raise CodegenError("the heads do not fit the cache", got=got, need=f"a multiple of {groups}, one sink for each")
    out = empty((batch, tokens, heads, value_size), query.dtype, query.device)
    if out.numel():
        problem = AttendProblem(
            batch, groups, heads // groups, tokens, size, value_size, capacity, tensors.key.element_size(), window,
            gpu.limits.multiprocessors_of(query.device.index),
        )  # fmt: skip
        given = None if sinks is None else sinks.contiguous()
        operands = AttendOperands(
            with_contiguous_sizes(query), tensors, slots, lengths, given, out, scale, window, softcap
        )  # fmt: skip
        with on(query.device):
            family.launch(family.choose(problem), operands)
    return out


ATTEND_TO_CACHE_SCHEMA = (
    "attend_to_cache(Tensor[] cache, Tensor query, Tensor slots, Tensor lengths, Tensor? sinks, int? start, "
    "float scale, int? window, float? softcap) -> Tensor"
)
declare(
    Operator(
        ATTEND_TO_CACHE_SCHEMA,
        attend_to_cache_on_cpu,
        attend_to_cache_on_gpu,
        attend_to_cache_fake,
        runs="state.attend",
    )
)
