"""The kernels around matmuls that store their results in the memory of other GPUs: see `codegen.kernels.inboxes`."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import ClassVar, NamedTuple

from torch import Tensor

from codegen.kernels.inboxes import HEAD, open_inboxes, sum_inbox
from codegen.launching.launch import KernelCall
from codegen.templates.template import KernelOp, Template, ceil_div

HEAD_BYTES: int = HEAD.value
"""Bytes of signals at the start of a memory."""

ALIGNED = 128
"""Alignment of each rank's terms, in bytes: one line of the L2 cache."""


class Ways(NamedTuple):
    """How the ranks reach each other.

    Attributes:
        memories: int64 `[ranks]`: addresses, on this GPU, of the memory of each rank.
        steps: int32 `[3]`, zeros before the first call; written.
        rank: The number of this rank.
        patience: Nanoseconds that it waits for another rank.
    """

    memories: Tensor
    steps: Tensor
    rank: int
    patience: int


class OpenProblem(NamedTuple):
    """The beginning of a call.

    Attributes:
        ranks: Number of ranks.
    """

    ranks: int


@dataclass(frozen=True)
class OpenConfig:
    """One program.

    Attributes:
        warps: Its warps.
    """

    warps: int
    variant: ClassVar[str] = "open inboxes"


class OpenOperands(NamedTuple):
    """A call.

    Attributes:
        ways: Between the ranks.
        turn: 0 or 1.
    """

    ways: Ways
    turn: int


class SumProblem(NamedTuple):
    """A sum of the terms in an inbox.

    Attributes:
        bytes: Of the result.
        multiprocessors: Of the GPU.
    """

    bytes: int
    multiprocessors: int


@dataclass(frozen=True)
class SumConfig:
    """The tile of the kernel.

    Attributes:
        bytes: Bytes of a tile, a power of two.
        warps: Warps that share a tile.
        programs: The maximum number of programs.
    """

    bytes: int
    warps: int
    programs: int
    variant: ClassVar[str] = "sum of an inbox"


class SumOperands(NamedTuple):
    """A sum.

    Attributes:
        out: The result, contiguous: bfloat16, float16 or float32; overwritten.
        ways: Between the ranks.
        turn: Where this rank has stored its terms, 0 or 1.
        size: Bytes of a turn.
        slot: Bytes that are reserved for the terms of each rank.
        stored: The number of elements that the ranks have stored; those after them are zero.
    """

    out: Tensor
    ways: Ways
    turn: int
    size: int
    slot: int
    stored: int


def open_configs(problem: OpenProblem) -> Mapping[OpenConfig, None]:
    """The configuration for a problem."""
    return {OpenConfig(1): None}


def sum_configs(problem: SumProblem) -> Mapping[SumConfig, None]:
    """The configuration for a problem."""
    return {SumConfig(1 << 13, 8, 4 * problem.multiprocessors): None}


class OpenInboxes(Template[OpenConfig, OpenProblem, OpenOperands]):
    """The one variant."""

    variant = OpenConfig.variant
    overlaps = True

    def calls(self, config: OpenConfig, operands: OpenOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        (memories, steps, rank, patience), turn = operands
        constants, options = {"RANKS": memories.numel()}, {"num_warps": config.warps}
        return (KernelCall(open_inboxes, 1, (memories, steps, turn, rank, patience), constants, options),)


class SumInbox(Template[SumConfig, SumProblem, SumOperands]):
    """The one variant."""

    variant = SumConfig.variant
    overlaps = True

    def calls(self, config: SumConfig, operands: SumOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        out, (memories, steps, rank, patience), turn, size, slot, stored = operands
        count, tile = out.numel(), config.bytes // out.element_size()
        vector = gcd(count, stored, 16 // out.element_size())
        constants = {"RANKS": memories.numel(), "TILE": tile, "VECTOR": vector}
        programs = min(ceil_div(count, tile), config.programs)
        arguments = (out, memories, steps, turn, size, slot, count, stored, rank, patience)
        return (KernelCall(sum_inbox, programs, arguments, constants, {"num_warps": config.warps}),)


OPEN_INBOXES = KernelOp[OpenConfig, OpenProblem, OpenOperands]("opening of inboxes")
OPEN_INBOXES.add(OpenInboxes, open_configs)

SUM_INBOX = KernelOp[SumConfig, SumProblem, SumOperands]("sum of an inbox")
SUM_INBOX.add(SumInbox, sum_configs)
