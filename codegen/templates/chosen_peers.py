"""Exchanges of the tokens of experts between GPUs of a host: tiles of rows that spread them over many programs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from codegen.kernels.chosen_peers import exchange_chosen
from codegen.launching.launch import KernelCall
from codegen.templates.peers import PROGRAMS
from codegen.templates.template import KernelOp, Template, ceil_div, next_power_of_2

WIDEST = 1 << 11
"""Maximum bytes of a tile's row: then a tile of 4 KB has two rows."""

SMALL, LARGE = 1 << 12, 1 << 14
"""Bytes of tiles, which no kernel spills: with more ranks, tiles as large as a region do."""


class ChosenProblem(NamedTuple):
    """An exchange of tokens.

    Attributes:
        rows: Tokens of each rank.
        bytes: Bytes of a token.
    """

    rows: int
    bytes: int


@dataclass(frozen=True)
class ChosenConfig:
    """The tile of the kernel.

    Attributes:
        rows: Rows of a tile, a power of two.
        bytes: Bytes of its rows, a power of two.
        warps: Warps that share the tile.
    """

    rows: int
    bytes: int
    warps: int
    variant: ClassVar[str] = "chosen_peers"


class ChosenOperands(NamedTuple):
    """The tensors of an exchange.

    Attributes:
        x: What this rank has: its tokens `[share, width]`, as int8 or int32, or terms of all tokens `[tokens, width]`.
        experts: Integers `[tokens, chosen]`, contiguous.
        out: What it receives: `[tokens, width]`, or sums `[share, width]`; overwritten.
        memories: See `codegen.templates.peers.PeersOperands`; so are the steps, the rank and the patience.
        steps: int32 `[PROGRAMS]`.
        groups: The number of experts of all ranks.
        rank: The number of this rank.
        patience: Nanoseconds that it waits for another rank.
        summed: What is received is added.
    """

    x: Tensor
    experts: Tensor
    out: Tensor
    memories: Tensor
    steps: Tensor
    groups: int
    rank: int
    patience: int
    summed: bool


def chosen_configs(problem: ChosenProblem) -> Mapping[ChosenConfig, None]:
    """The configuration for a problem: tiles of 4 KB, or of 16 KB if there would be more tiles than programs."""
    width = min(next_power_of_2(problem.bytes), WIDEST)
    many = ceil_div(problem.rows * width, SMALL) * ceil_div(problem.bytes, width) > PROGRAMS
    size = LARGE if many else SMALL
    return {ChosenConfig(size // width, width, size >> 11): None}


class ExchangeChosen(Template[ChosenConfig, ChosenProblem, ChosenOperands]):
    """The one variant."""

    variant = ChosenConfig.variant
    overlaps = True

    def calls(self, config: ChosenConfig, operands: ChosenOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        x, experts, out, memories, steps, groups, rank, patience, summed = operands
        ranks, (tokens, chosen), width = memories.numel(), experts.shape, x.shape[1]
        share, columns, vector = ceil_div(tokens, ranks), config.bytes // x.element_size(), 16 // x.element_size()
        constants = {
            "RANKS": ranks, "PROGRAMS": PROGRAMS, "ROWS": config.rows, "COLUMNS": columns,
            "VECTOR": 1 if width % vector else vector, "HELD": groups // ranks, "CHOSEN": chosen,
            "WIDE": next_power_of_2(chosen), "SUMMED": summed,
        }  # fmt: skip
        programs = min(ceil_div(share, config.rows) * ceil_div(width, columns), PROGRAMS)
        arguments = (x, experts, out, memories, steps, tokens, share, width, rank, patience)
        return (KernelCall(exchange_chosen, programs, arguments, constants, {"num_warps": config.warps}),)


CHOSEN_PEERS = KernelOp[ChosenConfig, ChosenProblem, ChosenOperands]("exchange of chosen tokens between GPUs of a host")
CHOSEN_PEERS.add(ExchangeChosen, chosen_configs)
