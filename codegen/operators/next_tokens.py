"""The operator `next_tokens`, the end of a greedy decode step: on a GPU two kernels; elsewhere torch."""

from torch import Tensor

from codegen.launching.launch import on
from codegen.launching.replay import replayed
from codegen.operators.operator import Operator, declare
from codegen.targets.cuda import gpu_at
from codegen.templates.next_tokens import NEXT_TOKENS, NextTokensOperands, NextTokensProblem


def next_tokens_on_gpu(
    logits: Tensor, slots: Tensor, active: Tensor, tokens: Tensor, lengths: Tensor, row_tokens: Tensor,
    row_lengths: Tensor,
) -> None:  # fmt: skip
    """Enters the token with the largest logit of each row, the first of equal ones, and the length after this step.

    Args:
        logits: float[rows, vocabulary].
        slots: int64 [rows], contiguous, like the next ones.
        active: int64 [slots], 1 for slots whose sequence grows, else 0.
        tokens: int64 [slots], the latest tokens; written in place.
        lengths: int64 [slots]; likewise.
        row_tokens: int64 [rows], the latest tokens; written in place.
        row_lengths: int64 [rows], the lengths before this step; written in place.
    """
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    operands = NextTokensOperands(logits, slots, active, tokens, lengths, row_tokens, row_lengths)
    replayed(_run, "next_tokens", operands, operands)


def next_tokens_on_cpu(
    logits: Tensor, slots: Tensor, active: Tensor, tokens: Tensor, lengths: Tensor, row_tokens: Tensor,
    row_lengths: Tensor,
) -> None:  # fmt: skip
    """See `next_tokens_on_gpu`."""
    row_tokens.copy_(logits.argmax(-1))
    row_lengths += active[slots]
    tokens[slots], lengths[slots] = row_tokens, row_lengths


def next_tokens_fake(
    logits: Tensor, slots: Tensor, active: Tensor, tokens: Tensor, lengths: Tensor, row_tokens: Tensor,
    row_lengths: Tensor,
) -> None:  # fmt: skip
    """Nothing: the operator returns nothing, and its schema declares what it writes."""


def _run(operands: NextTokensOperands) -> tuple[()]:
    logits = operands.logits
    family = NEXT_TOKENS.family(gpu_at(logits.device))
    if logits.numel():
        with on(logits.device):
            family.launch(family.choose(NextTokensProblem(*logits.shape)), operands)
    return ()


NEXT_TOKENS_SCHEMA = (
    "next_tokens(Tensor logits, Tensor slots, Tensor active, Tensor(a!) tokens, Tensor(b!) lengths, "
    "Tensor(c!) row_tokens, Tensor(d!) row_lengths) -> ()"
)
declare(Operator(NEXT_TOKENS_SCHEMA, next_tokens_on_cpu, next_tokens_on_gpu, next_tokens_fake))
