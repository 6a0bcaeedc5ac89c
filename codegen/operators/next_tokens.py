"""The operators `rank_parts` and `enter_tokens`, the end of a decode step: on a GPU a kernel each; elsewhere torch.

    parts = rank_parts(logits, 0)                # i64[N, B]: the largest logits of N parts of each row
    enter_tokens(parts, slots, …)                # the largest of all becomes the next token

A rank that has some columns of the vocabulary gives the first one's index, and the ranks exchange their parts in
between.
"""

import torch
from torch import Tensor

from codegen.launching.launch import on
from codegen.launching.replay import empty, replayed
from codegen.operators.operator import Operator, declare
from codegen.targets.cuda import gpu_at
from codegen.templates.next_tokens import (
    ENTER_TOKENS,
    PART,
    RANK_PARTS,
    EnterTokensOperands,
    EnterTokensProblem,
    RankPartsOperands,
    RankPartsProblem,
)
from codegen.templates.template import ceil_div

LAST = 2**31 - 1
"""The largest index of a column."""


def chosen(parts: Tensor) -> Tensor:
    """The tokens that `enter_tokens` enters, i64[rows], the first of equal ones; parts i64[N, rows]."""
    return (parts.amax(0) & LAST) ^ LAST


def rank_parts_on_gpu(logits: Tensor, first: int) -> Tensor:
    """Returns the largest logit of each part of a row with its index, as numbers that compare like the logits.

    Args:
        logits: float[rows, columns], not wider than FP32; some columns of the vocabulary.
        first: The index of the first column.

    Returns:
        i64[N, rows]. Parts have 2048 columns each; on a CPU, a row is one part. The upper 32 bits are larger for larger
        logits and equal for equal ones, the lower ones are larger for smaller indices.
    """
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    return replayed(_rank_parts, ("rank_parts", first), (logits,), logits, first)


def rank_parts_on_cpu(logits: Tensor, first: int) -> Tensor:
    """See `rank_parts_on_gpu`; as there, NaN is the largest logit, and -0 equals 0."""
    index = logits.argmax(-1)
    best = logits.gather(1, index[:, None]).squeeze(1).float()
    bits = best.view(torch.int32)
    key = (bits ^ ((bits >> 31) & LAST)).masked_fill(best == 0, 0).masked_fill(best.isnan(), LAST)
    return ((key.long() << 32) | ((index + first) ^ LAST))[None]


def rank_parts_fake(logits: Tensor, first: int) -> Tensor:
    """The result without data."""
    rows, columns = logits.shape
    return logits.new_empty((ceil_div(columns, PART) if logits.is_cuda else 1, rows), dtype=torch.int64)


def enter_tokens_on_gpu(
    parts: Tensor, slots: Tensor, active: Tensor, tokens: Tensor, lengths: Tensor, row_tokens: Tensor,
    row_lengths: Tensor,
) -> None:  # fmt: skip
    """Enters the token with the largest logit of each row, the first of equal ones, and the length after this step.

    Args:
        parts: int64 [N, rows], contiguous, like the next ones: results of `rank_parts`, one below the other.
        slots: int64 [rows].
        active: int64 [slots], 1 for slots whose sequence grows, else 0.
        tokens: int64 [slots], the latest tokens; written in place.
        lengths: int64 [slots]; likewise.
        row_tokens: int64 [rows], the latest tokens; written in place.
        row_lengths: int64 [rows], the lengths before this step; written in place.
    """
    operands = EnterTokensOperands(parts, slots, active, tokens, lengths, row_tokens, row_lengths)
    replayed(_enter_tokens, "enter_tokens", operands, operands)


def enter_tokens_on_cpu(
    parts: Tensor, slots: Tensor, active: Tensor, tokens: Tensor, lengths: Tensor, row_tokens: Tensor,
    row_lengths: Tensor,
) -> None:  # fmt: skip
    """See `enter_tokens_on_gpu`."""
    row_tokens.copy_(chosen(parts))
    row_lengths += active[slots]
    tokens[slots], lengths[slots] = row_tokens, row_lengths


def enter_tokens_fake(
    parts: Tensor, slots: Tensor, active: Tensor, tokens: Tensor, lengths: Tensor, row_tokens: Tensor,
    row_lengths: Tensor,
) -> None:  # fmt: skip
    """Nothing: the operator returns nothing, and its schema declares what it writes."""


def _rank_parts(logits: Tensor, first: int) -> Tensor:
    rows, columns = logits.shape
    family = RANK_PARTS.family(gpu_at(logits.device))
    config = family.choose(RankPartsProblem(rows, columns))
    parts = empty((ceil_div(columns, config.part), rows), torch.int64, logits.device)
    if parts.numel():
        with on(logits.device):
            family.launch(config, RankPartsOperands(logits, parts, first))
    return parts


def _enter_tokens(operands: EnterTokensOperands) -> tuple[()]:
    parts = operands.parts
    family = ENTER_TOKENS.family(gpu_at(parts.device))
    if parts.numel():
        with on(parts.device):
            family.launch(family.choose(EnterTokensProblem(*parts.shape)), operands)
    return ()


RANK_PARTS_SCHEMA = "rank_parts(Tensor logits, int first) -> Tensor"
declare(Operator(RANK_PARTS_SCHEMA, rank_parts_on_cpu, rank_parts_on_gpu, rank_parts_fake))
ENTER_TOKENS_SCHEMA = (
    "enter_tokens(Tensor parts, Tensor slots, Tensor active, Tensor(a!) tokens, Tensor(b!) lengths, "
    "Tensor(c!) row_tokens, Tensor(d!) row_lengths) -> ()"
)
declare(Operator(ENTER_TOKENS_SCHEMA, enter_tokens_on_cpu, enter_tokens_on_gpu, enter_tokens_fake))
