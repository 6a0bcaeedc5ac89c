"""Real models with the fusing passes: what is fused, why the rest is not, and that no bit of an output changes."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qcompiler
from qcompiler.compiler.model import CompiledModel
from qcompiler.dialects.kernel import is_fused
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph

DECODER: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 96, "max_position_embeddings": 64, "head_dim": 32,
}  # fmt: skip
MOE: dict[str, Any] = {
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER))


def gemma2() -> nn.Module:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**DECODER))


def qwen2() -> nn.Module:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER))


def qwen2_moe() -> nn.Module:
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**DECODER, **MOE))


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        n_embd=128, n_layer=1, n_head=4, n_positions=64, vocab_size=96, bos_token_id=1, eos_token_id=2
    )
    return hf.GPT2LMHeadModel(config)


def opt() -> nn.Module:
    return hf.OPTForCausalLM(hf.OPTConfig(**DECODER, ffn_dim=256, word_embed_proj_dim=128))


def bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**DECODER))


def t5() -> nn.Module:
    return hf.T5EncoderModel(hf.T5Config(d_model=128, d_ff=256, d_kv=32, num_layers=1, num_heads=4, vocab_size=96))


def falcon() -> nn.Module:
    sizes = {key: DECODER[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    return hf.FalconForCausalLM(hf.FalconConfig(**sizes))


MERGED = "bf16(bf16(silu(bf16(y0))) * bf16(y1))"
FIRST = "bf16(x1 * bf16(x0 * rsqrt(mean(x0 * x0) + 1e-06)))"
SECOND = "h0 = bf16(x0 + x1); bf16(x2 * bf16(h0 * rsqrt(mean(h0 * h0) + 1e-06)))"
RESIDUAL = "bf16(x0 + bf16(y0))"
MODELS: dict[Callable[[], nn.Module], Any] = {
    # the fused expressions; the number of quantizations, and how many of them stay separate
    llama: ([FIRST, SECOND, MERGED, RESIDUAL], 4, 1),
    gemma2: (
        [
            "bf16(x0 * rsqrt(mean(x0 * x0) + 1e-06) * x1)",
            "h0 = bf16(x0 + bf16(x1 * rsqrt(mean(x1 * x1) + 1e-06) * x2)); "
            "bf16(h0 * rsqrt(mean(h0 * h0) + 1e-06) * x3)",
            MERGED.replace("silu", "gelu_tanh"),
        ],
        4, 1,
    ),
    qwen2: ([FIRST, SECOND, MERGED, RESIDUAL], 4, 1),
    qwen2_moe: (
        [
            FIRST, SECOND.replace("; bf16(x2", "; h1 = bf16(x2") + "; h1", MERGED, "bf16(bf16(silu(x0)) * x1)",
        ],
        6, 1,  # the shared expert and the chosen experts read the same codes
    ),
    gpt2: (
        [
            "bf16(standardize(x0, 1e-05) * x1 + x2)",
            "h0 = bf16(x0 + x1); bf16(standardize(h0, 1e-05) * x2 + x3)",
            "p0 = bf16(y0); bf16(bf16(p0 * 0.5) * bf16(bf16(tanh(bf16(bf16(p0 + bf16(bf16(bf16(p0 * p0) * p0) "
            "* 0.044715)) * 0.7978845608028654))) + 1.0))",
        ],
        4, 1,
    ),
    opt: (
        [
            "h0 = bf16(x0 + x1); bf16(standardize(h0, 1e-05) * x2 + x3)",
            "h0 = bf16(x0 + x1); bf16(standardize(h0, 1e-05) * x2 + x3)",
            "bf16(relu(bf16(y0)))", RESIDUAL,
        ],
        4, 1,
    ),
    bert: (
        [
            "h0 = bf16(standardize(x0, 1e-12) * x1 + x2); h0",
            "h0 = bf16(standardize(bf16(x0 + x1), 1e-12) * x2 + x3); h0",
            "bf16(gelu(bf16(y0)))", "bf16(bf16(y0) + x0)", "bf16(tanh(bf16(y0)))",
        ],
        5, 2,
    ),
    t5: ([FIRST, SECOND, "bf16(relu(bf16(y0)))", RESIDUAL], 4, 1),
    falcon: (
        ["bf16(standardize(x0, 1e-05) * x1 + x2)", "bf16(gelu(bf16(y0)))", "bf16(x0 + bf16(x1 + bf16(y0)))"], 3, 1,
    ),
}  # fmt: skip


def compiled(build: Callable[[], nn.Module], dtype: torch.dtype) -> CompiledModel:
    torch.manual_seed(0)
    model = build().eval().to(dtype)
    return qcompiler.compile(model, scheme="fp8_tile", example_kwargs={"input_ids": torch.randint(3, 90, (3, 11))})


def unfused(fast: CompiledModel) -> Graph:
    """The input graph of the fusing passes, with weights."""
    graph = fast.stages["to-kernels"].clone()
    graph.weights = fast.graph.weights
    return graph


def same_bits(fast: CompiledModel) -> None:
    """Compares a compiled model with its graph before fusing, at a shape other than the example's."""
    ids = torch.randint(3, 90, (2, 7))
    with torch.no_grad():
        outputs = fast(input_ids=ids)
        values = outputs.values() if isinstance(outputs, dict) else outputs
    want = interpret(unfused(fast), fast.flatten((), {"input_ids": ids}))
    got = [value for value in values if isinstance(value, Tensor)]
    assert len(got) == len(want) and all(map(torch.equal, got, want))


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_in_bf16(build: Callable[[], nn.Module]) -> None:
    expressions, quantizations, left = MODELS[build]
    fast = compiled(build, torch.bfloat16)
    same_bits(fast)
    found = [str(op.attrs["expression"]) for op in fast.graph.ops() if is_fused(op)]
    assert Counter(found) == Counter(expressions)
    assert len(unfused(fast).ops("kernel.quantize")) == quantizations
    assert len(fast.graph.ops("kernel.quantize")) == left
    skipped = {"lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"}
    assert {row.module for row in fast.report.skipped} <= skipped


@pytest.mark.parametrize("build", [gemma2, gpt2, bert], ids=lambda build: build.__name__)
def test_in_f32(build: Callable[[], nn.Module]) -> None:
    fast = compiled(build, torch.float32)
    same_bits(fast)
    assert len(fast.graph.ops("kernel.quantize")) == MODELS[build][2]
    assert not any("bf16" in str(op.attrs["expression"]) for op in fast.graph.ops() if is_fused(op))


def test_every_layer_has_a_row_in_the_error_attribution() -> None:
    fast = compiled(llama, torch.float32)
    torch.manual_seed(0)
    model = llama().eval()
    report = qcompiler.attribute_error(fast, {"input_ids": torch.randint(3, 90, (2, 7))}, model)
    layers = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert {row.module for row in report.rows} == {f"model.layers.0.{layer}" for layer in layers}
    assert all(25 < row.own < 60 and row.inherited > 10 for row in report.rows)
