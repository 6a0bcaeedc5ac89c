"""The kernel that reads a KV cache into contiguous keys and values: a tile of positions, a power of two."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from codegen.kernels.read_cache import read_cache
from codegen.launching.launch import KernelCall
from codegen.templates.template import KernelOp, Template, ceil_div

ELEMENTS = 4096
"""Elements of a tile: 32 for each thread."""


class ReadProblem(NamedTuple):
    """Keys and values to read.

    Attributes:
        rows: Positions times KV heads, over the batch.
        size: The larger of the head sizes of keys and values.
    """

    rows: int
    size: int


@dataclass(frozen=True)
class ReadConfig:
    """The tile of the kernel.

    Attributes:
        block_m: Rows, a power of two.
        warps: Warps that share the tile.
    """

    block_m: int
    warps: int
    variant: ClassVar[str] = "read"


class ReadOperands(NamedTuple):
    """The tensors of a read.

    Attributes:
        cache: Key, value, and their scales or None: [slots, groups, capacity, ...], contiguous, or static scales [1].
        slots: int64 [batch], contiguous.
        key: The memory of the keys [batch, groups, end, size] in a floating dtype, contiguous; overwritten.
        value: The memory of the values [batch, groups, end, value size]; likewise.
    """

    cache: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    slots: Tensor
    key: Tensor
    value: Tensor


def read_configs(problem: ReadProblem) -> Mapping[ReadConfig, None]:
    """The configuration for a problem."""
    columns = 1 << max((problem.size - 1).bit_length(), 4)
    return {ReadConfig(max(ELEMENTS // columns, 1), max(4, columns // 1024)): None}


class ReadCache(Template[ReadConfig, ReadProblem, ReadOperands]):
    """The one variant."""

    variant = ReadConfig.variant
    overlaps = True

    def calls(self, config: ReadConfig, operands: ReadOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        cache, slots, key, value = operands
        batch, groups, end, size = key.shape
        rows = batch * groups * end
        arguments = (key, value, *cache, slots, rows, end, cache[0].shape[0], cache[0].shape[2])
        static = cache[2] is not None and cache[2].dim() == 1
        constants = {
            "GROUPS": groups, "SIZE": size, "VALUE_SIZE": value.shape[3], "STATIC": static, "BLOCK_M": config.block_m,
        }  # fmt: skip
        programs = 2 * ceil_div(rows, config.block_m)
        return (KernelCall(read_cache, programs, arguments, constants, {"num_warps": config.warps}),)


READ_CACHE = KernelOp[ReadConfig, ReadProblem, ReadOperands]("read from a cache")
READ_CACHE.add(ReadCache, read_configs)
