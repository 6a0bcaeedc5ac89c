"""Attention over a KV cache: the tile, and the number of splits of the cache's length.

    decode, batch 1, 8 KV heads, 32 query heads     tile of 16 rows (4 used), many splits, then `combine_splits`
    decode, batch 256                               the same tile, one split, which writes the result itself
    a chunk of 512 tokens                           tiles of 64 rows for the wide tensor-core instruction, few splits

The number of splits depends only on sizes that a CUDA graph fixes. The kernel divides the actual length by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from codegen.kernels.attend_to_cache import attend_to_cache, combine_splits
from codegen.launching.launch import KernelCall
from codegen.launching.replay import empty
from codegen.templates.append_to_cache import stride_unit
from codegen.templates.template import KernelOp, Template, ceil_div, first_broken

LEAST_POSITIONS = 128
"""Positions that are worth a program: fewer do not pay for adding another split."""

MOST_SPLITS = 128
"""Splits that a program can combine in registers."""

STAGE_BYTES = 32768
"""Bytes of keys and values in a block of positions; three programs of three such blocks fit on a multiprocessor."""

DECODE_REGISTERS, MOST_REGISTERS = 168, 255
"""Registers of a thread. 168 let three programs of four warps run on a multiprocessor, and suffice for blocks of up to
64 positions; without a number, the compiler spills a few to fit a fourth."""

LARGEST_SIZE = 1024
"""Head size of a tile in shared memory."""

PROGRAMS = 2
"""Programs that run on a multiprocessor at once; a few more would need a second round."""

MOST_POSITIONS = 8192
"""Positions of a split, so that rows of different lengths keep all multiprocessors busy."""


class AttendProblem(NamedTuple):
    """Attention over a cache.

    Attributes:
        batch: Rows of the batch.
        groups: KV heads.
        repeats: Query heads of a KV head.
        tokens: New tokens of each row of the batch.
        size: Head size of keys.
        value_size: Head size of values.
        capacity: Positions of a slot.
        element_bytes: Bytes of an element of the cache.
        window: Positions that a token reads, or None for all.
        multiprocessors: Of the device.
    """

    batch: int
    groups: int
    repeats: int
    tokens: int
    size: int
    value_size: int
    capacity: int
    element_bytes: int
    window: int | None
    multiprocessors: int


@dataclass(frozen=True)
class AttendConfig:
    """Tile and splits.

    Attributes:
        block_m: Rows (tokens times query heads of a KV head), a power of two of at least 16.
        block_n: Positions, a power of two of at least 16.
        warps: Warps that share the tile.
        stages: Blocks of positions in flight or in use at once.
        splits: Programs that share the positions of a tile.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    splits: int
    variant: ClassVar[str] = "flash"


class AttendOperands(NamedTuple):
    """The tensors of the operation.

    Attributes:
        query: [batch, heads, tokens, size] in a floating dtype; the last stride is 1.
        cache: Key, value, and their scales or None: [slots, groups, capacity, ...], contiguous, or static scales [1].
        slots: int64 [batch], contiguous.
        lengths: int64 [batch], contiguous.
        sinks: [heads], contiguous, or None.
        out: The memory of the result, contiguous [batch, tokens, heads, value size]; overwritten.
        scale: Factor of the scores.
        window: As in `AttendProblem`.
        softcap: Limit of the scores, or None.
    """

    query: Tensor
    cache: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    slots: Tensor
    lengths: Tensor
    sinks: Tensor | None
    out: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None


def attend_configs(problem: AttendProblem) -> Mapping[AttendConfig, None]:
    """The configuration for a problem."""
    rows = problem.repeats * problem.tokens
    block_m = 64 if rows > 32 and not _misread(problem) else 32 if rows > 16 else 16
    row_bytes = (padded(problem.size) + padded(problem.value_size)) * problem.element_bytes
    block_n = min(max(1 << (STAGE_BYTES // row_bytes).bit_length() - 1, 16), 128 if block_m == 16 else 64)
    if problem.element_bytes == 4:  # multiplied in FP32, without tensor cores
        block_m, block_n = 16, 16
    stages = 3 if row_bytes * block_n <= STAGE_BYTES and problem.element_bytes < 4 else 2
    tile = AttendConfig(block_m, block_n, 4, stages, 1)
    return {replace(tile, splits=splits(problem, tile)): None}


def _misread(problem: AttendProblem) -> bool:
    """Whether tiles of 64 rows are wrong: Triton 3.6 misreads narrow pairs of codes in the wide instruction."""
    return problem.element_bytes == 1 and padded(problem.value_size) < 128


def splits(problem: AttendProblem, tile: AttendConfig) -> int:
    """Splits that give each multiprocessor enough programs, as far as the positions suffice."""
    programs = problem.batch * problem.groups * ceil_div(problem.repeats * problem.tokens, tile.block_m)
    positions = problem.capacity if problem.window is None else min(problem.capacity, problem.window + problem.tokens)
    fill = PROGRAMS * problem.multiprocessors // programs
    most = min(ceil_div(positions, LEAST_POSITIONS), MOST_SPLITS)
    least = ceil_div(positions, MOST_POSITIONS) if tile.block_m == 16 else 1
    return max(min(max(fill, least), most), 1)


def padded(size: int) -> int:
    """The next power of two, as tiles need."""
    return 1 << (size - 1).bit_length()


class AttendToCache(Template[AttendConfig, AttendProblem, AttendOperands]):
    """The one variant: each program reads one split of the positions."""

    variant = AttendConfig.variant
    overlaps = True

    def why_not(self, config: AttendConfig, problem: AttendProblem) -> str | None:
        """See `Template`."""
        largest, value_size = max(problem.size, problem.value_size), problem.value_size
        return first_broken((
            (largest > LARGEST_SIZE, f"a head has {largest} elements, more than {LARGEST_SIZE}"),
            (config.block_m >= 64 and _misread(problem), f"tiles of 64 rows misread codes of {value_size} columns"),
            (problem.element_bytes == 1 and value_size % 2 == 1, f"the 8-bit values of a head are odd: {value_size}"),
        ))  # fmt: skip

    def calls(self, config: AttendConfig, operands: AttendOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        query, cache, out = operands.query, operands.cache, operands.out
        batch, heads, tokens, size = query.shape
        slot_count, groups, capacity, value_size = cache[1].shape
        tiles = ceil_div(heads // groups * tokens, config.block_m)
        partial, logs = out, None
        if config.splits > 1:
            rows = (batch, tokens, heads, config.splits)
            partial = empty((*rows, value_size), torch.float32, query.device)
            logs = empty(rows, torch.float32, query.device)
        unit = stride_unit(query)
        strides = (stride // unit for stride in query.stride()[:3])
        arguments = (
            query, *cache, operands.slots, operands.lengths, operands.sinks, partial, logs, tokens, tiles,
            config.splits, slot_count, capacity, *strides,
        )  # fmt: skip
        constants = {
            "SCALE": operands.scale, "WINDOW": operands.window, "SOFTCAP": operands.softcap, "GROUPS": groups,
            "REPEATS": heads // groups, "SIZE": size, "VALUE_SIZE": value_size, "UNIT": unit,
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "LEAST": ceil_div(LEAST_POSITIONS, config.block_n),
            "STATIC": cache[2] is not None and cache[2].dim() == 1,
        }  # fmt: skip
        small = config.block_m == 16 and config.block_n <= 64
        light = small and padded(size) + padded(value_size) <= 384 and cache[0].element_size() < 4
        registers = DECODE_REGISTERS if light else MOST_REGISTERS
        options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": registers}
        programs = batch * groups * tiles * config.splits
        first = KernelCall(attend_to_cache, programs, arguments, constants, options)
        return (first,) if logs is None else (first, _combination(partial, logs, out))


def _combination(partial: Tensor, logs: Tensor, out: Tensor) -> KernelCall:
    """The call that adds the splits."""
    *rows, splits, value_size = partial.shape
    constants = {"VALUE_SIZE": value_size, "SPLITS": padded(splits)}
    warps = min(max(padded(splits) * padded(value_size) // 2048, 1), 8)
    programs = torch.Size(rows).numel()
    return KernelCall(combine_splits, programs, (partial, logs, out, splits), constants, {"num_warps": warps})


ATTEND_TO_CACHE = KernelOp[AttendConfig, AttendProblem, AttendOperands]("attention over a cache")
ATTEND_TO_CACHE.add(AttendToCache, attend_configs)
