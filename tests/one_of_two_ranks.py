"""The program of one of two ranks: on CPUs with gloo, on two GPUs with NCCL, or on one GPU that both share.

    python one_of_two_ranks.py RANK cpu|cuda FOLDER      # writes what it found to FOLDER/RANK.pt

NCCL has no two ranks on a GPU. There, all exchanges of models go through peer memory, which is memory of the same GPU,
and the GPU runs the two processes in turns: slow, but the same code.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import qcompiler
from codegen import peer_memory
from codegen.direct import kernels
from codegen.peer_memory import PeerMemory, connected
from qcompiler.decoding.graphs import CudaRecorder
from qcompiler.dialects.coll_tokens import in_layout
from qcompiler.distributed.communicator import Choices, communicating
from qcompiler.distributed.process_groups import ProcessGroups

CONFIG: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 96, "tie_word_embeddings": False,
}  # fmt: skip
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9], [11]]
SUMS = "tp; sp{tokens=8, sums=fp8_tile}"
PARTS = "tp{gather=1024}"  # each rank has the logits of its part of the vocabulary

SHAPES = (
    ((2, 8192), torch.bfloat16), ((14, 333), torch.float32), ((2, 1), torch.float16), ((4096, 4098), torch.bfloat16),
)  # fmt: skip
"""Of exchanged tensors; the last one takes several steps."""

TOO_LATE = 200_000_000
"""Nanoseconds that rank 0 waits for a rank that does not arrive."""


def main() -> None:
    rank, kind, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    gpus = torch.cuda.device_count()
    device = torch.device(kind, rank % gpus) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        if gpus == 1:
            share_gpu()
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" and gpus > 1 else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh(kind, (2,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**CONFIG))
    model = model.eval().to(device)  # in FP32: ranks do not round the terms of a sum
    with torch.no_grad():
        found = generated(model, mesh, rank, folder) | called(model, mesh, device)
        if kind == "cuda":
            found["wrong exchanges"] = wrong_exchanges(mesh, rank, device) + wrong_choices(mesh, rank, device)
            found["wrong matmuls"] = wrong_matmuls(mesh, rank, device)
    torch.save(found, folder / f"{rank}.pt")
    if kind == "cuda":
        wait_for_a_late_rank(mesh, rank, device, folder / "late.txt")
    distributed.barrier()
    distributed.destroy_process_group()


def share_gpu() -> None:
    """Lets peer memory connect ranks on the same GPU."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    peer_memory.can_connect = lambda ranks: True


def generated(model: Any, mesh: DeviceMesh, rank: int, folder: Path) -> dict[str, Any]:
    """Tokens of decoders: of the whole model, of one divided among ranks, and of one read from a folder in parts."""
    if rank == 0:
        model.save_pretrained(folder / "model")
    distributed.barrier()
    recorded: list[Any] = []
    record: Any = CudaRecorder.record

    def noted(one: Any, run: Any) -> Any:
        recorded.append(run)
        return record(one, run)

    recorder: Any = CudaRecorder
    recorder.record = noted
    found: dict[str, Any] = {}
    for scheme in (None, "fp8_tile"):
        sources: list[tuple[Any, dict[str, Any]]] = [(model, {}), (model, {"mesh": mesh})]
        sources += [(str(folder / "model"), {"mesh": mesh, "sharding": PARTS})] if scheme else []
        decoders = [
            qcompiler.decoder(source, scheme=scheme, max_batch=2, max_length=64, **options)
            for source, options in sources
        ]
        found[f"tokens {scheme}"] = [llm.generate(PROMPTS, max_new_tokens=16) for llm in decoders]
        found[f"recorded {scheme}"] = len(recorded)
    return found


def called(model: Any, mesh: DeviceMesh, device: torch.device) -> dict[str, Any]:
    """Logits of the whole model and of divided ones, called directly and, on a GPU, in CUDA graphs."""
    ids = torch.arange(24, device=device).reshape(2, 12) * 7 % 96
    options: list[dict[str, Any]] = [{}, {"mesh": mesh}, {"mesh": mesh, "sharding": SUMS}]
    compiled = [
        qcompiler.compile(model, example_kwargs={"input_ids": ids, "use_cache": False}, **each) for each in options
    ]

    def logits(each: Any, of: Tensor) -> Tensor:
        result: Tensor = each(input_ids=of, use_cache=False).logits
        return result

    found: dict[str, Any] = {
        "logits": [logits(each, ids).cpu() for each in compiled],
        "few": logits(compiled[2], ids[:1, :5]).cpu(),
        "replays": [],
    }
    for each in compiled[1:] if device.type == "cuda" else ():
        for _ in range(3):
            logits(each, ids)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = logits(each, ids)
        for _ in range(3):
            ids.copy_(ids.roll(1, 1))
            graph.replay()
            found["replays"].append((out.clone().cpu(), logits(each, ids).cpu()))
    return found


def wrong_exchanges(mesh: DeviceMesh, rank: int, device: torch.device) -> list[str]:
    """The exchanges through peer memory, each with one rank late, that differ from what NCCL gathers."""
    peers, group, wrong = PeerMemory(), mesh.get_group("tp"), []
    for shape, dtype in SHAPES:
        for turn, name in enumerate(("all_reduce", "all_gather", "reduce_scatter", "all_to_all") * 2):
            x = torch.randn(shape, device=device).to(dtype)
            if turn % 2 == rank:
                torch.cuda._sleep(10_000_000)
            got = getattr(peers, name)(x, group)
            parts = [torch.empty_like(x) for _ in range(2)]
            distributed.all_gather(parts, x, group)
            total = (parts[0].float() + parts[1].float()).to(dtype)
            want = {
                "all_reduce": total, "all_gather": torch.stack(parts), "reduce_scatter": total.chunk(2)[rank],
                "all_to_all": torch.cat([part.chunk(2)[rank] for part in parts]),
            }[name]  # fmt: skip
            if got is None or not torch.equal(got, want):
                wrong.append(f"{name} of {dtype} {shape}")
    return wrong


def wrong_choices(mesh: DeviceMesh, rank: int, device: torch.device) -> list[str]:
    """The exchanges of chosen tokens, each with one rank late, that differ from what NCCL gathers."""
    peers, group, wrong = PeerMemory(), mesh.get_group("tp"), []
    for turn, (tokens, width, dtype) in enumerate(
        ((21, 333, torch.bfloat16), (7, 8192, torch.float32), (4097, 4096, torch.bfloat16)) * 2
    ):
        experts = torch.randint(8, (tokens, 2), generator=torch.Generator().manual_seed(turn)).to(device)
        choices = Choices(experts, 8, 2)
        for summed in (False, True):
            x = torch.randn(tokens if summed else choices.share, width, device=device).to(dtype)
            parts = [torch.empty_like(x) for _ in range(2)]
            distributed.all_gather(parts, x, group)
            if turn % 2 == rank:
                torch.cuda._sleep(10_000_000)
            if summed:
                got = peers.reduce_scatter_chosen(x, choices, group)
                one, other = (choices.padded(choices.masked(part, at)).float() for at, part in enumerate(parts))
                want = (one + other).to(dtype).chunk(2)[rank]
            else:
                got, want = peers.gather_chosen(x, choices, group), choices.masked(torch.cat(parts)[:tokens], rank)
            if got is None or not torch.equal(got, want):
                wrong.append(f"chosen tokens of {dtype} [{tokens}, {width}], summed: {summed}")
    return wrong


def wrong_matmuls(mesh: DeviceMesh, rank: int, device: torch.device) -> list[str]:
    """The matmuls that store rows for the other rank, each with one rank late, that differ from separate steps.

    Called directly, also with other turns than the other rank, and in a CUDA graph of three calls, so that a turn
    follows itself when the graph is replayed.
    """
    ranks, wrong = ProcessGroups(mesh, PeerMemory()), []
    for tokens, columns in ((1024, 256), (1030, 200), (3000, 512)):
        linears = [quantized_linear(tokens, columns, device) for _ in range(3)]
        with communicating(ranks):
            wanted = [separately(linear, mesh, rank) for linear in linears]
            for turn in range(3):
                if turn % 2 == rank:
                    torch.cuda._sleep(10_000_000)
                    ranks.inboxes(linears[0][0], 1, "tp").next_turn()  # the ranks need not use the same ones
                got = [kernels.linear_scatter_tokens(*linear, "tp", 2, 512) for linear in linears]
                wrong += [f"{tokens}, {columns}, call {turn}"] * (not all(map(torch.equal, got, wanted)))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replayed = [kernels.linear_scatter_tokens(*linear, "tp", 2, 512) for linear in linears]
            for replay in range(4):
                if replay % 2 == rank:
                    torch.cuda._sleep(10_000_000)
                for each in replayed:
                    each.fill_(-1)
                graph.replay()
                wrong += [f"{tokens}, {columns}, replay {replay}"] * (not all(map(torch.equal, replayed, wanted)))
    return wrong


def quantized_linear(tokens: int, columns: int, device: torch.device) -> tuple[Any, ...]:
    """The arguments of a quantized matmul."""
    x, w = (torch.randn(rows, 384, device=device).bfloat16() for rows in (tokens, columns))
    codes = kernels.quantize(x, [1, 128], torch.float8_e4m3fn, "deepseek", "col_major", None)
    weight = kernels.quantize(w, [128, 128], torch.float8_e4m3fn, "deepseek", "row_major", None)
    return (*codes, *weight, None, [1, 128], [128, 128], torch.bfloat16)


def separately(linear: tuple[Any, ...], mesh: DeviceMesh, rank: int) -> Tensor:
    """The rows of this rank of the sum, from matmuls of the same rows, gathered by torch."""
    codes, scales, *rest = linear
    size = -(-codes.shape[0] // 2)
    total = torch.empty(0)
    for first in range(0, codes.shape[0], size):
        part = in_layout(scales[first : first + size].contiguous(), "col_major")
        mine = kernels.scaled_linear(codes[first : first + size], part, *rest)
        terms = [torch.empty_like(mine) for _ in range(2)]
        distributed.all_gather(terms, mine, mesh.get_group("tp"))
        if first == rank * size:
            total = terms[0].float() + terms[1].float()
    return torch.nn.functional.pad(total, (0, 0, 0, size - len(total))).to(torch.bfloat16)


def wait_for_a_late_rank(mesh: DeviceMesh, rank: int, device: torch.device, file: Path) -> None:
    """Writes the error of rank 0 if rank 1 does not take part in an exchange, and ends the process.

    The GPU has failed then, and destructors of tensors would abort the process.
    """
    peers = connected(mesh.get_group("tp"), device)
    if peers is not None and rank == 0:
        error = "none"
        try:
            replace(peers, patience=TOO_LATE).exchange(torch.ones(8, device=device), summed=True)
            torch.cuda.synchronize()
        except RuntimeError as failure:
            error = str(failure)
        file.write_text(error, encoding="utf-8")
    os._exit(0)  # destroying NCCL's communicators would wait for graphs that use them


if __name__ == "__main__":
    main()
