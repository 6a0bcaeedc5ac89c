"""The operator `append_to_cache`: on a GPU one kernel, which also quantizes; elsewhere `state.append`."""

from collections.abc import Sequence

from torch import Tensor

from codegen.cpu.cache import append
from codegen.launching.launch import on
from codegen.launching.replay import replayed
from codegen.operators.cache_operands import cache_tensors, check_rows, with_contiguous_sizes
from codegen.operators.operator import Operator, declare
from codegen.targets.cuda import gpu_at
from codegen.templates.append_to_cache import APPEND_TO_CACHE, AppendOperands, AppendProblem
from qcompiler.dialects.cache_positions import check_call


def append_to_cache_on_gpu(
    cache: Sequence[Tensor], key: Tensor, value: Tensor, slots: Tensor, lengths: Tensor, capacity: int | None = None
) -> None:  # fmt: skip
    """Writes keys and values after the positions that each row's slot already has, in place.

    The host does not wait for slots and lengths, so tokens that do not fit are not written, without an error.

    Args:
        cache: Contiguous key and value, then the scales of both if they are codes.
        key: `[batch, heads, tokens, size]`, any strides.
        value: `[batch, heads, tokens, value size]`, any strides.
        slots: int64 `[batch]`, all different.
        lengths: int64 `[batch]`.
        capacity: Maximum length of a sequence if the cache is a ring, where position p is stored at p % ring; None if
            it is not.

    Raises:
        CodegenError: An operand does not fit the cache, or the GPU has no FP8.
        InputError: A row has more tokens than the ring.
    """
    operands, what = (*cache, key, value, slots, lengths), ("append_to_cache", len(cache), capacity)
    replayed(_append, what, operands, cache, key, value, slots, lengths, capacity)


def append_to_cache_on_cpu(
    cache: Sequence[Tensor], key: Tensor, value: Tensor, slots: Tensor, lengths: Tensor, capacity: int | None = None
) -> None:  # fmt: skip
    """As on a GPU, but raises InputError if a token does not fit; then nothing is written."""
    append(cache, key, value, slots, lengths, capacity)


def append_to_cache_fake(
    cache: Sequence[Tensor], key: Tensor, value: Tensor, slots: Tensor, lengths: Tensor, capacity: int | None = None
) -> None:  # fmt: skip
    """Nothing: the operator returns nothing, and its schema declares what it writes."""


def _append(
    cache: Sequence[Tensor], key: Tensor, value: Tensor, slots: Tensor, lengths: Tensor, capacity: int | None
) -> tuple[()]:  # fmt: skip
    family = APPEND_TO_CACHE.family(gpu_at(key.device))
    tensors = cache_tensors(cache)
    heads = tensors.key.shape[1]
    check_rows(key, heads, tensors.key.shape[3], slots, lengths)
    check_rows(value, heads, tensors.value.shape[3], slots, lengths)
    check_call(tensors.key.shape[2], key.shape[2], capacity)
    rows = key.shape[:3].numel()
    if rows:
        new = with_contiguous_sizes(key), with_contiguous_sizes(value)
        operands = AppendOperands(*new, tensors, slots, lengths, capacity)
        config = family.choose(AppendProblem(rows, max(key.shape[3], value.shape[3])))
        with on(key.device):
            family.launch(config, operands)
    return ()


APPEND_TO_CACHE_SCHEMA = (
    "append_to_cache(Tensor(a!)[] cache, Tensor key, Tensor value, Tensor slots, Tensor lengths, "
    "int? capacity=None) -> ()"
)
declare(
    Operator(
        APPEND_TO_CACHE_SCHEMA,
        append_to_cache_on_cpu,
        append_to_cache_on_gpu,
        append_to_cache_fake,
        runs="state.append",
    )
)
