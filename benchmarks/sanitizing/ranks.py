"""Exchanges between ranks, on one GPU: one rank after the other, each of which finds what the other one has sent."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.sanitizing.place import Place, draw
from benchmarks.sanitizing.rows import NORM
from codegen.operators.fused_quantize import run_fused
from codegen.operators.operator import OPERATORS
from codegen.targets.cuda import gpu_at
from codegen.templates.fused_quantize import RankSum
from codegen.templates.peers import PEERS, PROGRAMS, REGION_BYTES, PeersOperands, PeersProblem, memory_bytes

RANKS, PATIENCE = 2, 10**9
QUANTIZED = ([1, 128], torch.float8_e4m3fn, "deepseek", "col_major")


def exchanges(place: Place) -> Iterator[str]:
    """All collectives of tensors that no tile divides, twice, so that both turns are used."""
    sizes = (((2, 3000), torch.bfloat16), ((10, 2049), torch.float32), ((2, 1), torch.float16))
    for (shape, dtype), scattered, summed in product(sizes, (False, True), (False, True)):
        xs = [draw(*shape, seed=seed).to(dtype) for seed in range(2 * RANKS)]
        given = xs if summed else [x.view(torch.int8) for x in xs]
        run, want = (partial(each, scattered, summed) for each in (one_after_the_other, expected))
        place.compare_calls(run, want, *given)
        yield f"{list(shape)} in {dtype}, scattered: {scattered}, summed: {summed}"


def fused_sums(place: Place) -> Iterator[str]:
    """A sum over ranks in the kernel that normalizes and quantizes it, of rows that no tile divides."""
    for m, k in ((3, 1000), (20, 400)):
        xs = [draw(m, k, seed=seed) for seed in range(2 * RANKS)]
        operands = draw(m, k, seed=9), draw(1, k)[0]
        place.compare_calls(normalized_one_after_the_other, normalized, *operands, *xs)
        yield f"[{m}, {k}]"


def normalized(residual: Tensor, gain: Tensor, *xs: Tensor) -> list[Tensor]:
    """The codes, scales and residuals of both ranks in both calls."""
    found = []
    for call in (xs[:RANKS], xs[RANKS:]):
        total = (call[0].float() + call[1].float()).to(residual.dtype)
        operands = [residual, total, gain]
        found += RANKS * OPERATORS["fused_quantize"].on_cpu(operands, NORM, ["h"], *QUANTIZED)
    return found


def normalized_one_after_the_other(residual: Tensor, gain: Tensor, *xs: Tensor) -> list[Tensor]:
    """The same by the kernel."""
    memories, addresses, steps = shared(residual.device)
    found: list[Tensor] = []
    for call, terms in enumerate((xs[:RANKS], xs[RANKS:]), 1):
        send(memories[0], terms[1], terms[1].shape[1] * 2, call)
        for rank, term in enumerate(terms):
            peers = RankSum(1, addresses, steps[rank], rank, PATIENCE)
            found += run_fused([residual, term, gain], NORM, ("h",), *QUANTIZED, rank_sum=peers)
    return found


def shared(device: torch.device) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The memory of both ranks, its addresses, and their steps."""
    memories = [torch.zeros(memory_bytes(RANKS), dtype=torch.uint8, device=device) for _ in range(RANKS)]
    addresses = torch.tensor([memory.data_ptr() for memory in memories], device=device)
    return memories, addresses, [torch.zeros(PROGRAMS, dtype=torch.int32, device=device) for _ in range(RANKS)]


def expected(scattered: bool, summed: bool, *xs: Tensor) -> list[Tensor]:
    """The results of both ranks in both calls."""
    found = []
    for call in (xs[:RANKS], xs[RANKS:]):
        for rank in range(RANKS):
            parts = [x.view(RANKS, -1)[rank] if scattered else x.view(-1) for x in call]
            found.append((parts[0].float() + parts[1].float()).to(xs[0].dtype) if summed else torch.stack(parts))
    return found


def one_after_the_other(scattered: bool, summed: bool, *xs: Tensor) -> list[Tensor]:
    """The same by the kernel, for one step of rank 0 at a time: it finds what rank 1 will send in its memory."""
    memories, addresses, steps = shared(xs[0].device)
    family = PEERS.family(gpu_at(xs[0].device))
    found = []
    for call, sent in enumerate((xs[:RANKS], xs[RANKS:]), 1):
        count = sent[0].numel() // (RANKS if scattered else 1)
        config = family.choose(PeersProblem(count * sent[0].element_size()))
        send(memories[0], sent[1].view(-1)[:count], config.bytes, call)
        for rank, x in enumerate(sent):
            out = x.new_zeros(count) if summed else x.new_zeros(RANKS, count)
            operands = PeersOperands(x, out, addresses, steps[rank], rank, PATIENCE, scattered, summed)
            family.launch(config, operands)
            found.append(out)
    return found


def send(memory: Tensor, x: Tensor, tile: int, step: int) -> None:
    """Writes what rank 1 sends to rank 0 in a step."""
    end = PROGRAMS * 2 * RANKS * REGION_BYTES
    regions = memory[:end].view(PROGRAMS, 2, RANKS, REGION_BYTES)
    signals = memory[end:].view(torch.int32).view(PROGRAMS, RANKS)
    for program, part in enumerate(x.contiguous().view(torch.uint8).view(-1).split(tile)):
        regions[program, step % 2, 1, : part.numel()] = part
        signals[program, 1] = step
