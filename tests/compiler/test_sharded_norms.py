"""Models that normalize all heads together, on a mesh: ranks add the sums of squares, one number for each token."""

from functools import cache
from typing import Any

import pytest
import torch
from sharded_graphs import run_ranks
from transformers import AutoModelForCausalLM, Olmo2Config, OlmoeConfig, PhimoeConfig

import qcompiler
from qcompiler.capture import capture
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.pass_manager.instruments import relative_error
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline

AUTO: Any = AutoModelForCausalLM  # without types
IDS = torch.arange(24).reshape(2, 12) * 7 % 96
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96,
    "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "attention_bias": True}
CONFIGS: dict[str, Any] = {
    "olmo2": lambda heads: Olmo2Config(**{**SIZES, "num_key_value_heads": heads}),
    "olmoe": lambda heads: OlmoeConfig(**SIZES, **EXPERTS, num_experts=4),
    "phimoe": lambda heads: PhimoeConfig(**SIZES, **EXPERTS, num_local_experts=4, lm_head_bias=True),
}


@cache
def model(name: str, heads: int = 4) -> Any:
    torch.manual_seed(0)
    found = AUTO.from_config(CONFIGS[name](heads)).eval()
    for key, tensor in found.state_dict().items():
        if key.endswith(("bias", "norm.weight")):
            tensor.normal_()
    return found


@cache
def captured(name: str, heads: int = 4) -> Graph:
    """The graph up to the passes that shard it."""
    graph = capture(model(name, heads), (IDS,)).graph
    run_pipeline(Pipeline.parse("canonicalize; attention; dead-code"), graph)
    return graph


def ranks_of(graph: Graph, mesh: str, count: int) -> list[Graph]:
    found = [graph.clone() for _ in range(count)]
    for rank, own in enumerate(found):
        steps = f'split-norms{{mesh="{mesh}"}}; shard{{mesh="{mesh}"}}; collectives; '
        run_pipeline(Pipeline.parse(f'{steps}partition{{mesh="{mesh}", rank={rank}}}'), own)
    return found


@pytest.mark.parametrize(("name", "parts"), [("olmo2", 2), ("olmo2", 4), ("olmoe", 4)])
def test_ranks_compute_what_one_process_computes(name: str, parts: int) -> None:
    graph = captured(name)
    ranks = ranks_of(graph, f"tp={parts}", parts)
    (whole,), (outputs, _) = interpret(graph, [IDS]), run_ranks(ranks, f"tp={parts}", [IDS])
    lines = str(ranks[0]).splitlines()
    assert sum("coll.all_reduce" in line and "f32[s0, s1, 1]" in line for line in lines) == 2  # queries, and keys
    assert max(relative_error(whole, found) for (found,) in outputs) < 2e-6
    assert all(torch.equal(found, outputs[0][0]) for (found,) in outputs)


@pytest.mark.parametrize(("name", "sums"), [("olmo2", 2), ("olmoe", 2), ("phimoe", 0)])
def test_all_tactics_on_quantized_models(name: str, sums: int) -> None:
    """Sums of one number for each token are not scattered: a second collective would take longer than it saves."""
    graph = captured(name)
    whole: Any = qcompiler.compile(graph)
    compiled: Any = qcompiler.compile(graph, mesh=qcompiler.simulated_mesh(tp=2), sharding="tp; ep; sp{tokens=4}")
    text = str(compiled.graph)
    assert (text.count("coll.all_reduce"), text.count("_scatter_tokens(")) == (sums, 2)
    assert relative_error(whole(IDS), compiled(IDS)) < 3e-3
    assert sum("one number for each token" in why for why in compiled.skipped["sequence-parallel"].values()) == sums


def test_decoder() -> None:
    options: dict[str, Any] = {"max_batch": 2, "max_length": 32}
    whole = qcompiler.decoder(model("olmo2"), **options)
    ranks = qcompiler.decoder(
        model("olmo2"), **options, mesh=qcompiler.simulated_mesh(tp=2), sharding="tp; sp{tokens=4}"
    )
    prompts = [[1, 2, 3, 4, 5], [7, 8, 9], [11]]
    assert ranks.generate(prompts, max_new_tokens=6) == whole.generate(prompts, max_new_tokens=6)


def test_a_norm_of_heads_that_several_ranks_hold() -> None:
    """Each rank would add the squares of the same keys; the MLP is divided."""
    mesh: Any = qcompiler.simulated_mesh(tp=4)
    compiled = qcompiler.compile(captured("olmo2", 2), pipeline="dead-code", strict=False, mesh=mesh)
    assert compiled.skipped["split-norms"] == {
        "mean_1": "several ranks hold the same heads, so that a sum over ranks would add them again"
    }
    assert "aten.mean.dim combines the elements along axis 2" in compiled.skipped["shard"]["linear_3"]
