"""The operator `exchange_chosen`: tokens of experts through each other's memory; see `codegen.kernels.chosen_peers`.

It also writes the memory of other ranks, as `exchange` does, so torch.compile must not see it.
"""

from typing import Any

from torch import Tensor

from codegen.launching.launch import on
from codegen.launching.replay import empty, replayed
from codegen.operators.exchange import refuse_on_cpu
from codegen.operators.operator import Operator, declare
from codegen.targets.cuda import gpu_at
from codegen.templates.chosen_peers import CHOSEN_PEERS, ChosenOperands, ChosenProblem
from codegen.templates.template import ceil_div


def _on_gpu(x: Tensor, experts: Tensor, memories: Tensor, steps: Tensor, *rest: Any) -> Tensor:
    tensors = (x, experts, memories, steps)
    return replayed(_run, ("exchange_chosen", *rest), tensors, *tensors, *rest)


def _run(
    x: Tensor, experts: Tensor, memories: Tensor, steps: Tensor, groups: int, rank: int, patience: int, summed: bool
) -> Tensor:  # fmt: skip
    out = empty(_received(x, experts, memories, summed), x.dtype, x.device)
    operands = ChosenOperands(x, experts, out, memories, steps, groups, rank, patience, summed)
    family = CHOSEN_PEERS.family(gpu_at(x.device))
    share = ceil_div(experts.shape[0], memories.numel())
    with on(x.device):
        family.launch(family.choose(ChosenProblem(share, x.shape[1] * x.element_size())), operands)
    return out


def _received(x: Tensor, experts: Tensor, memories: Tensor, summed: bool) -> list[int]:
    """The shape of what a rank receives: sums of its own tokens, or all tokens."""
    tokens = experts.shape[0]
    return [ceil_div(tokens, memories.numel()) if summed else tokens, x.shape[1]]


def _fake(x: Tensor, experts: Tensor, memories: Tensor, steps: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(_received(x, experts, memories, rest[-1]))


EXCHANGE_CHOSEN_SCHEMA = (
    "exchange_chosen(Tensor x, Tensor experts, Tensor memories, Tensor(a!) steps, int groups, int rank, int patience, "
    "bool summed) -> Tensor"
)
declare(Operator(EXCHANGE_CHOSEN_SCHEMA, refuse_on_cpu, _on_gpu, _fake))
