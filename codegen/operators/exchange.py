"""The operator `exchange`: collectives of GPUs of one host through each other's memory; see `codegen.kernels.peers`.

It also writes the memory of other ranks, which is not a tensor of this process, so its schema cannot say that. So
torch.compile must not see it: `codegen.peer_memory` leaves calls that are traced to torch.
"""

from typing import Any, NoReturn

from torch import Tensor

from codegen.launching.launch import on
from codegen.launching.replay import empty, replayed
from codegen.operators.operator import Operator, declare
from codegen.targets.cuda import gpu_at
from codegen.templates.peers import PEERS, PeersOperands, PeersProblem
from qcompiler.errors import CodegenError


def _on_gpu(x: Tensor, memories: Tensor, steps: Tensor, *rest: Any) -> Tensor:
    return replayed(_run, ("exchange", *rest), (x, memories, steps), x, memories, steps, *rest)


def _run(
    x: Tensor, memories: Tensor, steps: Tensor, rank: int, patience: int, scattered: bool, summed: bool
) -> Tensor:  # fmt: skip
    shape, part = _received(x, memories, scattered, summed)
    out = empty(shape, x.dtype, x.device)
    operands = PeersOperands(x, out, memories, steps, rank, patience, scattered, summed)
    family = PEERS.family(gpu_at(x.device))
    with on(x.device):
        family.launch(family.choose(PeersProblem(part * x.element_size())), operands)
    return out


def _received(x: Tensor, memories: Tensor, scattered: bool, summed: bool) -> tuple[list[int], int]:
    """The shape of what a rank receives, and the number of elements that it sends to each other rank."""
    ranks = memories.numel()
    part = x.numel() // ranks if scattered else x.numel()
    if summed:
        return list(x.shape[1:] if scattered else x.shape), part
    return [ranks, part], part


def refuse_on_cpu(*_: Any) -> NoReturn:
    """Raises CodegenError: CPUs have no memory that other ranks write to."""
    raise CodegenError("ranks exchange tensors through memory only on GPUs", fix="Use torch.distributed on CPUs.")


def _fake(x: Tensor, memories: Tensor, steps: Tensor, *rest: Any) -> Tensor:
    _, _, scattered, summed = rest
    return x.new_empty(_received(x, memories, scattered, summed)[0])


EXCHANGE_SCHEMA = (
    "exchange(Tensor x, Tensor memories, Tensor(a!) steps, int rank, int patience, bool scattered, bool summed) "
    "-> Tensor"
)
declare(Operator(EXCHANGE_SCHEMA, refuse_on_cpu, _on_gpu, _fake))
