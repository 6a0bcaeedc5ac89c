"""Exchanges between ranks, on one GPU: one rank after the other, each of which finds what the other one has sent."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.sanitizing.place import Place, draw
from benchmarks.sanitizing.products import BLOCK, TILE, quantized
from benchmarks.sanitizing.rows import NORM
from codegen.inboxes import Inboxes, slot_bytes
from codegen.operators.fused_quantize import run_fused
from codegen.operators.operator import OPERATORS
from codegen.targets.cuda import gpu_at
from codegen.templates.chosen_peers import CHOSEN_PEERS, ChosenConfig, ChosenOperands, ChosenProblem
from codegen.templates.fused_quantize import RankSum
from codegen.templates.inboxes import HEAD_BYTES, Ways
from codegen.templates.peers import PEERS, PROGRAMS, REGION_BYTES, PeersOperands, PeersProblem, memory_bytes
from qcompiler.distributed.communicator import Choices, communicating

RANKS, PATIENCE = 2, 10**9
LATER = 1 << 30
"""The number of a call that no rank reaches."""

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


def chosen_exchanges(place: Place) -> Iterator[str]:
    """Tokens of experts, of which some are sent, in rows that no tile divides, twice."""
    for tokens, width, dtype, chosen in ((21, 3000, torch.bfloat16, 2), (7, 33, torch.float32, 1)):
        calls = (torch.randint(8, (tokens, chosen), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
        experts = [*calls]
        share = -(-tokens // RANKS)
        terms = [draw(tokens, width, seed=seed).to(dtype) for seed in range(2 * RANKS)]
        rows = [draw(share, width, seed=seed).to(dtype).view(torch.int8) for seed in range(2 * RANKS)]
        for summed, xs in ((False, rows), (True, terms)):
            run, want = (partial(each, summed) for each in (chosen_one_after_the_other, expected_chosen))
            place.compare_calls(run, want, *experts, *xs)
            yield f"[{tokens}, {width}] in {dtype}, {chosen} of 8 experts, summed: {summed}"


def expected_chosen(summed: bool, first: Tensor, second: Tensor, *xs: Tensor) -> list[Tensor]:
    """The results of both ranks in both calls."""
    found = []
    for experts, call in ((first, xs[:RANKS]), (second, xs[RANKS:])):
        choices = Choices(experts, 8, RANKS)
        for rank in range(RANKS):
            if summed:
                left, right = (choices.padded(choices.masked(x, other)) for other, x in enumerate(call))
                found.append((left.float() + right.float()).to(left.dtype).chunk(RANKS)[rank])
            else:
                found.append(choices.masked(torch.cat(call)[: len(experts)], rank))
    return found


def chosen_one_after_the_other(summed: bool, first: Tensor, second: Tensor, *xs: Tensor) -> list[Tensor]:
    """The same by the kernel: rank 0 finds what rank 1 will send in its memory."""
    memories, addresses, steps = shared(xs[0].device)
    family = CHOSEN_PEERS.family(gpu_at(xs[0].device))
    found = []
    for turn, (experts, call) in enumerate(((first, xs[:RANKS]), (second, xs[RANKS:])), 1):
        choices = Choices(experts, 8, RANKS)
        sent = choices.padded(call[1])[: choices.share] if summed else call[1]
        width = sent.shape[1] * sent.element_size()
        config = family.choose(ChosenProblem(choices.share, width))
        send_tiles(memories[0], sent.contiguous().view(torch.uint8), config, turn)
        for rank, x in enumerate(call):
            out = x.new_zeros(choices.share if summed else len(experts), x.shape[1])
            operands = ChosenOperands(x, experts, out, addresses, steps[rank], 8, rank, PATIENCE, summed)
            family.launch(config, operands)
            found.append(out)
    return found


def send_tiles(memory: Tensor, x: Tensor, config: ChosenConfig, step: int) -> None:
    """Writes all rows that rank 1 may send to rank 0 in a step, tile by tile."""
    regions, signals = parts_of(memory)
    tiles = [tile for rows in x.split(config.rows) for tile in rows.split(config.bytes, dim=1)]
    for program, tile in enumerate(tiles):
        region = regions[program, step % 2, 1, : config.rows * config.bytes].view(config.rows, config.bytes)
        region[: tile.shape[0], : tile.shape[1]] = tile
        signals[program, 1] = step


def fused_sums(place: Place) -> Iterator[str]:
    """A sum over ranks in the kernel that normalizes and quantizes it, of rows that no tile divides."""
    for m, k in ((3, 1000), (20, 400)):
        xs = [draw(m, k, seed=seed) for seed in range(2 * RANKS)]
        operands = draw(m, k, seed=9), draw(1, k)[0]
        place.compare_calls(normalized_one_after_the_other, normalized, *operands, *xs)
        yield f"[{m}, {k}]"


def stored_matmuls(place: Place) -> Iterator[str]:
    """Matmuls that store their rows in the memory of the other rank: rows that divide, and rows that do not."""
    for tokens, columns, dtype in ((1024, 256, torch.bfloat16), (1030, 200, torch.float32), (1025, 128, torch.float16)):
        operands = []
        for seed in range(RANKS):
            x = quantized(tokens, 384, TILE, layout="col_major", seed=seed)
            w = quantized(columns, 384, BLOCK, seed=seed + RANKS)
            operands.append((*x, *w, draw(1, columns, seed=seed)[0] if seed else None, TILE, BLOCK, dtype))
        place.compare_calls(stored_for_each_other, summed_matmuls, *operands)
        yield f"[{tokens}, {columns}] in {dtype}"


def summed_matmuls(*operands: tuple[Any, ...]) -> list[Tensor]:
    """The rows of each rank of the sum of all ranks' matmuls."""
    terms = [OPERATORS["scaled_linear"].on_cpu(*each) for each in operands]
    total = (terms[0].float() + terms[1].float()).to(terms[0].dtype)
    size = -(-total.shape[0] // RANKS)
    return list(torch.nn.functional.pad(total, (0, 0, 0, size * RANKS - total.shape[0])).split(size))


def stored_for_each_other(*operands: tuple[Any, ...]) -> list[Tensor]:
    """The same by the kernels, one rank after the other: the last two find what both have stored in this turn."""
    boxes = inboxes_of_ranks(slot_bytes(1024, 256, torch.float32) * RANKS, operands[0][0].device, RANKS)
    found = []
    for rank in (0, 1, 0):
        boxes[rank].turn = 0
        boxes[rank].ways.steps.zero_()  # this is the first call of each rank
        with communicating(reaching(boxes[rank])):
            found.append(OPERATORS["linear_scatter_tokens"].on_gpu(*operands[rank], "tp", RANKS, 512))
    return [found[2], found[1]]


def inboxes_of_ranks(size: int, device: torch.device, ranks: int) -> list[Inboxes]:
    """The inboxes of all ranks in the memory of one GPU."""
    parts = [torch.zeros(HEAD_BYTES + 2 * size, dtype=torch.uint8, device=device) for _ in range(ranks)]
    addresses = torch.tensor([part.data_ptr() for part in parts], device=device)
    steps = [torch.zeros(3, dtype=torch.int32, device=device) for _ in range(ranks)]
    ways = [Ways(addresses, step, rank, PATIENCE) for rank, step in enumerate(steps)]
    return [Inboxes(tuple(parts), way, size) for way in ways]


def reaching(boxes: Inboxes) -> Any:
    """The communicator of a rank with inboxes, which does not wait, because the others seem to be many calls ahead."""
    signals = boxes.parts[boxes.ways.rank][:HEAD_BYTES].view(torch.int32)
    signals[: 2 * len(boxes.parts)] = LATER
    return SimpleNamespace(inboxes=lambda *_: boxes)


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
    regions, signals = parts_of(memory)
    for program, part in enumerate(x.contiguous().view(torch.uint8).view(-1).split(tile)):
        regions[program, step % 2, 1, : part.numel()] = part
        signals[program, 1] = step


def parts_of(memory: Tensor) -> tuple[Tensor, Tensor]:
    """The regions `[PROGRAMS, 2, RANKS, bytes]` and the signals `[PROGRAMS, RANKS]` of a rank's memory."""
    end = PROGRAMS * 2 * RANKS * REGION_BYTES
    regions = memory[:end].view(PROGRAMS, 2, RANKS, REGION_BYTES)
    return regions, memory[end:].view(torch.int32).view(PROGRAMS, RANKS)
