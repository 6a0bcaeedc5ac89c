"""Collectives of GPUs of a host through each other's memory: tiles that spread them over many programs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from codegen.kernels.peers import REGION, exchange
from codegen.launching.launch import KernelCall
from codegen.templates.template import KernelOp, Template, ceil_div

PROGRAMS = 256
"""Programs that have regions in the memory of each rank: two for each multiprocessor."""

REGION_BYTES: int = REGION.value
"""Bytes that a program can receive from one rank in a step."""

SIGNAL_BYTES = 4


class PeersProblem(NamedTuple):
    """A collective.

    Attributes:
        bytes: Bytes that a rank sends to each other rank.
    """

    bytes: int


@dataclass(frozen=True)
class PeersConfig:
    """The tile of the kernel.

    Attributes:
        bytes: Bytes of a tile, a power of two.
        warps: Warps that share the tile.
    """

    bytes: int
    warps: int
    variant: ClassVar[str] = "peers"


class PeersOperands(NamedTuple):
    """The tensors of a collective.

    Attributes:
        x: What this rank sends, contiguous: the same to all, or `[ranks, …]`. Floating, or int8 if not summed.
        out: What it receives, contiguous: a sum, or `[ranks, …]`; overwritten.
        memories: int64 `[ranks]`: addresses, on this GPU, of `memory_bytes` bytes of each rank.
        steps: int32 `[PROGRAMS]`, zeros before the first collective; incremented.
        rank: The number of this rank.
        patience: Nanoseconds that it waits for another rank.
        scattered: Each rank gets another part.
        summed: What is received is added.
    """

    x: Tensor
    out: Tensor
    memories: Tensor
    steps: Tensor
    rank: int
    patience: int
    scattered: bool
    summed: bool


def memory_bytes(ranks: int) -> int:
    """Bytes of memory of each rank that the others write to."""
    return PROGRAMS * ranks * (2 * REGION_BYTES + SIGNAL_BYTES)


def peers_configs(problem: PeersProblem) -> Mapping[PeersConfig, None]:
    """The configuration for a problem: tiles of 4 KB, larger ones if there would be more tiles than programs."""
    size = 1 << 12
    while size < REGION_BYTES and problem.bytes > size * PROGRAMS:
        size *= 2
    return {PeersConfig(size, min(size >> 10, 16)): None}


class Exchange(Template[PeersConfig, PeersProblem, PeersOperands]):
    """The one variant."""

    variant = PeersConfig.variant
    overlaps = True

    def calls(self, config: PeersConfig, operands: PeersOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        x, out, memories, steps, rank, patience, scattered, summed = operands
        ranks = memories.numel()
        count = x.numel() // ranks if scattered else x.numel()
        tile, vector = config.bytes // x.element_size(), 16 // x.element_size()
        constants = {
            "RANKS": ranks, "PROGRAMS": PROGRAMS, "TILE": tile, "VECTOR": 1 if count % vector else vector,
            "SCATTERED": scattered, "SUMMED": summed,
        }  # fmt: skip
        programs = min(ceil_div(count, tile), PROGRAMS)
        arguments = (x, out, memories, steps, count, rank, patience)
        return (KernelCall(exchange, programs, arguments, constants, {"num_warps": config.warps}),)


PEERS = KernelOp[PeersConfig, PeersProblem, PeersOperands]("exchange between GPUs of a host")
PEERS.add(Exchange, peers_configs)
