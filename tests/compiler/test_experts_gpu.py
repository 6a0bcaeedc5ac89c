"""Mixtures of experts on a Hopper GPU: the compiled model computes what its graph says, also in a CUDA graph."""

import pytest
import torch
from expert_models import MODELS
from torch import Tensor

import qcompiler

pytestmark = pytest.mark.gpu

CLOSE = 3e-2
"""Median relative error of a token: sums have another order, so codes of activations differ in their last bit, and a
token whose experts have nearly equal scores may choose another one."""


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_experts(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().to("cuda", torch.bfloat16).eval()
    ids = torch.randint(96, (3, 50), device="cuda")
    fast = qcompiler.compile(model, scheme="fp8_tile", example_kwargs={"input_ids": ids[:, :19]}, progress=False)
    for kernel in ("kernel.gather_codes", "kernel.group_entries"):
        assert len(fast.graph.ops(kernel)) == 1
    assert not fast.graph.ops("aten.sort")
    for tokens in (ids, ids[:1, :1], ids[:2, :40]):
        (want,) = qcompiler.interpret(fast.graph, [tokens])
        made = [fast(input_ids=tokens).last_hidden_state for _ in range(3)]  # the third call is replayed
        assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
        assert errors(made[0], want).median() < CLOSE
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fast(input_ids=ids).last_hidden_state
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, fast(input_ids=ids).last_hidden_state)


def errors(got: Tensor, want: Tensor) -> Tensor:
    """The relative error of each token."""
    got, want = got.float(), want.float()
    return (got - want).square().sum(-1).sqrt() / want.square().sum(-1).sqrt()
