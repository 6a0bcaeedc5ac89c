"""The kernels that choose the most likely tokens: rows of logits are reduced in parts, then the parts of a row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from codegen.kernels.next_tokens import enter_tokens, rank_parts
from codegen.launching.launch import KernelCall
from codegen.templates.template import KernelOp, Template, ceil_div, next_power_of_2

PART = 2048
"""Logits that a program reduces: so few that one row occupies many multiprocessors."""


class RankPartsProblem(NamedTuple):
    """Rows of logits.

    Attributes:
        rows: Sequences.
        columns: The vocabulary, or a rank's part of it.
    """

    rows: int
    columns: int


@dataclass(frozen=True)
class RankPartsConfig:
    """The part of a row that a program reduces.

    Attributes:
        part: Logits, a power of two.
        warps: Warps that share a part.
    """

    part: int
    warps: int
    variant: ClassVar[str] = "largest logits of parts"


class RankPartsOperands(NamedTuple):
    """The logits of a step.

    Attributes:
        logits: [rows, columns] in bfloat16, float16 or float32; the last stride is 1.
        parts: int64 [parts of a row, rows], contiguous; overwritten.
        first: The index of the first column.
    """

    logits: Tensor
    parts: Tensor
    first: int


class EnterTokensProblem(NamedTuple):
    """Candidates for the next tokens.

    Attributes:
        parts: Candidates of a row.
        rows: Sequences.
    """

    parts: int
    rows: int


@dataclass(frozen=True)
class EnterTokensConfig:
    """A program enters the token of one row.

    Attributes:
        warps: Warps of a program.
    """

    warps: int
    variant: ClassVar[str] = "next tokens"


class EnterTokensOperands(NamedTuple):
    """The tensors of a step, all int64 and contiguous.

    Attributes:
        parts: [parts, rows], as `rank_parts` writes them.
        slots: [rows].
        active: [slots], 1 for slots whose sequence grows, else 0.
        tokens: [slots], the latest tokens; overwritten for the slots of rows.
        lengths: [slots]; likewise.
        row_tokens: [rows], the latest tokens; overwritten.
        row_lengths: [rows], the lengths before this step; overwritten.
    """

    parts: Tensor
    slots: Tensor
    active: Tensor
    tokens: Tensor
    lengths: Tensor
    row_tokens: Tensor
    row_lengths: Tensor


def rank_parts_configs(problem: RankPartsProblem) -> Mapping[RankPartsConfig, None]:
    """The configuration for a problem."""
    return {RankPartsConfig(PART, 4): None}


def enter_tokens_configs(problem: EnterTokensProblem) -> Mapping[EnterTokensConfig, None]:
    """The configuration for a problem."""
    return {EnterTokensConfig(1): None}


class RankParts(Template[RankPartsConfig, RankPartsProblem, RankPartsOperands]):
    """The one variant."""

    variant = RankPartsConfig.variant
    overlaps = True

    def calls(self, config: RankPartsConfig, operands: RankPartsOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        logits, parts, first = operands
        rows, columns = logits.shape
        arguments = (logits, parts, rows, columns, logits.stride(0), first)
        programs = rows * ceil_div(columns, config.part)
        return (KernelCall(rank_parts, programs, arguments, {"PART": config.part}, {"num_warps": config.warps}),)


class EnterTokens(Template[EnterTokensConfig, EnterTokensProblem, EnterTokensOperands]):
    """The one variant."""

    variant = EnterTokensConfig.variant
    overlaps = True

    def calls(self, config: EnterTokensConfig, operands: EnterTokensOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        count, rows = operands.parts.shape
        constants = {"COUNT": count, "BLOCK": next_power_of_2(count)}
        return (KernelCall(enter_tokens, rows, tuple(operands), constants, {"num_warps": config.warps}),)


RANK_PARTS = KernelOp[RankPartsConfig, RankPartsProblem, RankPartsOperands]("ranking of logits")
RANK_PARTS.add(RankParts, rank_parts_configs)

ENTER_TOKENS = KernelOp[EnterTokensConfig, EnterTokensProblem, EnterTokensOperands]("choice of tokens")
ENTER_TOKENS.add(EnterTokens, enter_tokens_configs)
