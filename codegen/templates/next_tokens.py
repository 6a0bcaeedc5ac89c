"""The kernels that choose the most likely tokens: rows of logits are reduced in parts, then the parts of a row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from codegen.kernels.next_tokens import enter_tokens, rank_parts
from codegen.launching.launch import KernelCall
from codegen.launching.replay import empty
from codegen.templates.template import KernelOp, Template, ceil_div


class NextTokensProblem(NamedTuple):
    """Rows of logits.

    Attributes:
        rows: Sequences.
        columns: The vocabulary.
    """

    rows: int
    columns: int


@dataclass(frozen=True)
class NextTokensConfig:
    """The part of a row that a program reduces.

    Attributes:
        part: Logits, a power of two.
        warps: Warps that share a part.
    """

    part: int
    warps: int
    variant: ClassVar[str] = "next tokens"


class NextTokensOperands(NamedTuple):
    """The tensors of a step; all but the logits are int64 and contiguous.

    Attributes:
        logits: [rows, columns] in bfloat16, float16 or float32; the last stride is 1.
        slots: [rows].
        active: [slots], 1 for slots whose sequence grows, else 0.
        tokens: [slots], the latest tokens; overwritten for the slots of rows.
        lengths: [slots]; likewise.
        row_tokens: [rows], the latest tokens; overwritten.
        row_lengths: [rows], the lengths before this step; overwritten.
    """

    logits: Tensor
    slots: Tensor
    active: Tensor
    tokens: Tensor
    lengths: Tensor
    row_tokens: Tensor
    row_lengths: Tensor


def next_tokens_configs(problem: NextTokensProblem) -> Mapping[NextTokensConfig, None]:
    """The configuration for a problem: parts so small that one row occupies many multiprocessors."""
    return {NextTokensConfig(2048, 4): None}


class NextTokens(Template[NextTokensConfig, NextTokensProblem, NextTokensOperands]):
    """The one variant."""

    variant = NextTokensConfig.variant
    overlaps = True

    def calls(self, config: NextTokensConfig, operands: NextTokensOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        logits, *tables = operands
        rows, columns = logits.shape
        count = ceil_div(columns, config.part)
        parts = empty((rows, count), torch.int64, logits.device)
        arguments = (logits, parts, columns, logits.stride(0))
        constants = {"COUNT": count, "PART": config.part}
        first = KernelCall(rank_parts, rows * count, arguments, constants, {"num_warps": config.warps})
        constants = {"COUNT": count, "BLOCK": 1 << (count - 1).bit_length()}
        return first, KernelCall(enter_tokens, rows, (parts, *tables), constants, {"num_warps": 1})


NEXT_TOKENS = KernelOp[NextTokensConfig, NextTokensProblem, NextTokensOperands]("choice of tokens")
NEXT_TOKENS.add(NextTokens, next_tokens_configs)
