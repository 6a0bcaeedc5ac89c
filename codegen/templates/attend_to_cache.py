"""Attention over a KV cache: the tile, and the number of splits of the cache's length.

    decode, batch 1, 8 KV heads, 32 query heads     tile of 16 rows (4 used), many splits, then `combine_splits`
    decode, batch 256                               the same tile, one split, which writes the result itself
    a chunk of 512 tokens                           tiles of 64 rows for the wide tensor-core instruction, few splits

The number of splits depends only on sizes that a CUDA graph fixes. The kernel divides the actual length by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from codegen.kernels.attend_to_cache import attend_to_cache, combine_splits
from codegen.launching.launch import KernelCall
from codegen.launching.replay import empty
from codegen.templates.append_to_cache import stride_unit
from codegen.templates.quantize import QuantizeOperands, QuantizeTiles, quantize_config
from codegen.templates.rounding import rounding
from codegen.templates.template import KernelOp, Template, ceil_div, first_broken, next_power_of_2
from qcompiler import numerics

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

TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


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
        window: Positions that a token reads at most, or None for all.
        multiprocessors: Of the device.
        within: Whether the values are the first elements of the keys.
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
    within: bool = False


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


class QuantizedRows(NamedTuple):
    """A result that is quantized: each token's heads are one row.

    Attributes:
        codes: An 8-bit format [batch, tokens, heads * value size], contiguous; overwritten.
        scale: FP32 [batch, tokens, scales], any strides whose leading two collapse; overwritten.
        tile: Columns that share a scale: a divisor of the value size, or a multiple.
        profile: A name of `numerics.PROFILES`.
    """

    codes: Tensor
    scale: Tensor
    tile: int
    profile: str


class AttendOperands(NamedTuple):
    """The tensors of the operation.

    Attributes:
        query: [batch, heads, tokens, size] in a floating dtype; the last stride is 1.
        cache: Key, value, and their scales or None: [slots, groups, held, ...], contiguous, or static scales [1].
        slots: int64 [batch], contiguous.
        lengths: int64 [batch], contiguous.
        sinks: [heads], contiguous, or None.
        out: The memory of the result, contiguous [batch, tokens, heads, value size]; overwritten. Or the result is
            quantized, after it is rounded to the dtype of the query.
        scale: Factor of the scores.
        window: Latest positions that a token reads, or None for all.
        softcap: Limit of the scores, or None.
        capacity: Maximum length of a sequence if the cache is a ring of `held` positions; None if it is not.
        chunk: Positions of a chunk, of which a token reads only its own, or None for all.
        slopes: float32 [heads], contiguous, or None.
    """

    query: Tensor
    cache: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    slots: Tensor
    lengths: Tensor
    sinks: Tensor | None
    out: Tensor | QuantizedRows
    scale: float
    window: int | None = None
    softcap: float | None = None
    capacity: int | None = None
    chunk: int | None = None
    slopes: Tensor | None = None


def attend_configs(problem: AttendProblem) -> Mapping[AttendConfig, None]:
    """The configuration for a problem."""
    rows = problem.repeats * problem.tokens
    block_m = 64 if rows > 32 and not _misread(problem) else 32 if rows > 16 else 16
    row_bytes = (next_power_of_2(problem.size) + next_power_of_2(problem.value_size)) * problem.element_bytes
    block_n = min(max(1 << (STAGE_BYTES // row_bytes).bit_length() - 1, 16), 128 if block_m == 16 else 64)
    if problem.element_bytes == 4:  # multiplied in FP32, without tensor cores
        block_m, block_n = 16, 16
    stages = 3 if row_bytes * block_n <= STAGE_BYTES and problem.element_bytes < 4 else 2
    tile = AttendConfig(block_m, block_n, 4, stages, 1)
    return {replace(tile, splits=splits(problem, tile)): None}


def _misread(problem: AttendProblem) -> bool:
    """Whether tiles of 64 rows are wrong: Triton 3.6 misreads narrow pairs of codes in the wide instruction."""
    return problem.element_bytes == 1 and next_power_of_2(problem.value_size) < 128


def splits(problem: AttendProblem, tile: AttendConfig) -> int:
    """Splits that give each multiprocessor enough programs, as far as the positions suffice."""
    programs = problem.batch * problem.groups * ceil_div(problem.repeats * problem.tokens, tile.block_m)
    positions = problem.capacity if problem.window is None else min(problem.capacity, problem.window + problem.tokens)
    fill = PROGRAMS * problem.multiprocessors // programs
    most = min(ceil_div(positions, LEAST_POSITIONS), MOST_SPLITS)
    least = ceil_div(positions, MOST_POSITIONS) if tile.block_m == 16 else 1
    return max(min(max(fill, least), most), 1)


class AttendToCache(Template[AttendConfig, AttendProblem, AttendOperands]):
    """The one variant: each program reads one split of the positions."""

    variant = AttendConfig.variant
    overlaps = True

    def why_not(self, config: AttendConfig, problem: AttendProblem) -> str | None:
        """See `Template`."""
        largest, value_size = max(problem.size, problem.value_size), problem.value_size
        return first_broken((
            (problem.within, "the values are within the keys"),
            (largest > LARGEST_SIZE, f"a head has {largest} elements, more than {LARGEST_SIZE}"),
            (config.block_m >= 64 and _misread(problem), f"tiles of 64 rows misread codes of {value_size} columns"),
            (problem.element_bytes == 1 and value_size % 2 == 1, f"the 8-bit values of a head are odd: {value_size}"),
        ))  # fmt: skip

    def calls(self, config: AttendConfig, operands: AttendOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        query, cache, out = operands.query, operands.cache, operands.out
        batch, heads, tokens, _ = query.shape
        value_size = cache[1].shape[3]
        rows = (batch, tokens, heads)
        if config.splits > 1:
            partial = empty((*rows, config.splits, value_size), torch.float32, query.device)
            logs = empty((*rows, config.splits), torch.float32, query.device)
            return _attention(config, operands, partial, logs), combination(partial, logs, out, query.dtype)
        if isinstance(out, Tensor) or value_size % out.tile == 0:
            return (_attention(config, operands, out, None),)
        # Several heads share a scale, and different programs may compute them.
        heads_of = empty((*rows, value_size), query.dtype, query.device)
        matrix = QuantizeOperands(heads_of.view(batch * tokens, -1), *out[:2], (1, out.tile), out.profile)
        last = QuantizeTiles(self.gpu).calls(quantize_config(batch * tokens, out.tile), matrix)
        return _attention(config, operands, heads_of, None), *last


def _attention(
    config: AttendConfig, operands: AttendOperands, out: Tensor | QuantizedRows, logs: Tensor | None
) -> KernelCall:
    """The call that reads the cache, and writes the result or, with `logs`, the sums of the splits."""
    query, cache = operands.query, operands.cache
    batch, heads, tokens, size = query.shape
    slot_count, groups, held, value_size = cache[1].shape
    tiles = ceil_div(heads // groups * tokens, config.block_m)
    unit = stride_unit(query)
    strides = (stride // unit for stride in query.stride()[:3])
    written, scale_strides, quantized = _stored(out)
    arguments = (
        query, *cache, operands.slots, operands.lengths, operands.sinks, operands.slopes, *written, logs, tokens,
        tiles, config.splits, slot_count, operands.capacity or held, *strides, *scale_strides,
    )  # fmt: skip
    constants = {
        "SCALE": operands.scale, "WINDOW": operands.window, "CHUNK": operands.chunk, "SOFTCAP": operands.softcap,
        "GROUPS": groups, "REPEATS": heads // groups, "SIZE": size, "VALUE_SIZE": value_size, "UNIT": unit,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "LEAST": ceil_div(LEAST_POSITIONS, config.block_n),
        "STATIC": cache[2] is not None and cache[2].dim() == 1, "RING": held if operands.capacity else None,
        "AHEAD": tokens == 1, **quantized,
    }  # fmt: skip
    small = config.block_m == 16 and config.block_n <= 64
    light = small and next_power_of_2(size) + next_power_of_2(value_size) <= 384 and cache[0].element_size() < 4
    registers = DECODE_REGISTERS if light else MOST_REGISTERS
    options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": registers}
    return KernelCall(attend_to_cache, batch * groups * tiles * config.splits, arguments, constants, options)


def combination(partial: Tensor, logs: Tensor, out: Tensor | QuantizedRows, dtype: torch.dtype) -> KernelCall:
    """The call that adds the splits."""
    batch, tokens, heads, splits, value_size = partial.shape
    together = 1 if isinstance(out, Tensor) else max(out.tile // value_size, 1)
    written, scale_strides, quantized = _stored(out)
    constants = {
        "VALUE_SIZE": value_size, "SPLITS": next_power_of_2(splits), "HEADS": heads, "TOGETHER": together,
        "DTYPE": TRITON_TYPES[dtype], **quantized,
    }  # fmt: skip
    warps = min(max(next_power_of_2(splits) * together * next_power_of_2(value_size) // 2048, 1), 8)
    programs, arguments = batch * tokens * ceil_div(heads, together), (partial, logs, *written, splits, *scale_strides)
    return KernelCall(combine_splits, programs, arguments, constants, {"num_warps": warps})


def _stored(out: Tensor | QuantizedRows) -> tuple[tuple[Tensor, Tensor | None], tuple[int, int], dict[str, Any]]:
    """The result's memory and its scales, the strides of the scales, and the constants of the quantization."""
    if isinstance(out, Tensor):
        return (out, None), (0, 0), {"TILE": 1, **rounding(numerics.DEFAULT_PROFILE, torch.float8_e4m3fn)}
    codes, scale, tile, profile = out
    strides = (scale.stride(1), scale.stride(2))
    return (codes, scale), strides, {"TILE": tile, **rounding(profile, codes.dtype)}


ATTEND_TO_CACHE = KernelOp[AttendConfig, AttendProblem, AttendOperands]("attention over a cache")
ATTEND_TO_CACHE.add(AttendToCache, attend_configs)
