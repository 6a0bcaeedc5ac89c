"""What runs as a kernel of torch in compiled models for a GPU, and why; and that fusing changes no bit on a CPU."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import qcompiler
from codegen.targets.hopper import HOPPER
from qcompiler.compiler.decoders import decoding_pipeline
from qcompiler.decoding.cached import cache_passes
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Role
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
    "max_position_embeddings": 64,
}  # fmt: skip
DECODER = SIZES | {"num_key_value_heads": 2, "head_dim": 32}

STEP = {"aten.linear": "the vocabulary projection, which the scheme does not quantize"}
"""Once per step, in every decoder."""

EXPERTS = {
    "aten.linear": STEP["aten.linear"] + "; routers",
    "aten.softmax.int": "a sum over the router's experts",
    "aten.topk": "experts are sorted",
    "aten.sum.dim_IntList": "a sum of a row: the scores of the chosen experts",
    "aten.div.Tensor": "alone between a sum and a choice of rows",
    "aten._to_copy": "alone before a softmax",
}

MODELS: dict[str, tuple[Any, dict[str, str]]] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), STEP),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER)), STEP),
    "gemma3": (
        lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**DECODER, sliding_window=8)),
        STEP,
    ),
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=4)), STEP | EXPERTS),
    "bert": (
        lambda: hf.BertModel(hf.BertConfig(**SIZES)),
        {
            "aten.scaled_dot_product_attention": "torch's own kernels",
            "aten.layer_norm": "the last norm, alone",
        },
    ),
}


def lowered(model: nn.Module, decoder: bool) -> tuple[Graph, Graph]:
    """The graph before and after the passes of the target."""
    torch.manual_seed(0)
    model = model.to(torch.bfloat16).eval()
    passes = qcompiler.pipeline("fp8_tile")
    ids = torch.randint(96, (2, 19))
    example = {"input_ids": ids}
    if decoder:
        passes = decoding_pipeline("fp8_tile", None).append(*cache_passes("fp8", 2, 64))
        example["position_ids"] = torch.arange(19).expand(2, 19).contiguous()
    compiled = qcompiler.compile(model, pipeline=passes, example_kwargs=example, progress=False)
    before = compiled.graph
    after = before.clone()
    run_pipeline(Pipeline.parse(HOPPER.passes), after)
    return before, after


def torch_kernels(graph: Graph) -> Counter[str]:
    """The operations that run a kernel of torch."""
    return Counter(
        op.name for op in graph.ops()
        if op.name.partition(".")[0] not in ("core", "kernel", "state") and op.role is not Role.VIEW
        and op.name != "aten.sym_size.int" and not graph.is_constant(op.results[0])
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_what_remains_of_torch_and_why(name: str) -> None:
    build, reasons = MODELS[name]
    before, after = lowered(build(), name != "bert")
    remaining = torch_kernels(after)
    assert {*remaining} == {*reasons}, remaining
    rows, length = 2, 11
    ids = torch.randint(96, (rows, length))
    inputs: list[Any] = [ids] * len(before.inputs)
    if name != "bert":
        fused = after.ops("state.fused_append")
        assert len(fused) == 2 and not after.ops("state.append"), "one kernel for each layer"
        zeros = torch.zeros(rows, dtype=torch.int64)
        inputs = [ids, torch.arange(rows), zeros, torch.tensor([3, length - 1]), 0][: len(before.inputs)]
    for got, want in zip(interpret(after, inputs, before.weights), interpret(before, inputs), strict=True):
        assert torch.equal(got, want)


def kernels(graph: Graph) -> int:
    """The operations that run at least one kernel, of torch or of ours."""
    ours = [op for op in graph.ops() if op.name.startswith(("kernel.", "state.")) and op.name != "state.cache"]
    return torch_kernels(graph).total() + len(ours)


@pytest.mark.parametrize(
    ("name", "outside", "was"),
    [
        ("llama", 3, 10),  # embedding with both tables of positions; norm of the last token; vocabulary projection
        ("gemma3", 3, 13),  # tables of two rotary embeddings
    ],
)
def test_kernels_of_a_step_outside_the_layers(name: str, outside: int, was: int) -> None:
    """`was` is the number before indices of a fused expression could depend on tensors of integers."""
    found = []
    for layers in (1, 2):
        config = dict(DECODER, num_hidden_layers=layers)
        models: dict[str, Any] = {
            "llama": partial(hf.LlamaForCausalLM, hf.LlamaConfig(**config)),
            "gemma3": partial(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**config)),
        }
        found.append(kernels(lowered(models[name](), decoder=True)[1]))
    first, second = found
    assert 2 * first - second == outside < was
