"""Decoding and prefill of Llama-3-8B with random weights, against bf16 with torch.compile and a StaticCache.

    python benchmarks/decoding.py [--out FOLDER] [--layers 32] [--batches 1,16,64] [--contexts 1024,2048]

Times of decode steps are medians of alternating CUDA-graph replays, without Python overhead: a loop around the baseline
cannot be faster. Times of prefill are medians of single calls, which take long enough to hide Python. The floor of a
decode step is the time to copy as many bytes as it must read: all weights but the embedding, and the cached keys and
values of the context. The baseline compiles its layers one by one; its attention reads a full cache without a mask,
through torch's flash attention.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from time import perf_counter
from typing import Any

import harness
import torch
import transformers
from memory_bound import copy_bandwidth
from torch import Tensor
from torch.nn import functional

import qcompiler
from codegen.launching.timing import in_turns
from qcompiler.decoding.decoder import Decoder
from qcompiler.decoding.sampling import Features
from qcompiler.decoding.slot_table import Rows, SlotTable

LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0, "dtype": torch.bfloat16,
    "tie_word_embeddings": False,
}  # fmt: skip
PREFILL = 4096
CACHE = "cache" if "cache" in signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
"""The name of the argument, which depends on the version."""


def main() -> None:
    torch.manual_seed(0)
    given = options()
    model = random_llama(given.layers)
    batches = [int(batch) for batch in given.batches.split(",")]
    began = perf_counter()
    llm = qcompiler.decoder(
        model, scheme="fp8_tile", kv_cache="fp8", max_batch=max(batches), max_length=PREFILL, progress=False
    )
    print(f"compiled in {perf_counter() - began:.0f} s\n{llm.memory}", flush=True)
    speed = 1e9 * copy_bandwidth()
    contexts = [int(context) for context in given.contexts.split(",")]
    rows = [decoding(llm, model, batch, context, speed) for batch in batches for context in contexts]
    harness.gpu_report("decoding", "Decoding of Llama-3-8B, fp8_tile with an FP8 cache", rows)
    ours, bf16 = harness.eager(partial(prefill, llm), calls=5), harness.eager(bf16_prefill(model), calls=5)
    row = {"tokens": PREFILL, "fp8_tile ms": ours, "bf16 ms": bf16, "times bf16": bf16 / ours}
    harness.gpu_report("prefill", "Prefill of Llama-3-8B, fp8_tile with an FP8 cache", [row])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--contexts", default="1024,2048")
    return parser.parse_known_args()[0]


def random_llama(layers: int) -> transformers.LlamaForCausalLM:
    """The model on the GPU, in bf16; made there, because initialization on a CPU takes minutes."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **LLAMA_3_8B))
    model = model.to(torch.bfloat16).to_empty(device="cuda").eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.constant_(parameter, 1.0) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to("cuda").eval()  # its buffers are computed
    return model.requires_grad_(False)


def decoding(llm: Decoder, model: torch.nn.Module, batch: int, context: int, speed: float) -> dict[str, Any]:
    """A row of the table: one decode step of `batch` sequences of `context` tokens."""
    table, rows = SlotTable(llm.step), Rows.empty(batch, llm.step.device)
    table.lengths.fill_(context)  # sequences do not grow: no slot is active
    table.load(rows, range(batch))
    found: dict[str, Sequence[Callable[[], object]]] = {
        "fp8_tile": [lambda: table.advance(rows, Features())],
        "bf16": [bf16_step(model, batch, context)],
    }
    times = in_turns(found, rounds=7, budget=30, most=8)
    read = step_bytes(llm, batch, context)
    row: dict[str, Any] = {
        "batch": batch, "context": context, "fp8_tile ms": times["fp8_tile"] / 1e3,
        "tokens/s": batch / (times["fp8_tile"] / 1e6), "floor ms": read / speed * 1e3,
        "% of floor": 100 * read / speed / (times["fp8_tile"] / 1e6), "copy GB/s": speed / 1e9,
        "bf16 ms": times["bf16"] / 1e3, "times bf16": times["bf16"] / times["fp8_tile"],
    }  # fmt: skip
    print(row, flush=True)
    return row


def step_bytes(llm: Decoder, batch: int, context: int) -> int:
    """Bytes that a decode step must read: every weight but the embedding, and the cached positions."""
    embedding = next(value for name, value in llm.graph.weights.items() if "embed_tokens" in name)
    position = llm.memory.cache / (llm.step.slots * llm.step.capacity)
    return int(llm.memory.weights - embedding.nbytes + batch * context * position)


def prefill(llm: Decoder) -> Tensor:
    zero = torch.zeros(1, dtype=torch.int64, device="cuda")
    return llm.step(prompt(), zero, zero, torch.full_like(zero, PREFILL - 1), 0)


def prompt() -> Tensor:
    return torch.arange(PREFILL, device="cuda")[None]


def bf16_prefill(model: Any) -> Callable[[], object]:
    model.set_attn_implementation("sdpa")
    compile_layers(model)
    return lambda: model(prompt(), use_cache=False, logits_to_keep=1).logits


def bf16_step(model: Any, batch: int, context: int) -> Callable[[], object]:
    """One greedy step over a StaticCache which its token fills."""
    model.set_attn_implementation("full_cache")
    compile_layers(model)
    cache = transformers.StaticCache(config=model.config, max_cache_len=context + 1)
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    cache.early_initialization(batch, heads, size, torch.bfloat16, "cuda")
    counts = [layer.cumulative_length for layer in cache.layers if hasattr(layer, "cumulative_length")]
    ids = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    place = torch.full((batch, 1), context, device="cuda")
    seen = torch.ones(batch, 1, 1, context + 1, dtype=torch.bool, device="cuda")
    named: dict[str, Any] = {CACHE: cache}

    def step() -> Tensor:
        for count in counts:  # of appended tokens, since transformers 5.20: each step fills the last position
            count.fill_(context)
        out = model(ids, position_ids=place, attention_mask=seen, use_cache=True, **named)
        return out.logits[:, -1].argmax(-1)  # type: ignore[no-any-return]  # transformers has no types

    return step


def full_cache(_: Any, query: Tensor, key: Tensor, value: Tensor, __: Any, **options: Any) -> tuple[Tensor, None]:
    """Attention to all positions, as transformers calls it."""
    out = functional.scaled_dot_product_attention(query, key, value, scale=options["scaling"], enable_gqa=True)
    return out.transpose(1, 2), None


transformers.AttentionInterface.register("full_cache", full_cache)


def compile_layers(model: Any) -> None:
    """Compiles each layer: their caches have numbers, so no two layers share their code."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    for layer in model.model.layers:
        layer.compile(fullgraph=False)


if __name__ == "__main__":
    with torch.no_grad():
        main()
