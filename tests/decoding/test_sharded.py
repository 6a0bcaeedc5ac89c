"""Decoders on a mesh: the tokens of one process, with the cache of each rank's own heads."""

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import qcompiler
from qcompiler.runtime.caches import cache_types

AUTO: Any = AutoModelForCausalLM  # without types
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9], [11]]
TWO = qcompiler.simulated_mesh(tp=2)


@cache
def model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 96}
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, tie_word_embeddings=False, **sizes
    )
    return AUTO.from_config(config).eval()


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


def test_refusals() -> None:
    with pytest.raises(qcompiler.PassError, match="a sharded model cannot be calibrated"):
        decoder(kv_cache="fp8_static", calibration=[torch.tensor([[1, 2, 3]])], mesh=TWO)
    ranks = decoder(scheme=None, mesh=TWO)
    for refused in (ranks.save, lambda _: ranks.save_checkpoint("x", "float"), lambda _: ranks.for_transformers()):
        with pytest.raises(qcompiler.QCompilerError, match="Compile the model without a mesh for that"):
            refused("folder")
