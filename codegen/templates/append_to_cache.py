"""The kernel that appends keys and values to a KV cache: one tile of tokens and heads, a power of two of rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from codegen.kernels.append_to_cache import append_to_cache
from codegen.launching.launch import KernelCall
from codegen.templates.rounding import cache_rounding
from codegen.templates.template import KernelOp, Template, ceil_div
from qcompiler.dialects.state import is_within


class AppendProblem(NamedTuple):
    """Keys and values to append.

    Attributes:
        rows: Tokens times KV heads, over the batch.
        size: The larger of the head sizes of keys and values.
    """

    rows: int
    size: int


@dataclass(frozen=True)
class AppendConfig:
    """The tile of the kernel.

    Attributes:
        block_m: Rows, a power of two.
        warps: Warps that share the tile.
    """

    block_m: int
    warps: int
    variant: ClassVar[str] = "append"


class AppendOperands(NamedTuple):
    """The tensors of an append.

    Attributes:
        key: [batch, groups, tokens, size]; the last stride is 1.
        value: [batch, groups, tokens, value size]; likewise.
        cache: Key, value, and their scales or None: [slots, groups, held, ...], contiguous; written in place. Static
            scales are [1] and only read. Values within the keys are not written.
        slots: int64 [batch], contiguous.
        lengths: int64 [batch], contiguous.
        capacity: Maximum length of a sequence if the cache is a ring of `held` positions; None if it is not.
    """

    key: Tensor
    value: Tensor
    cache: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    slots: Tensor
    lengths: Tensor
    capacity: int | None = None


def append_configs(problem: AppendProblem) -> Mapping[AppendConfig, None]:
    """The configuration for a problem: many small tiles while the device is not full."""
    columns = 1 << max((problem.size - 1).bit_length(), 4)
    elements, warps = (4096, 4) if problem.rows > 4096 else (1024, 1)
    return {AppendConfig(max(elements // columns, 1), max(warps, columns // 1024)): None}


class AppendToCache(Template[AppendConfig, AppendProblem, AppendOperands]):
    """The one variant."""

    variant = AppendConfig.variant
    overlaps = True

    def calls(self, config: AppendConfig, operands: AppendOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        key, value, cache, slots, lengths, capacity = operands
        slot_count, _, held, _ = cache[0].shape
        batch, groups, tokens, size = key.shape
        rows = batch * groups * tokens
        unit = stride_unit(key, value)
        strides = (stride // unit for tensor in (key, value) for stride in tensor.stride()[:3])
        arguments = (key, value, *cache, slots, lengths, rows, tokens, slot_count, capacity or held, *strides)
        constants = {
            **cache_rounding(cache),
            "GROUPS": groups, "SIZE": size, "VALUE_SIZE": value.shape[3], "UNIT": unit, "BLOCK_M": config.block_m,
            "RING": held if capacity else None,
        }  # fmt: skip
        programs = (1 if is_within(cache) else 2) * ceil_div(rows, config.block_m)  # the second half appends values
        return (KernelCall(append_to_cache, programs, arguments, constants, {"num_warps": config.warps}),)


def stride_unit(*tensors: Tensor) -> int:
    """Elements in 16 bytes if all strides but the last are multiples of 16 bytes, else 1."""
    unit = 16 // min(tensor.element_size() for tensor in tensors)
    return unit if all(stride % unit == 0 for tensor in tensors for stride in tensor.stride()[:-1]) else 1


APPEND_TO_CACHE = KernelOp[AppendConfig, AppendProblem, AppendOperands]("append to a cache")
APPEND_TO_CACHE.add(AppendToCache, append_configs)
