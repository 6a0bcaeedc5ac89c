"""Models that compute several projections with one linear, on a mesh: each rank has its part of each projection."""

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_graphs import rank_graphs, run_ranks, run_whole_and_ranks
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config

import qcompiler
from qcompiler.capture import capture
from qcompiler.checkpoints.files import TensorFiles
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Role
from qcompiler.pass_manager.instruments import relative_error
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.runtime.caches import cache_types

AUTO: Any = AutoModelForCausalLM  # without types
MESH: Any = qcompiler.simulated_mesh(tp=2)
IDS = torch.arange(24).reshape(2, 12) * 7 % 96
FLOAT = "canonicalize; attention; dead-code"
REST = str(qcompiler.pipeline("fp8_tile")).removeprefix(f"{FLOAT}; ")
BASE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 8, "vocab_size": 96,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 16}
FALCON: dict[str, Any] = {"model_type": "falcon", "alibi": False, "new_decoder_architecture": False}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "first_k_dense_replace": 1, "num_key_value_heads": 8,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "phi3": GROUPED,
    "glm4": GROUPED,
    "gpt2": {"n_embd": 128, "n_layer": 1, "n_head": 8},
    "mpt": {"d_model": 128, "n_layers": 1, "n_heads": 8, "max_seq_len": 64},
    "gpt_bigcode": {"n_embd": 128, "n_layer": 1, "n_head": 8, "n_positions": 64},
    "falcon, one head of keys": {**FALCON, "multi_query": True},
    "falcon, heads of keys": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 4},
    "falcon, slopes": {**FALCON, "alibi": True, "multi_query": False},
    "gpt_neox": {},
    "bloom": {"n_head": 8, "n_layer": 1},
    "codegen": {"n_embd": 128, "n_layer": 1, "n_head": 8, "n_positions": 64, "rotary_dim": 8},
    "starcoder2": GROUPED,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
}
"""Model -> what its configuration changes."""


@cache
def model(name: str) -> Any:
    torch.manual_seed(0)
    settings = {"model_type": name, **BASE, **MODELS[name]}
    found = AUTO.from_config(AutoConfig.for_model(**settings)).eval()
    for key, tensor in found.state_dict().items():
        if key.endswith("bias"):
            tensor.normal_()
    return found


def captured(found: Any) -> Graph:
    """The graph up to the passes that shard it."""
    graph = capture(found, (IDS,), {"use_cache": False}).graph
    run_pipeline(Pipeline.parse(FLOAT), graph)
    return graph


@pytest.mark.parametrize("name", MODELS)
def test_ranks_compute_what_one_process_computes(name: str) -> None:
    """All attention and all MLPs are divided."""
    graph = captured(model(name))
    (whole,) = interpret(graph, [IDS])
    for parts in (2, 4):
        ranks = rank_graphs(graph, f"tp={parts}")
        outputs, _ = run_ranks(ranks, f"tp={parts}", [IDS])
        assert str(ranks[0]).count("coll.all_reduce") == 2
        assert max(relative_error(whole, found) for (found,) in outputs) < 3e-6
        assert all(torch.equal(found, outputs[0][0]) for (found,) in outputs)


@cache
def phi3() -> Any:
    """A model whose projections begin at blocks of the format."""
    sizes: dict[str, Any] = {**BASE, "hidden_size": 512, "intermediate_size": 512, "num_key_value_heads": 4}
    torch.manual_seed(0)
    return AUTO.from_config(Phi3Config(**sizes)).eval()


CALL: dict[str, Any] = {"input_ids": IDS, "use_cache": False}


def test_quantized_heads_have_equal_bits() -> None:
    """What is split is merged again, so that a rank has as many matmuls as one process."""
    graph = captured(phi3())
    whole, ranks, _, values = run_whole_and_ranks(graph, "tp=2", REST, [IDS])
    heads = next(op for op in ranks[0].ops() if op.name == "attention.causal").result.name
    assert torch.equal(torch.cat([each[heads] for each in values], 1), whole[heads])
    assert [sum(op.role is Role.QUANTIZED_MATMUL for op in each) for each in (ranks[0], graph)] == [4, 4]


def test_what_is_reported_and_excluded() -> None:
    """Patterns of weight names select parts of these weights; a report counts the weights of the model."""
    whole: Any = qcompiler.compile(phi3(), example_kwargs=CALL)
    compiled: Any = qcompiler.compile(phi3(), mesh=MESH, example_kwargs=CALL)
    assert compiled.report.bytes_quantized == whole.report.bytes_quantized
    rows = {row.module: row for row in compiled.report.rows}
    remark = "3 ranges of its columns are separate linears; each of 2 ranks (tp) computes a part of its columns"
    assert rows["model.layers.0.self_attn.qkv_proj"].remark == remark
    sharding = 'tp{layers=["*", "!*.qkv_proj.weight"]}'
    compiled = qcompiler.compile(phi3(), mesh=MESH, sharding=sharding, example_kwargs=CALL)
    excluded = "none of its parts can be cut: the pattern '!*.qkv_proj.weight' excludes it (%slice_7)"
    assert compiled.skipped["split-linears"] == {"linear": excluded}
    assert "model.layers.0.self_attn.qkv_proj.weight" in str(compiled.graph)
    compiled = qcompiler.compile(phi3(), mesh=MESH, overrides={"*.gate_up_proj": None}, example_kwargs=CALL)
    assert [row.module for row in compiled.report.skipped] == ["model.layers.0.mlp.gate_up_proj", "lm_head"]


@pytest.mark.parametrize("quantized", [False, True])
def test_a_rank_reads_its_rows_of_each_projection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantized: bool
) -> None:
    """Once, and nothing else of these weights; codes in a checkpoint, too."""
    folder = tmp_path / "model"
    if quantized:
        qcompiler.compile(phi3(), example_kwargs=CALL).save_checkpoint(folder, "compressed-tensors")
    else:
        phi3().save_pretrained(folder)
    held: Any = qcompiler.compile(qcompiler.checkpoints.load_model(folder), mesh=MESH, example_kwargs=CALL)
    read = Counter[str]()
    part = TensorFiles.part

    def counted(self: TensorFiles, name: str, ranges: tuple[slice, ...]) -> torch.Tensor:
        found = part(self, name, ranges)
        read[name] += found.numel()
        return found

    monkeypatch.setattr(TensorFiles, "part", counted)
    compiled: Any = qcompiler.compile(folder, mesh=MESH, example_kwargs=CALL)
    sizes = {name: tensor.numel() for name, tensor in phi3().state_dict().items() if "_proj.weight" in name}
    assert {name: read[name] for name in sizes} == sizes  # by both ranks together
    for one, two in zip(compiled.ranks, held.ranks, strict=True):
        pairs = [(one.graph.weights[name], two.graph.weights[name]) for name in two.graph.weights]
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "heads"),
    [("phi3", 2), ("gpt2", 4), ("falcon, one head of keys", 1), ("falcon, heads of keys", 4), ("deepseek_v2", 1)],
)
def test_decoders(name: str, heads: int) -> None:
    options: dict[str, Any] = {"scheme": None, "max_batch": 2, "max_length": 32}
    whole = qcompiler.decoder(model(name), **options)
    ranks = qcompiler.decoder(model(name), **options, mesh=MESH)
    assert {kind.heads for kind in cache_types(ranks.graph).values()} == {heads}
    prompts = [[1, 2, 3, 4, 5], [7, 8, 9], [11]]
    assert ranks.generate(prompts, max_new_tokens=6) == whole.generate(prompts, max_new_tokens=6)
