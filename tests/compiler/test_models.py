"""Whole models compiled for the CPU: equal to the quantized graph, and close to the float model.

Each is captured once, at sizes that 128 does not divide, and run at two shapes. Most have one layer, the others two.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qcompiler
from qcompiler.report.rows import Row
from qcompiler.runtime.weights import named_tensors
from qcompiler.testing import difference

VOCABULARY = 300
DECODER: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 136,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}

PROJECTION = "it is the vocabulary projection"
ROUTER = "it is a router"

Call = dict[str, Tensor]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(200, 256), nn.GELU(), nn.Linear(256, 72, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class Attention(nn.Module):
    """Weights as bare parameters, multiplied by `@`."""

    def __init__(self, width: int = 160, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv = nn.Parameter(torch.randn(width, 3 * width) / width**0.5)
        self.out = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = (self.norm(x) @ self.qkv).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = torch.softmax(q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5, -1) @ v
        joined: Tensor = y.transpose(1, 2).reshape(rows, length, width)
        return x + joined @ self.out


def decoder(model: Callable[[Any], nn.Module], config: Callable[..., Any], **changes: Any) -> Callable[[], nn.Module]:
    return lambda: model(config(**{**DECODER, **changes}))


def tokens(rows: int, length: int) -> Call:
    return {"input_ids": torch.randint(3, VOCABULARY - 3, (rows, length))}


def masked(rows: int, length: int) -> Call:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return {**tokens(rows, length), "attention_mask": mask}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Call], dict[str, str]]] = {
    "mlp": (Mlp, lambda rows, length: {"x": torch.randn(rows, length, 200)}, {}),
    "attention": (Attention, lambda rows, length: {"x": torch.randn(rows, length, 160)}, {}),
    "llama": (decoder(hf.LlamaForCausalLM, hf.LlamaConfig, num_hidden_layers=2), tokens, {"lm_head": PROJECTION}),
    "qwen3": (
        decoder(hf.Qwen3ForCausalLM, hf.Qwen3Config, head_dim=32, tie_word_embeddings=True),
        masked,
        {"lm_head": PROJECTION},
    ),
    "gemma3": (
        decoder(
            hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, head_dim=32, sliding_window=8, num_hidden_layers=2,
            layer_types=["sliding_attention", "full_attention"],
        ),
        tokens,
        {"lm_head": PROJECTION},
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                n_embd=128, n_layer=1, n_head=4, n_positions=64, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2
            )
        ),
        tokens,
        {"lm_head": PROJECTION},
    ),
    "opt": (
        decoder(hf.OPTForCausalLM, hf.OPTConfig, hidden_size=96, ffn_dim=200, word_embed_proj_dim=96),
        masked,
        {"lm_head": PROJECTION},
    ),
    "bert": (
        lambda: hf.BertModel(hf.BertConfig(**ENCODER, vocab_size=VOCABULARY, max_position_embeddings=64)),
        masked,
        {},
    ),
    "vit": (
        lambda: hf.ViTModel(hf.ViTConfig(**ENCODER, image_size=32, patch_size=8)),
        lambda rows, length: {"pixel_values": torch.randn(rows, 3, 32, 32)},
        {},
    ),
    "t5": (
        lambda: hf.T5EncoderModel(
            hf.T5Config(d_model=64, d_ff=136, d_kv=16, num_layers=1, num_heads=4, vocab_size=VOCABULARY)
        ),
        tokens,
        {},
    ),
    "mixtral": (
        decoder(hf.MixtralForCausalLM, hf.MixtralConfig, num_local_experts=4, hidden_size=128, intermediate_size=160),
        tokens,
        {"lm_head": PROJECTION, "gate": ROUTER},
    ),
}  # fmt: skip


def first(output: Any) -> Tensor:
    """The logits or the hidden states."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


def decibels(got: Tensor, want: Tensor) -> float:
    """The signal-to-quantization-noise ratio."""
    return float(20 * torch.log10(want.norm() / (got - want).norm()))


def why(row: Row, skipped: dict[str, str]) -> str | None:
    return next((reason for module, reason in skipped.items() if row.module.split(".")[-1] == module), None)


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    build, call, skipped = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    example, other = call(3, 11), call(2, 7)
    fast = qcompiler.compile(model, scheme="fp8_tile", example_kwargs=example)

    with torch.no_grad():
        for inputs in (example, other):
            got, want = fast(**inputs), model(**inputs)
            assert type(got) is type(want)
            simulated = qcompiler.interpret(fast.stages["fp8-tile"], list(inputs.values()), named_tensors(model))
            exact = next(out for out in simulated if out.shape == first(got).shape)
            assert difference(first(got), exact) < 1e-9, "kernels and QDQ differ by the order of FP32 sums at most"
            assert decibels(first(got), first(want)) > 18

    # Some versions of transformers multiply positions by frequencies with a matmul.
    matmuls = [row for row in fast.report.rows if row.is_matmul and not row.module.endswith("rotary_emb")]
    assert {row.module for row in matmuls if not row.quantized} == {row.module for row in matmuls if why(row, skipped)}
    for row in matmuls:
        reason = why(row, skipped)
        assert row.quantized if reason is None else row.reason.startswith(reason), row
    assert {word for row in matmuls for word in skipped if row.module.endswith(word)} == set(skipped)
    assert math.isclose(fast.report.bytes, sum(op_bytes(fast.stages["captured"])))


def op_bytes(graph: qcompiler.Graph) -> list[int]:
    kinds = [op.result.tensor for op in graph.ops("core.param")]
    return [math.prod(size for size in kind.shape if isinstance(size, int)) * kind.dtype.bits // 8 for kind in kinds]
