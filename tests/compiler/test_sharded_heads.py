"""Models with fewer heads of keys than ranks: each rank holds the one head that its query heads read."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_graphs import rank_graphs, run_whole_and_ranks
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config

import qcompiler
from qcompiler.capture import capture
from qcompiler.ir import Graph
from qcompiler.pass_manager.instruments import relative_error
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.runtime.caches import cache_types

AUTO: Any = AutoModelForCausalLM  # without types
IDS = torch.arange(24).reshape(2, 12) * 7 % 96
FLOAT = "canonicalize; attention; dead-code"
REST = str(qcompiler.pipeline("fp8_tile")).removeprefix(f"{FLOAT}; ")
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": 128,
    "vocab_size": 96, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama, 2 heads": lambda: LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2 with biases, 2 heads": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),
    "gemma3 with norms of heads, 1 head": lambda: Gemma3TextConfig(
        **SIZES, num_key_value_heads=1, layer_types=["full_attention"]
    ),
}


@cache
def model(name: str) -> Any:
    torch.manual_seed(0)
    found = AUTO.from_config(CONFIGS[name]()).eval()
    for key, tensor in found.state_dict().items():
        if key.endswith("bias"):
            tensor.normal_()
    return found


@cache
def captured(name: str) -> Graph:
    """The graph up to the passes that shard it."""
    graph = capture(model(name), (IDS,)).graph
    run_pipeline(Pipeline.parse(FLOAT), graph)
    return graph


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_have_equal_bits(name: str) -> None:
    """Also after quantization: query heads, the keys that they read, and what each rank stores."""
    graph = captured(name).clone()
    whole, ranks, outputs, values = run_whole_and_ranks(graph, "tp=4", REST, [IDS])
    heads = next(op for op in ranks[0].ops() if op.name == "attention.causal").result.name
    assert torch.equal(torch.cat([each[heads] for each in values], 1), whole[heads])
    assert all(relative_error(whole[str(graph.outputs[0]).removeprefix("%")], found) < 5e-3 for (found,) in outputs)
    assert all(torch.equal(found, outputs[0][0]) for (found,) in outputs)


def test_what_ranks_store() -> None:
    name = "qwen2 with biases, 2 heads"
    ranks, weights = rank_graphs(captured(name), "tp=4"), model(name).state_dict()
    for kind in ("weight", "bias"):
        key = f"model.layers.0.self_attn.k_proj.{kind}"
        own = [rank.weights[key] for rank in ranks]
        assert all(torch.equal(own[at], weights[key][128 * (at // 2) : 128 * (at // 2 + 1)]) for at in range(4))


@pytest.mark.parametrize("name", ["llama, 2 heads", "gemma3 with norms of heads, 1 head"])
def test_decoders(name: str) -> None:
    options: dict[str, Any] = {"max_batch": 2, "max_length": 32}
    whole = qcompiler.decoder(model(name), **options)
    ranks = qcompiler.decoder(model(name), **options, mesh=qcompiler.simulated_mesh(tp=4))
    assert {kind.heads for kind in cache_types(ranks.graph).values()} == {1}
    prompts = [[1, 2, 3, 4, 5], [7, 8, 9], [11]]
    assert ranks.generate(prompts, max_new_tokens=6) == whole.generate(prompts, max_new_tokens=6)


def test_a_checkpoint_is_read_in_slices(tmp_path: Path) -> None:
    found = model("qwen2 with biases, 2 heads")
    found.save_pretrained(tmp_path)
    call: dict[str, Any] = {"example_kwargs": {"input_ids": IDS, "use_cache": False}}
    mesh = qcompiler.simulated_mesh(tp=4)
    read: Any = qcompiler.compile(tmp_path, mesh=mesh, **call)
    held: Any = qcompiler.compile(found, mesh=mesh, **call)
    for one, two in zip(read.ranks, held.ranks, strict=True):
        assert all(torch.equal(one.graph.weights[name], two.graph.weights[name]) for name in two.graph.weights)


@pytest.mark.parametrize(
    ("name", "ranks", "why"),
    [
        ("llama, 2 heads", 16, "8 blocks of 128 elements along axis 2 cannot be cut into 16 equal parts; the nearest"),
        ("gemma3 with norms of heads, 1 head", 3, "cannot be cut into 3 equal parts; the nearest possible number of"),
    ],
)
def test_refusals(name: str, ranks: int, why: str) -> None:
    with pytest.raises(qcompiler.PassError) as error:
        qcompiler.compile(captured(name), mesh=qcompiler.simulated_mesh(tp=ranks))
    assert why in str(error.value)


def test_a_single_head_is_explained() -> None:
    compiled = qcompiler.compile(
        captured("gemma3 with norms of heads, 1 head"), mesh=qcompiler.simulated_mesh(tp=4), sharding="tp"
    )
    whole = {name for name, why in compiled.skipped["shard"].items() if "its only head" in why}
    assert whole == {"linear_1", "linear_2"}
