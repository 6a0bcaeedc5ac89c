"""What runs as a kernel of torch in compiled models for a GPU, and why; and that fusing changes no bit on a CPU."""

from collections import Counter
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

STEP = {
    "aten.arange": "positions of the step and rows of the batch: integers",
    "aten.add.Tensor": "positions of the step: integers",
    "aten.embedding": "its rows depend on token ids",
    "aten._to_copy": "positions of the step: integers, converted once",
    "aten.index.Tensor": "the hidden state of each row's last token",
    "aten.linear": "the vocabulary projection, which the scheme does not quantize",
}
"""Once per step, in every decoder."""

EXPERTS = {
    "aten.linear": STEP["aten.linear"] + "; routers",
    "aten.softmax.int": "a sum over the router's experts",
    "aten.topk": "experts are sorted",
    "aten.sum.dim_IntList": "a sum over chosen experts",
    "aten.div.Tensor": "alone between a sum and a choice of rows",
    "aten.sort": "tokens are sorted by expert",
    "aten.cumsum": "counts of tokens by expert",
    "aten.histc": "counts of tokens by expert",
    "aten.floor_divide": "tokens sorted by expert: integers",
    "aten.empty_like": "the inverse of a permutation: integers",
    "aten.index_put": "the inverse of a permutation: integers",
    "aten.index.Tensor": STEP["aten.index.Tensor"] + "; rows of tokens, chosen by expert",
    "aten.mul.Tensor": "alone between choices of rows",
    "aten._to_copy": STEP["aten._to_copy"] + "; alone between sums",
}

MODELS: dict[str, tuple[Any, dict[str, str]]] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), STEP),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER)), STEP),
    "gemma3": (
        lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**DECODER, sliding_window=8)),
        STEP | {"aten.mul.Tensor": "scales the embedding, which is read as a residual"},
    ),
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=4)), STEP | EXPERTS),
    "bert": (
        lambda: hf.BertModel(hf.BertConfig(**SIZES)),
        {
            "aten.embedding": STEP["aten.embedding"],
            "aten.gather": "token types: integers",
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
        inputs = [ids, torch.arange(rows), zeros, zeros + length - 1, 0][: len(before.inputs)]
    for got, want in zip(interpret(after, inputs, before.weights), interpret(before, inputs), strict=True):
        assert torch.equal(got, want)


def test_the_kernels_of_a_step_do_not_grow_with_layers_beyond_its_own() -> None:
    kernels = []
    for layers in (1, 2):
        config = hf.LlamaConfig(**DECODER | {"num_hidden_layers": layers})
        _, after = lowered(hf.LlamaForCausalLM(config), decoder=True)
        kernels.append(torch_kernels(after))
    assert kernels[0] == kernels[1]
