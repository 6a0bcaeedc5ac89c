"""Mixtures of experts on a GPU's passes: the same bits on a CPU as without them, and few kernels of torch."""

import pytest
import torch
from expert_models import MODELS, SIZES

import qcompiler
from codegen.targets.hopper import HOPPER
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline


def lowered(name: str) -> tuple[Graph, Graph]:
    """The graph after to-kernels, and the one after all passes of a GPU."""
    torch.manual_seed(0)
    ids = torch.randint(96, (2, 19))
    model = MODELS[name]().to(torch.bfloat16).eval()
    compiled = qcompiler.compile(model, scheme="fp8_tile", example_kwargs={"input_ids": ids}, progress=False)
    after = compiled.graph.clone()
    run_pipeline(Pipeline.parse(HOPPER.passes), after)
    before = compiled.stages["to-kernels"]
    before.weights = after.weights = compiled.graph.weights
    return before, after


@pytest.mark.parametrize("name", MODELS)
def test_the_experts_of_a_layer(name: str) -> None:
    before, after = lowered(name)
    (gather,) = after.ops("kernel.gather_codes")
    assert gather["data"].op.name == "kernel.fused_quantize", "one kernel with the norm"
    (entries,) = after.ops("kernel.group_entries")
    assert gather["rows"] is entries.results[2] and not after.ops("aten.sort")
    down = after.ops("kernel.grouped_linear")[-1]
    (combine,) = after.users(down.result)
    assert down["offsets"] is entries.results[4]
    assert combine.name == "kernel.pointwise" and combine.args[0] is down.result
    moved = [op for op in after if op.name == "aten.index.Tensor" and op.result.tensor.dtype.is_float]
    assert not moved, "rows are gathered as codes, and taken back while they are added"
    filled = [op for op in after.ops("aten.masked_fill.Scalar") if op.result.tensor.shape[-1] == SIZES["hidden_size"]]
    assert not filled, "no expert is on another device"
    ids = torch.randint(96, (3, 11))
    for got, want in zip(interpret(after, [ids]), interpret(before, [ids]), strict=True):
        assert torch.equal(got, want)
