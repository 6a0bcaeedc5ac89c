"""Compiles the kernels of `codegen.templates.peers` and `chosen_peers` without a GPU."""

import torch

from codegen.machine_code import MachineCode
from codegen.targets.hopper import HOPPER
from codegen.templates.chosen_peers import CHOSEN_PEERS, ChosenOperands, ChosenProblem
from codegen.templates.peers import PEERS, PROGRAMS, PeersOperands, PeersProblem


def compile_exchange(
    ranks: int, shape: tuple[int, int], *, scattered: bool = False, summed: bool = False
) -> MachineCode:
    x = torch.empty(shape, dtype=torch.bfloat16 if summed else torch.int8, device="meta")
    count = x.numel() // ranks if scattered else x.numel()
    out = x.new_empty(count) if summed else x.new_empty(ranks, count)
    memories = torch.empty(ranks, dtype=torch.int64, device="meta")
    steps = torch.empty(PROGRAMS, dtype=torch.int32, device="meta")
    operands = PeersOperands(x, out, memories, steps, 0, 600 * 10**9, scattered, summed)
    family = PEERS.family(HOPPER)
    (call,) = family.calls(family.choose(PeersProblem(count * x.element_size())), operands)
    return HOPPER.compile(call)


def compile_exchange_chosen(
    ranks: int, tokens: int, width: int, *, chosen: int = 2, groups: int = 8, summed: bool = False
) -> MachineCode:
    share = -(-tokens // ranks)
    sizes = ((tokens, width), (share, width)) if summed else ((share, width), (tokens, width))
    x, out = (torch.empty(size, dtype=torch.bfloat16 if summed else torch.int32, device="meta") for size in sizes)
    experts = torch.empty(tokens, chosen, dtype=torch.int64, device="meta")
    memories = torch.empty(ranks, dtype=torch.int64, device="meta")
    steps = torch.empty(PROGRAMS, dtype=torch.int32, device="meta")
    operands = ChosenOperands(x, experts, out, memories, steps, groups, 0, 600 * 10**9, summed)
    family = CHOSEN_PEERS.family(HOPPER)
    (call,) = family.calls(family.choose(ChosenProblem(share, width * x.element_size())), operands)
    return HOPPER.compile(call)
