"""Attention over a KV cache whose values are within its keys: tiles of 64 query heads for one head of the cache.

decode, batch 1, 128 query heads       two tiles, 66 splits of the cache's length, then `combine_splits`
decode, batch 64                       two tiles for each row, one split
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from codegen.kernels.attend_to_latent import attend_to_latent
from codegen.launching.launch import KernelCall
from codegen.launching.replay import empty
from codegen.templates.append_to_cache import stride_unit
from codegen.templates.attend_to_cache import (
    ATTEND_TO_CACHE,
    LEAST_POSITIONS,
    AttendConfig,
    AttendOperands,
    AttendProblem,
    combination,
)
from codegen.templates.template import Template, ceil_div, first_broken

MOST_SPLITS = 64
"""Splits of 512 columns that a program of `combine_splits` holds in registers."""

LARGEST_SIZE = 512
"""Elements of a value whose sums two groups of four warps hold in registers."""


@dataclass(frozen=True)
class LatentConfig(AttendConfig):
    """Tile and splits, as without a latent."""

    variant: ClassVar[str] = "latent"


def latent_configs(problem: AttendProblem) -> Mapping[LatentConfig, None]:
    """The configuration for a problem; none unless values are within keys."""
    if not problem.within:
        return {}
    block_m, block_n, stages = (64, 64 // problem.element_bytes, 3)
    if problem.element_bytes == 4:  # multiplied in FP32, without tensor cores
        block_m, block_n, stages = 16, 16, 1
    programs = problem.batch * problem.groups * ceil_div(problem.repeats * problem.tokens, block_m)
    most = min(ceil_div(problem.capacity, LEAST_POSITIONS), MOST_SPLITS)
    splits = max(min(problem.multiprocessors // programs, most), 1)
    return {LatentConfig(block_m, block_n, 8, stages, splits): None}


class AttendToLatent(Template[LatentConfig, AttendProblem, AttendOperands]):
    """Each program reads one split of the positions, once for keys and values."""

    variant = LatentConfig.variant
    overlaps = True

    def why_not(self, config: LatentConfig, problem: AttendProblem) -> str | None:
        """See `Template`."""
        return first_broken((
            (not problem.within, "the values are not within the keys"),
            (problem.window is not None, "attention over a latent has no window"),
            (problem.value_size > LARGEST_SIZE, f"a value has {problem.value_size} elements, more than {LARGEST_SIZE}"),
        ))  # fmt: skip

    def calls(self, config: LatentConfig, operands: AttendOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        query, out = operands.query, operands.out
        assert isinstance(out, Tensor)
        batch, heads, tokens, _ = query.shape
        if config.splits == 1:
            return (_attention(config, operands, out, None),)
        rows, value_size = (batch, tokens, heads, config.splits), operands.cache[1].shape[3]
        partial = empty((*rows, value_size), torch.float32, query.device)
        logs = empty(rows, torch.float32, query.device)
        return _attention(config, operands, partial, logs), combination(partial, logs, out, query.dtype)


def _attention(config: LatentConfig, operands: AttendOperands, out: Tensor, logs: Tensor | None) -> KernelCall:
    """The call that reads the cache, and writes the result or, with `logs`, the sums of the splits."""
    query, (key, value, scale, _) = operands.query, operands.cache
    batch, heads, tokens, size = query.shape
    slot_count, groups, capacity, value_size = value.shape
    tiles = ceil_div(heads // groups * tokens, config.block_m)
    unit = stride_unit(query)
    strides = (stride // unit for stride in query.stride()[:3])
    arguments = (
        query, key, scale, operands.slots, operands.lengths, out, logs, tokens, tiles, config.splits, slot_count,
        capacity, *strides,
    )  # fmt: skip
    constants = {
        "SCALE": operands.scale, "GROUPS": groups, "REPEATS": heads // groups, "SIZE": size, "VALUE_SIZE": value_size,
        "UNIT": unit, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "LEAST": ceil_div(LEAST_POSITIONS, config.block_n), "STATIC": scale is not None and scale.dim() == 1,
    }  # fmt: skip
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return KernelCall(attend_to_latent, batch * groups * tiles * config.splits, arguments, constants, options)


ATTEND_TO_CACHE.add(AttendToLatent, latent_configs)
