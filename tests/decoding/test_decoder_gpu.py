"""Decoders on a Hopper GPU: the loop over recorded CUDA graphs gives the tokens of single calls and of transformers."""

from typing import Any

import decoding_models as models
import pytest
import torch
from transformers import LlamaConfig

import qcompiler
from qcompiler.decoding.decoder import Decoder
from qcompiler.runtime.caches import cache_types

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 9, 31], [7, 7], [11, 3, 4, 60, 22, 13, 8], [1], [40, 41, 42, 43], [60, 2, 19]]


def wide_llama() -> Any:
    """Sizes that the FP8 kernels take, two layers, and heads that are one tile of a quantized row."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "num_key_value_heads": 2}
    return models.tiny(LlamaConfig(**{**models.COMMON, **sizes})).to("cuda", torch.bfloat16)


def made(model: Any, **options: Any) -> Decoder:
    sizes: dict[str, Any] = {"scheme": None, "max_batch": 3, "max_length": 64, "progress": False}
    return qcompiler.decoder(model, **{**sizes, **options})


def wanted(model: Any, new: int) -> list[list[int]]:
    return models.greedy_tokens(model, PROMPTS, new)


@pytest.mark.parametrize("name", [*models.QUICK, "bloom", "llama4"])
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    """In FP32; six prompts wait for three slots, so that recorded steps of several batch sizes are replayed."""
    model = models.MODELS[name]().cuda()
    assert made(model).generate(PROMPTS, max_new_tokens=12, ignore_eos=True) == wanted(model, 12)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_rings_give_the_tokens_of_transformers(name: str) -> None:
    """Windows of 4 positions, rings of 16, and prompts of several chunks."""
    model = models.MODELS[name]().cuda()
    llm = made(model, max_chunk=6)
    assert any(kind.ring == 16 for kind in cache_types(llm.graph).values())
    assert llm.generate(PROMPTS, max_new_tokens=40, ignore_eos=True) == wanted(model, 40)


@pytest.mark.parametrize("kv_cache", ["fp8", None])
def test_recorded_steps_repeat_direct_ones(kv_cache: str | None) -> None:
    """The kernels of the quantized step overlap; a hundred replays give the logits of a single call, bit by bit."""
    llm = made(wide_llama(), scheme="fp8_tile", kv_cache=kv_cache)
    for name in ("kernel.scaled_linear", "kernel.fused_quantize", "state.fused_attend"):
        assert llm.graph.ops(name), f"the graph has no {name}"
    step: Any = llm.step
    device = torch.device("cuda")
    slots, last = torch.arange(3, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    prompt = torch.randint(3, 60, (3, 40), device=device)
    step(prompt, slots, last, last + 39)
    ids, lengths = torch.tensor([[5], [9], [31]], device=device), torch.tensor([40, 17, 3], device=device)
    direct = step(ids, slots, lengths, last).clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(ids, slots, lengths, last)
    for _ in range(100):
        graph.replay()
        assert torch.equal(out, direct)


def test_answers_of_a_quantized_model_can_be_repeated() -> None:
    llm = made(wide_llama(), scheme="fp8_tile", kv_cache="fp8")
    greedy = llm.generate(PROMPTS, max_new_tokens=20, ignore_eos=True)
    assert llm.generate(PROMPTS, max_new_tokens=20, ignore_eos=True) == greedy
    sampled = llm.generate(PROMPTS, max_new_tokens=20, ignore_eos=True, temperature=0.8, seed=3)
    assert sampled == llm.generate(PROMPTS, max_new_tokens=20, ignore_eos=True, temperature=0.8, seed=3)
    assert sampled != greedy
