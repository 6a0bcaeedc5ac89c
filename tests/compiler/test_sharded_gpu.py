"""Two processes: equal tokens of decoders, and, on one or two Hopper GPUs, collectives captured in CUDA graphs."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import one_of_two_ranks
import pytest
import torch


@cache
def ranks(kind: str, folder: Path) -> list[dict[str, Any]]:
    """What each rank found."""
    environment = os.environ | {"NCCL_NVLS_ENABLE": "0"}
    # -P: the folder of the file has a folder `passes`, too.
    command = [sys.executable, "-P", one_of_two_ranks.__file__]
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
        whole, *sharded = found[0][f"tokens {scheme}"]
        assert all(each == whole for each in sharded) and found[1][f"tokens {scheme}"] == [whole, *sharded], scheme
    whole, sharded, sums = found[0]["logits"]
    assert torch.equal(sharded, found[1]["logits"][1]) and torch.equal(sums, found[1]["logits"][2])
    assert torch.equal(found[0]["few"], found[1]["few"])
    assert float((sharded - whole).norm() / whole.norm()) < 1e-2
    assert 1e-2 < float((sums - whole).norm() / whole.norm()) < 2**-4


@pytest.mark.slow
def test_two_processes_generate_the_tokens_of_one(tmp_path: Path) -> None:
    check(ranks("cpu", tmp_path))


@pytest.mark.gpu
def test_two_ranks_on_gpus_generate_the_tokens_of_one(tmp_path: Path) -> None:
    found = ranks("cuda", tmp_path)
    check(found)
    for rank in found:
        assert rank["wrong exchanges"] == [] and rank["wrong matmuls"] == []
        assert rank["recorded fp8_tile"] > rank["recorded None"] > 0, "decode steps were not recorded in CUDA graphs"
        assert all(torch.equal(replayed, direct) for replayed, direct in rank["replays"])
    for (one, _), (other, _) in zip(*(rank["replays"] for rank in found), strict=True):
        assert torch.equal(one, other)
    assert "launch failure" in (tmp_path / "late.txt").read_text(encoding="utf-8")
