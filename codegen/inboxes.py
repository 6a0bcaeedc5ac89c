"""Memory in which GPUs of a host store the results of matmuls for each other: see `codegen.kernels.inboxes`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from codegen.templates.inboxes import ALIGNED, HEAD_BYTES, Ways
from codegen.templates.template import ceil_div, next_power_of_2

SMALLEST = 1 << 26
"""Bytes of the first inbox of a group, for one turn; a larger one replaces it when it is needed."""

LARGEST = 1 << 29
"""Bytes for one turn, at most."""


@dataclass
class Inboxes:
    """The inboxes of a group of GPUs; its calls must not overlap on two streams.

    Attributes:
        parts: Each rank's memory, as bytes on this GPU.
        ways: Between the ranks.
        bytes: Of a turn.
        turn: The turn of the last call.
    """

    parts: tuple[Tensor, ...]
    ways: Ways
    bytes: int
    turn: int = 0

    def next_turn(self) -> int:
        """The turn of a new call of this rank: 0 or 1. In a CUDA graph, a call keeps its turn."""
        self.turn ^= 1
        return self.turn

    def place(self, to: int, turn: int, slot: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Where this rank stores a matrix for a rank; `slot` bytes are reserved for the terms of each rank."""
        begin = HEAD_BYTES + turn * self.bytes + self.ways.rank * slot
        size = shape[0] * shape[1] * dtype.itemsize
        return self.parts[to][begin : begin + size].view(dtype).view(shape)


def slot_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Bytes for the terms of one rank."""
    return ceil_div(rows * columns * dtype.itemsize, ALIGNED) * ALIGNED


class Shared(NamedTuple):
    """Memory of each rank that all ranks of a group can address.

    Attributes:
        parts: Each rank's memory, as bytes on this GPU.
        memories: int64 `[ranks]`: their addresses.
        rank: The number of this rank.
        patience: Nanoseconds that it waits for another rank.
    """

    parts: tuple[Tensor, ...]
    memories: Tensor
    rank: int
    patience: int


@dataclass
class Growing:
    """The inboxes of a group, made when they are needed. CUDA graphs may use the earlier ones, so these are kept."""

    made: list[Inboxes] = field(default_factory=list)

    def of(self, bytes: int, connect: Callable[[int], Shared] | None) -> Inboxes | None:
        """Inboxes with `bytes` for a turn; None if that is too much, or new ones must not be made now.

        Args:
            bytes: For a turn.
            connect: Makes memory of a size on all ranks, with zeros; None if it must not be called.
        """
        if self.made and self.made[-1].bytes >= bytes:
            return self.made[-1]
        if connect is None or bytes > LARGEST:
            return None
        size = max(SMALLEST, next_power_of_2(bytes))
        parts, memories, rank, patience = connect(HEAD_BYTES + 2 * size)
        steps = torch.zeros(3, dtype=torch.int32, device=memories.device)
        self.made.append(Inboxes(parts, Ways(memories, steps, rank, patience), size))
        return self.made[-1]
