"""Mixtures of experts on a mesh: ranks choose for their own tokens, and exchange choices and tokens."""

from functools import cache
from typing import Any

import pytest
import torch
from expert_models import MODELS

import qcompiler
from qcompiler.capture import capture
from qcompiler.ir import Graph

SIZES: dict[str, Any] = {
    "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 1,
}  # fmt: skip
TACTICS = "tp; ep; sp{tokens=8}"
SHAPES = ((1, 1), (1, 7), (1, 8), (2, 11), (3, 8))


@cache
def captured(name: str) -> Graph:
    torch.manual_seed(0)
    model = MODELS[name](**SIZES).to(torch.bfloat16).eval()
    return capture(model, (ids_of((2, 12)),)).graph


@cache
def compiled(name: str, scheme: str, ranks: int, sharding: str) -> Any:
    return qcompiler.compile(
        captured(name), scheme=scheme, mesh=qcompiler.simulated_mesh(tp=ranks), sharding=sharding, progress=False
    )


def ids_of(shape: tuple[int, int]) -> torch.Tensor:
    return torch.arange(shape[0] * shape[1]).reshape(shape) * 11 % 96


@pytest.mark.parametrize(("name", "ranks"), [("mixtral", 2), ("mixtral", 4), ("qwen3", 2)])
def test_ranks_choose_for_their_own_tokens(name: str, ranks: int) -> None:
    """Equal bits: each rank computes the same choices as all of them did."""
    found, plain = compiled(name, "fp8_tile", ranks, TACTICS), compiled(name, "fp8_tile", ranks, "tp; ep")
    (chosen,) = found.graph.ops("aten.topk")
    assert str(chosen.results[0].type).startswith("f32[share(s0*s1, ")
    codes = [op for op in found.graph.ops("coll.all_gather_tokens") if op.result.name.startswith("view")]
    assert [str(op.result.tensor.dtype) for op in codes] == ["f8e4m3fn", "f32"]
    for shape in SHAPES:
        assert torch.equal(found(ids_of(shape)), plain(ids_of(shape))), shape
