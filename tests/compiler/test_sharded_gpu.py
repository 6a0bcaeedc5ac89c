"""Two processes: equal tokens of decoders, and, on two Hopper GPUs with NCCL, collectives captured in CUDA graphs."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

RANK = """
import os
import sys
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM
import qcompiler
from qcompiler.decoding.graphs import CudaRecorder

rank, kind, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
if kind == "cuda":
    torch.cuda.set_device(device)
backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = init_device_mesh(kind, (2,), mesh_dim_names=("tp",))
torch.manual_seed(0)
config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
                     num_key_value_heads=4, head_dim=64, vocab_size=96, tie_word_embeddings=False)
model = LlamaForCausalLM(config).eval().to(device)  # in FP32: ranks do not round the terms of a sum
found = {}
recorded, record = [], CudaRecorder.record
CudaRecorder.record = lambda recorder, run: recorded.append(run) or record(recorder, run)
ids = torch.arange(24, device=device).reshape(2, 12) * 7 % 96

with torch.no_grad():
    for scheme in (None, "fp8_tile"):
        whole, ranks = (
            qcompiler.decoder(model, scheme=scheme, max_batch=2, max_length=64, **options)
            for options in ({}, {"mesh": mesh})
        )
        prompts = [[1, 2, 3, 4, 5], [7, 8, 9], [11]]
        found[f"tokens {scheme}"] = [llm.generate(prompts, max_new_tokens=16) for llm in (whole, ranks)]
        found[f"recorded {scheme}"] = len(recorded)
    compiled = [qcompiler.compile(model, example_kwargs={"input_ids": ids, "use_cache": False}, **options)
                for options in ({}, {"mesh": mesh})]
    logits = [each(input_ids=ids, use_cache=False).logits for each in compiled]
    found["logits"] = [each.cpu() for each in logits]
    if kind == "cuda":
        for _ in range(3):
            compiled[1](input_ids=ids, use_cache=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = compiled[1](input_ids=ids, use_cache=False).logits
        replays = []
        for turn in range(3):
            ids.copy_(ids.roll(1, 1))
            graph.replay()
            replays.append((out.clone().cpu(), compiled[1](input_ids=ids, use_cache=False).logits.cpu()))
        found["replays"] = replays
torch.save(found, f"{folder}/{rank}.pt")
distributed.barrier()
if kind == "cuda":
    os._exit(0)  # destroying NCCL's communicators would wait for the graphs that use them
distributed.destroy_process_group()
"""


@cache
def ranks(kind: str, folder: Path) -> list[dict[str, Any]]:
    """What each rank found."""
    environment = os.environ | {"NCCL_NVLS_ENABLE": "0"}
    command = [sys.executable, "-c", RANK]
    processes = [
        subprocess.Popen([*command, str(rank), kind, str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [each.communicate(timeout=240)[1] for each in processes]
    finally:
        for each in processes:
            each.kill()
    assert [each.returncode for each in processes] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def check(found: list[dict[str, Any]]) -> None:
    """Ranks compute the same bits, and what one device computes."""
    for scheme in (None, "fp8_tile"):
        whole, sharded = found[0][f"tokens {scheme}"]
        assert sharded == whole and found[1][f"tokens {scheme}"] == [whole, sharded], scheme
    whole, sharded = found[0]["logits"]
    assert torch.equal(sharded, found[1]["logits"][1])
    assert float((sharded - whole).norm() / whole.norm()) < 1e-2


@pytest.mark.slow
def test_two_processes_generate_the_tokens_of_one(tmp_path: Path) -> None:
    check(ranks("cpu", tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_generate_the_tokens_of_one(tmp_path: Path) -> None:
    found = ranks("cuda", tmp_path)
    check(found)
    for rank in found:
        assert rank["recorded fp8_tile"] > rank["recorded None"] > 0, "decode steps were not recorded in CUDA graphs"
        assert all(torch.equal(replayed, direct) for replayed, direct in rank["replays"])
    for (one, _), (other, _) in zip(*(rank["replays"] for rank in found), strict=True):
        assert torch.equal(one, other)
