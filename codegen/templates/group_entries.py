"""The kernels of `kernel.group_entries`: one for few entries; for many, one that counts, and one that places."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from codegen.kernels.group_entries import count_entries, place_entries, rank_entries
from codegen.launching.launch import KernelCall
from codegen.launching.replay import empty
from codegen.templates.template import KernelOp, Template, ceil_div

FEW = 2048
"""Maximum entries that are compared with all others."""

TILES = ((1 << 13, 128), (1 << 15, 256), (1 << 31, 512))
"""Maximum entries, and the tile: the more entries, the larger, because each program reads the counts of all tiles."""


class GroupEntriesProblem(NamedTuple):
    """Entries to sort.

    Attributes:
        entries: Their number.
        groups: Number of groups.
    """

    entries: int
    groups: int


@dataclass(frozen=True)
class GroupEntriesConfig:
    """The tile of the kernels.

    Attributes:
        tile: Entries, a power of two.
        chunk: Groups, or entries, that they are compared with at once; a power of two.
        warps: Warps that share a tile.
        counted: Whether the groups of tiles are counted first.
    """

    tile: int
    chunk: int
    warps: int
    counted: bool
    variant: ClassVar[str] = "group entries"


class GroupEntriesOperands(NamedTuple):
    """The tensors of the operation.

    Attributes:
        keys: int64 `[n]`, contiguous.
        key: int64 `[n]`, contiguous, like the next three; overwritten.
        order: See `qcompiler.dialects.entries`.
        owner: Likewise.
        place: Likewise.
        ends: int32 `[groups]`; overwritten.
        each: Entries of an owner.
    """

    keys: Tensor
    key: Tensor
    order: Tensor
    owner: Tensor
    place: Tensor
    ends: Tensor
    each: int


def group_entries_configs(problem: GroupEntriesProblem) -> Mapping[GroupEntriesConfig, None]:
    """The configuration for a problem: 16 or 32 comparisons per thread at once. Measured on an H200."""
    if problem.entries <= FEW:
        return {GroupEntriesConfig(8, 256, 4, counted=False): None}
    tile = next(tile for most, tile in TILES if problem.entries <= most)
    chunk = min(1 << max((problem.groups - 1).bit_length(), 2), 32, 8192 // tile)
    return {GroupEntriesConfig(tile, chunk, max(tile * chunk // 1024, 1), counted=True): None}


class GroupEntries(Template[GroupEntriesConfig, GroupEntriesProblem, GroupEntriesOperands]):
    """The one variant."""

    variant = GroupEntriesConfig.variant
    overlaps = True

    def calls(self, config: GroupEntriesConfig, operands: GroupEntriesOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        keys, *written, each = operands
        n, groups = keys.shape[0], operands.ends.shape[0]
        options = {"num_warps": config.warps}
        constants = {"TILE": config.tile, "CHUNK": config.chunk}
        if not config.counted:
            programs = ceil_div(max(n, groups), config.tile)
            return (
                KernelCall(rank_entries, programs, (keys, *written, n, groups), {"EACH": each, **constants}, options),
            )
        tiles, padded = ceil_div(n, config.tile), ceil_div(groups, config.chunk) * config.chunk
        constants["GROUPS"] = padded
        counts = empty((tiles, padded), torch.int32, keys.device)
        placing = {"EACH": each, "TILES": config.tile // 4, **constants}
        return (
            KernelCall(count_entries, tiles, (keys, counts, n), constants, options),
            KernelCall(place_entries, tiles, (keys, counts, *written, n, groups, tiles), placing, options),
        )


GROUP_ENTRIES = KernelOp[GroupEntriesConfig, GroupEntriesProblem, GroupEntriesOperands]("grouping of entries")
GROUP_ENTRIES.add(GroupEntries, group_entries_configs)
