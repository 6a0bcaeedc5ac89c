"""The kernels of layers of published sizes, compiled for Hopper without a GPU, for the tokens of prompts and of steps.

Tiny models do not reach all configurations of a kernel: for few tokens of a wide model, a program computes one row.
"""

from collections.abc import Callable, Hashable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import qcompiler
from codegen.direct import kernels
from codegen.launching.launch import KernelCall
from codegen.launching.replay import state
from codegen.operators.operator import OPERATORS
from codegen.targets.cuda import CudaTarget, gpu_at
from codegen.targets.hopper import HOPPER
from codegen.templates.limits import Limits

COMMON: dict[str, Any] = {"vocab_size": 512, "num_hidden_layers": 1, "use_cache": False}
QWEN3_30B_A3B: dict[str, Any] = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 16, "num_experts_per_tok": 8, "norm_topk_prob": True,
}  # fmt: skip
LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
GEMMA_3_4B: dict[str, Any] = {
    "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "layer_types": ["sliding_attention"], "sliding_window": 512,
}  # fmt: skip
GPT_OSS_20B: dict[str, Any] = {
    "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 4, "layer_types": ["sliding_attention"],
}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen3-30b-a3b": lambda: hf.Qwen3MoeModel(hf.Qwen3MoeConfig(**QWEN3_30B_A3B, **COMMON)),
    "llama-3-8b": lambda: hf.LlamaModel(hf.LlamaConfig(**LLAMA_3_8B, **COMMON)),
    "gemma-3-4b": lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**GEMMA_3_4B, **COMMON)),
    "gpt-oss-20b": lambda: hf.GptOssModel(hf.GptOssConfig(**GPT_OSS_20B, **COMMON)),
}
TOKENS = ((1, 1), (16, 1), (64, 1), (1, 17), (1, 512), (1, 4096))
"""Sequences, and tokens of each."""

QUICK = ("qwen3-30b-a3b", ((64, 1),))
CASES = [QUICK, *((name, TOKENS) for name in MODELS)]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Hashable, KernelCall]]:
    """The kernels that operators would launch, once for each compiled kernel; operands may be on the "meta" device."""
    found: dict[Hashable, KernelCall] = {}
    for name, operator in OPERATORS.items():
        monkeypatch.setattr(kernels, name, operator.on_gpu)
    monkeypatch.setattr(CudaTarget, "check", lambda *_: None)
    monkeypatch.setattr(Limits, "multiprocessors_of", lambda limits, _: limits.multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(state, "planner", found.setdefault)
    yield found
    gpu_at.cache_clear()


def on_meta(value: Any) -> Any:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def run(compiled: qcompiler.CompiledModel, batch: int, tokens: int) -> None:
    """The host module on tensors without data."""
    program, weights = compiled.program, compiled.weights
    inputs, _ = program.signature.bind((), {"input_ids": torch.zeros(batch, tokens, dtype=torch.int64)})
    given = {name: on_meta(value) for name, value in weights.named_buffers()}
    program.run(SimpleNamespace(**given, device=torch.device("meta")), *map(on_meta, inputs))


@pytest.mark.parametrize(
    ("name", "sizes"), [pytest.param(*case, marks=() if case == QUICK else pytest.mark.matrix) for case in CASES]
)
@torch.no_grad()
def test_kernels_of_a_layer(name: str, sizes: tuple[tuple[int, int], ...], planned: dict[Hashable, KernelCall]) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().bfloat16().eval()
    ids = torch.zeros(2, 5, dtype=torch.int64)
    compiled = qcompiler.compile(
        model, scheme="fp8_tile", target="sm_90a", example_kwargs={"input_ids": ids}, progress=False
    )
    for batch, tokens in sizes:
        run(compiled, batch, tokens)
    assert len(planned) >= 10
    for call in planned.values():
        HOPPER.compile(call)
