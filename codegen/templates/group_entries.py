"""The kernels of `kernel.group_entries`: one for few entries; else one that counts, and one that places."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from codegen.kernels.group_entries import count_entries, place_entries
from codegen.launching.launch import KernelCall
from codegen.launching.replay import empty
from codegen.templates.template import KernelOp, Template, ceil_div

ONE_TILE = 1024
"""Maximum entries that one program places alone."""

MANY = 1 << 16
"""Entries from which tiles are large, so that there are fewer counts, all of which each program reads."""


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
        chunk: Groups at once, a power of two.
        warps: Warps that share a tile.
    """

    tile: int
    chunk: int
    warps: int
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
    """The configuration for a problem: at most 32 comparisons per thread at once."""
    tile = 256
    if problem.entries <= ONE_TILE:
        tile = 1 << max((problem.entries - 1).bit_length(), 5)
    elif problem.entries > MANY:
        tile = 512
    chunk = min(1 << max((problem.groups - 1).bit_length(), 2), 32, 8192 // tile)
    return {GroupEntriesConfig(tile, chunk, max(tile * chunk // 1024, 1)): None}


class GroupEntries(Template[GroupEntriesConfig, GroupEntriesProblem, GroupEntriesOperands]):
    """The one variant."""

    variant = GroupEntriesConfig.variant
    overlaps = True

    def calls(self, config: GroupEntriesConfig, operands: GroupEntriesOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        keys, key, order, owner, place, ends, each = operands
        n, groups = keys.shape[0], ends.shape[0]
        tiles = ceil_div(n, config.tile)
        padded = ceil_div(groups, config.chunk) * config.chunk
        constants = {"GROUPS": padded, "TILE": config.tile, "CHUNK": config.chunk}
        options = {"num_warps": config.warps}
        counts = None if tiles == 1 else empty((tiles, padded), torch.int32, keys.device)
        arguments = (keys, counts, key, order, owner, place, ends, n, groups, tiles)
        placing = KernelCall(place_entries, tiles, arguments, {"GROUPS": padded, "EACH": each, **constants}, options)
        if counts is None:
            return (placing,)
        return KernelCall(count_entries, tiles, (keys, counts, n), constants, options), placing


GROUP_ENTRIES = KernelOp[GroupEntriesConfig, GroupEntriesProblem, GroupEntriesOperands]("grouping of entries")
GROUP_ENTRIES.add(GroupEntries, group_entries_configs)
