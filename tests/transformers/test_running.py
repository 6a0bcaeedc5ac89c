"""Quantized models in transformers' generation, batching and training, and in torch.compile."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers_models import IDS, llama_config, load, logits_of, mixtral_config, saved

from qcompiler.transformers import QuantizedLinear

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 99, "pad_token_id": 99}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(saved(tmp_path_factory.mktemp("plain"), llama_config(initializer_range=0.2)), "fp8_tile")


def greedy(model: Any, ids: list[int]) -> list[int]:
    """Greedy tokens, each from a call with the whole sequence."""
    for _ in range(GREEDY["max_new_tokens"]):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(model: Any, cache: str) -> None:
    ids = torch.tensor([[7, 3, 11]])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=cache, **GREEDY)
    assert found.tolist() == [greedy(model, [7, 3, 11])]


def test_generate_batch(model: Any) -> None:
    prompts = [[7, 3, 11], [40, 2, 9, 5, 1]]
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)  # by default, a share of the free memory
    config: Any = GenerationConfig
    options: dict[str, Any] = {"continuous_batching_config": small, "generation_config": config(**GREEDY)}
    found = model.generate_batch(prompts, **options)
    tokens = [answer.generated_tokens for _, answer in sorted(found.items())]
    assert tokens == [greedy(model, ids)[len(ids) :] for ids in prompts]


@pytest.mark.parametrize("config", [llama_config, mixtral_config])
def test_torch_compile_without_graph_breaks(tmp_path: Path, config: Any) -> None:
    model = load(saved(tmp_path, config()), "fp8_tile")
    compiled: Any = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS).logits, logits_of(model))


def test_the_gradient_of_a_layer(model: Any) -> None:
    layer: QuantizedLinear = model.get_submodule("model.layers.0.self_attn.q_proj")
    x, dy = torch.randn(3, 192, requires_grad=True), torch.randn(3, 192)
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ layer.dequantized(torch.float32))
    assert layer.bias is not None and layer.bias.grad is not None and layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad.float(), dy.sum(0), rtol=0.01, atol=0.01)  # BF16


def test_autocast_sets_the_dtype(model: Any) -> None:
    layer: QuantizedLinear = model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(3, 192)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    with torch.no_grad():
        assert found.dtype is torch.bfloat16 and torch.equal(found, layer(x.bfloat16()))
