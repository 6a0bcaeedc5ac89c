"""The operator `attend_to_cache`: on a GPU flash decoding, or torch's causal kernel; elsewhere `state.attend`.

A chunk of a prompt, for which the host knows the length so far, runs torch's kernel over the keys and values that the
cache holds, as `chunk_attention` reads them. All other calls run our own kernel, which reads lengths on the device.

The result has the memory order [batch, tokens, heads, value size], which the output projection reads as rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codegen.cpu.cache import attend
from codegen.launching.launch import on
from codegen.launching.replay import empty, replayed
from codegen.operators.cache_operands import cache_tensors, check_rows, with_contiguous_sizes
from codegen.operators.chunk_attention import attend_to_chunk, why_not_chunk
from codegen.operators.operator import Operator, declare
from codegen.targets.cuda import gpu_at
from codegen.templates.attend_to_cache import ATTEND_TO_CACHE, AttendOperands, AttendProblem, QuantizedRows
from qcompiler.dialects.attention import reach
from qcompiler.dialects.cache_positions import check_call
from qcompiler.dialects.state import is_within
from qcompiler.errors import CodegenError


class Attention(NamedTuple):
    """The arguments of the operator.

    Attributes:
        cache: Contiguous key and value, then the scales of both if they are codes. This call's keys and values are
            already appended.
        query: `[batch, heads, tokens, size]`, any strides; token i of row b is at position `lengths[b] + i`.
        slots: int64 `[batch]`.
        lengths: int64 `[batch]`.
        sinks: `[heads]`, logits that join the softmax and have no value.
        start: The length of every row, if the host knows that all are equal; else None or negative.
        slopes: FP32 `[heads]`, which are multiplied by the distance to a key and added to its score.
        scale: Factor of the scores.
        window: Number of latest positions that a token reads, its own included.
        softcap: Limits the scores to softcap * tanh(score / softcap).
        chunk: Number of positions of a chunk, of which a token reads only its own.
        capacity: As for `append_to_cache`.
    """

    cache: Sequence[Tensor]
    query: Tensor
    slots: Tensor
    lengths: Tensor
    sinks: Tensor | None
    start: int | None
    slopes: Tensor | None
    scale: float
    window: int | None
    softcap: float | None
    chunk: int | None
    capacity: int | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors."""
        return (*self.cache, self.query, self.slots, self.lengths, self.sinks, self.slopes)

    @property
    def numbers(self) -> tuple[Any, ...]:
        """All that a launch depends on, besides the tensors."""
        return len(self.cache), self.scale, self.window, self.softcap, self.chunk, self.capacity

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch, tokens, heads, value size: the memory order of the result."""
        batch, heads, tokens, _ = self.query.shape
        return batch, tokens, heads, self.cache[1].shape[3]


def attend_to_cache_on_gpu(*arguments: Any) -> Tensor:
    """Causal attention over a cache: `[batch, heads, tokens, value size]` in the dtype of the query.

    Deterministic, and independent of everything in the cache that a row does not read. The host does not wait for slots
    and lengths. One kernel for one split of the cache's length, else two.

    Raises:
        CodegenError: An operand does not fit the cache, or no kernel supports the head size.
        InputError: A row has more tokens than the ring of a cache allows.
    """
    given = Attention(*arguments)
    if (chunk := chunk_of(given)) is not None:
        return chunk
    return replayed(_attend, ("attend_to_cache", *given.numbers), given.tensors, given).transpose(1, 2)


def attend_to_cache_on_cpu(*arguments: Any) -> Tensor:
    """As on a GPU, but raises InputError for a slot or a position that the cache does not have."""
    return attend(*arguments)


def attend_to_cache_fake(*arguments: Any) -> Tensor:
    """A result without data."""
    given = Attention(*arguments)
    return given.query.new_empty(given.shape).transpose(1, 2)


def chunk_of(given: Attention) -> Tensor | None:
    """The result, if torch's causal kernel computes it."""
    cache, query, start = given.cache, given.query, given.start
    beside = any(each is not None for each in (given.softcap, given.sinks, given.slopes))
    read = reach(given.window, given.chunk)
    if start is None or start < 0 or why_not_chunk(cache, query, start, read, beside=beside) is not None:
        return None
    return attend_to_chunk(cache, query, given.slots, start, given.scale)


def _attend(given: Attention) -> Tensor:
    out = empty(given.shape, given.query.dtype, given.query.device)
    launch_attention(given, out)
    return out


def launch_attention(given: Attention, out: Tensor | QuantizedRows) -> None:
    """Checks the operands, and launches the kernels; raises CodegenError as `attend_to_cache_on_gpu`."""
    cache, query, slots, lengths, sinks, _, slopes, scale, window, softcap, chunk, capacity = given
    gpu = gpu_at(query.device)
    family = ATTEND_TO_CACHE.family(gpu)
    tensors = cache_tensors(cache)
    _, groups, held, size = tensors.key.shape
    check_rows(query, None, size, slots, lengths)
    check_call(held, query.shape[2], capacity, reach(window, chunk))
    batch, tokens, heads, value_size = given.shape
    _check_heads(heads, groups, sinks, slopes)
    if batch * tokens * heads * value_size == 0:
        return
    problem = AttendProblem(
        batch, groups, heads // groups, tokens, size, value_size, capacity or held, tensors.key.element_size(),
        reach(window, chunk), gpu.limits.multiprocessors_of(query.device.index), is_within(cache),
    )  # fmt: skip
    if problem.within and not (sinks is None and slopes is None and softcap is None and isinstance(out, Tensor)):
        need = "only a scale, and a result in the dtype of the query"
        raise CodegenError("attention over a cache with its values within the keys has no such kernel", need=need)
    sinks, slopes = (None if each is None else each.contiguous() for each in (sinks, slopes))
    operands = AttendOperands(
        with_contiguous_sizes(query), tensors, slots, lengths, sinks, out, scale, window, softcap, capacity, chunk,
        slopes,
    )  # fmt: skip
    with on(query.device):
        family.launch(family.choose(problem), operands)


def _check_heads(heads: int, groups: int, sinks: Tensor | None, slopes: Tensor | None) -> None:
    """Raises CodegenError unless the heads fit the cache, and sinks and slopes the heads."""
    if heads % groups or (sinks is not None and sinks.shape != (heads,)):
        got = f"{heads} query heads" + ("" if sinks is None else f" and sinks {list(sinks.shape)}")
        raise CodegenError("the heads do not fit the cache", got=got, need=f"a multiple of {groups}, one sink for each")
    if slopes is not None and (slopes.shape != (heads,) or slopes.dtype != torch.float32):
        got, need = f"{slopes.dtype} {list(slopes.shape)}", f"FP32, one for each of {heads} heads"
        raise CodegenError("the slopes do not fit the query", got=got, need=need)


ATTENTION_ARGUMENTS = (
    "Tensor[] cache, Tensor query, Tensor slots, Tensor lengths, Tensor? sinks, int? start, Tensor? slopes, "
    "float scale, int? window, float? softcap, int? chunk, int? capacity"
)
"""The arguments of the operator, in torch's syntax."""

ATTEND_TO_CACHE_SCHEMA = f"attend_to_cache({ATTENTION_ARGUMENTS}=None) -> Tensor"  # calls may omit the capacity
declare(
    Operator(
        ATTEND_TO_CACHE_SCHEMA,
        attend_to_cache_on_cpu,
        attend_to_cache_on_gpu,
        attend_to_cache_fake,
        runs="state.attend",
    )
)
