"""Decoders on a mesh: the tokens of one process, with the cache of each rank's own heads."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import run_on_two_ranks
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OPTConfig

import qcompiler
from qcompiler.runtime.caches import cache_types

AUTO: Any = AutoModelForCausalLM  # without types
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9], [11]]
TWO = qcompiler.simulated_mesh(tp=2)


SIZES: dict[str, Any] = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 96, "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 2, "tie_word_embeddings": False,
}  # fmt: skip


@cache
def model() -> Any:
    torch.manual_seed(0)
    return AUTO.from_config(LlamaConfig(**SIZES)).eval()


@cache
def mixture(layers: int = 2) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SIZES, "num_hidden_layers": layers, "num_local_experts": 4, "num_experts_per_tok": 2}
    return AUTO.from_config(MixtralConfig(**sizes)).eval()


def decoder(**options: Any) -> qcompiler.Decoder:
    return qcompiler.decoder(model(), max_batch=2, max_length=32, **options)


@pytest.mark.parametrize("options", [{"scheme": None}, {"kv_cache": "fp8"}], ids=["float", "fp8"])
def test_tokens_of_all_ranks(options: dict[str, Any]) -> None:
    whole, ranks = decoder(**options), decoder(**options, mesh=TWO)
    assert ranks.generate(PROMPTS, max_new_tokens=6) == whole.generate(PROMPTS, max_new_tokens=6)
    sampled: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.7, "seed": 3}
    assert ranks.generate(PROMPTS, **sampled) == whole.generate(PROMPTS, **sampled)
    assert {(kind.heads, kind.slots) for kind in cache_types(ranks.graph).values()} == {(2, 2)}
    assert 2 * ranks.memory.cache == whole.memory.cache


@pytest.mark.parametrize("sharding", ["tp; sp{tokens=4}", "tp; ep; sp{tokens=4}", "tp; ep{send=chosen}; sp{tokens=4}"])
def test_tactics(sharding: str) -> None:
    """Prompts are cut, decode steps of few tokens are not, and the graph remains causal."""
    found = mixture() if "ep" in sharding else model()
    sizes: dict[str, Any] = {"max_batch": 2, "max_length": 32}
    whole, ranks = qcompiler.decoder(found, **sizes), qcompiler.decoder(found, **sizes, mesh=TWO, sharding=sharding)
    text = str(ranks.graph)
    chosen = text.count("coll.reduce_scatter_chosen_tokens(")
    assert (text.count("_scatter_tokens(") + chosen, chosen) == (4, 2 if "chosen" in sharding else 0)
    assert text.count("coll.own_first") == (2 if "ep" in sharding else 0)
    assert ranks.generate(PROMPTS, max_new_tokens=6) == whole.generate(PROMPTS, max_new_tokens=6)


def test_tokens_that_the_model_counts_in_one_axis() -> None:
    """OPT flattens batches before its second norm."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "ffn_dim": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = OPTConfig(**sizes, vocab_size=96, max_position_embeddings=64, word_embed_proj_dim=256)
    found = AUTO.from_config(config).eval()
    options: dict[str, Any] = {"max_batch": 2, "max_length": 32}
    whole = qcompiler.decoder(found, **options)
    ranks = qcompiler.decoder(found, **options, mesh=TWO, sharding="tp; sp{tokens=4}")
    assert str(ranks.graph).count("_scatter_tokens(") == 2
    assert ranks.generate(PROMPTS, max_new_tokens=6) == whole.generate(PROMPTS, max_new_tokens=6)


def test_gathers_for_attention_that_ranks_do_not_divide() -> None:
    """A layer has one sum and two norms, which are cut because they are gathered as codes and scales."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"hidden_size": 384, "num_attention_heads": 3, "num_key_value_heads": 3})
    found = AUTO.from_config(config).eval()
    options: dict[str, Any] = {"max_batch": 2, "max_length": 32}
    ranks = qcompiler.decoder(found, **options, mesh=TWO, sharding="tp; sp{tokens=4}")
    assert str(ranks.graph).count("_scatter_tokens(") == 2
    whole = qcompiler.decoder(found, **options)
    assert ranks.generate(PROMPTS, max_new_tokens=6) == whole.generate(PROMPTS, max_new_tokens=6)
    floats = qcompiler.decoder(found, **options, scheme=None, mesh=TWO, sharding="tp; sp{tokens=4}")
    (note,) = floats.report.notes
    assert "would send 3072 + 4608 bytes of each token in its region, more than the 6144 of its all-reduces" in note


def test_sums_as_codes(tmp_path: Path) -> None:
    """Prompts and decode steps have the tokens of the program in which each rank adds the terms of all tokens."""
    cut, few = (decoder(mesh=TWO, sharding=f"tp; sp{{tokens={tokens}, sums=fp8_tile}}") for tokens in (4, 1000))
    text = str(cut.graph)
    assert text.count("coll.all_to_all_tokens") == 2 * 4 and "reduce_scatter" not in text
    cut.save(tmp_path / "saved")
    loaded: Any = qcompiler.load(tmp_path / "saved", mesh=TWO)
    expected = few.generate(PROMPTS, max_new_tokens=6)
    assert cut.generate(PROMPTS, max_new_tokens=6) == loaded.generate(PROMPTS, max_new_tokens=6) == expected


def test_a_tied_vocabulary_is_stored_once_and_divided() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 96}
    config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    tied = AUTO.from_config(config).eval()
    options: dict[str, Any] = {"max_batch": 2, "max_length": 32}
    whole = qcompiler.decoder(tied, **options)
    ranks = qcompiler.decoder(tied, **options, mesh=TWO, sharding="tp{gather=1024}")
    shapes = [tuple(ranks.graph.weights[name].shape) for name in ranks.graph.weights]
    assert shapes.count((48, 128)) == 1 and (96, 128) not in shapes
    assert ranks.generate(PROMPTS, max_new_tokens=6) == whole.generate(PROMPTS, max_new_tokens=6)


VARIANTS: list[dict[str, Any]] = [
    {}, {"temperature": 0.7, "seed": 3}, {"temperature": 1.2, "top_k": 10}, {"repetition_penalty": 1.3},
]  # fmt: skip


def test_a_vocabulary_in_parts() -> None:
    """Each rank has the logits of its part of the vocabulary; the tokens are the ones of the whole."""
    whole, ranks = decoder(), decoder(mesh=TWO, sharding="tp{gather=1024}")
    (output,) = ranks.graph.outputs
    assert str(output) == "%linear_14_whole_last_own" and ranks.step.vocabulary == 96
    for options in VARIANTS:
        assert ranks.generate(PROMPTS, max_new_tokens=6, **options) == whole.generate(
            PROMPTS, max_new_tokens=6, **options
        )


def test_all_tactics_are_saved(tmp_path: Path) -> None:
    sharding = "tp{gather=1024}; ep; sp{tokens=4}"
    ranks = qcompiler.decoder(mixture(1), max_batch=2, max_length=32, mesh=TWO, sharding=sharding)
    ranks.save(tmp_path / "saved")
    loaded: Any = qcompiler.load(tmp_path / "saved", mesh=TWO)
    assert loaded.step.vocabulary == 96 and str(loaded.graph) == str(ranks.graph)
    assert loaded.generate(PROMPTS, max_new_tokens=4) == ranks.generate(PROMPTS, max_new_tokens=4)


@pytest.mark.slow
def test_two_processes_with_all_tactics(tmp_path: Path) -> None:
    script = """
from test_sharded import PROMPTS, VARIANTS, mixture

decoder = qcompiler.decoder(
    mixture(1), max_batch=2, max_length=32, mesh=mesh, sharding="tp{gather=1024}; ep; sp{tokens=4}", progress=False
)
found["tokens"] = [decoder.generate(PROMPTS, max_new_tokens=6, **options) for options in VARIANTS[:2]]
"""
    folder = str(Path(__file__).parent)
    found = run_on_two_ranks(f"sys.path.append({folder!r})\n{script}", tmp_path)
    whole = qcompiler.decoder(mixture(1), max_batch=2, max_length=32)
    expected = [whole.generate(PROMPTS, max_new_tokens=6, **options) for options in VARIANTS[:2]]
    assert [rank["tokens"] for rank in found] == [expected, expected]


def test_refusals() -> None:
    with pytest.raises(qcompiler.PassError, match="there is no calibration data, and this pipeline needs some"):
        decoder(kv_cache="fp8_static", mesh=TWO)
    ranks = decoder(scheme=None, mesh=TWO)
    for refused in (lambda _: ranks.save_checkpoint("x", "float"), lambda _: ranks.for_transformers()):
        with pytest.raises(qcompiler.QCompilerError, match="Compile the model without a mesh for that"):
            refused("folder")
