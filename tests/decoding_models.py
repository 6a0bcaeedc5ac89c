"""Tiny random causal language models, and a reference `Step` that recomputes every sequence with transformers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)


class RecomputingStep:
    """A `Step` over a transformers model without any cache: the tokens of each slot are kept and computed again."""

    def __init__(self, model: Any, *, slots: int = 3, capacity: int = 32) -> None:
        self.model = model
        self.slots, self.capacity, self.chunk, self.device = slots, capacity, capacity, torch.device("cpu")
        self.vocabulary = int(self.model.config.vocab_size)
        self.calls: list[tuple[int, int]] = []  # the sizes of input_ids
        self.reset()

    def keeps(self, start: int, written: int) -> bool:
        return True

    def reset(self) -> None:
        self.tokens = torch.zeros(self.slots, self.capacity, dtype=torch.int64)

    def __call__(
        self, input_ids: Tensor, slots: Tensor, lengths: Tensor, last: Tensor, start: int | None = None
    ) -> Tensor:
        rows = []
        self.calls.append((input_ids.shape[0], input_ids.shape[1]))
        for ids, slot, length, at in zip(input_ids, slots.tolist(), lengths.tolist(), last.tolist(), strict=True):
            assert 0 <= at < len(ids) and length + len(ids) <= self.capacity, "writes outside the cache"
            self.tokens[slot, length : length + len(ids)] = ids
            rows.append(self.model(self.tokens[None, slot, : length + at + 1]).logits[0, -1])
        return torch.stack(rows)


COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def tiny(config: Any, seed: int = 0, *, spread: bool = True) -> Any:
    """A random model in FP32; with `spread`, its logits are spread out, so greedy continuations are not constant."""
    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM  # without types
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if spread and parameter.dim() == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
                parameter.normal_(std=0.3)
    return model


def greedy_tokens(model: Any, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
    """The tokens that transformers' own `generate` adds to each prompt, without stopping early."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def grouped(kind: Any, **own: Any) -> Callable[..., Any]:
    """Makes models with two key heads for four query heads."""

    def make(**changes: Any) -> Any:
        return tiny(kind(**{**COMMON, "intermediate_size": 64, "num_key_value_heads": 2, **own, **changes}))

    return make


def gpt2(**changes: Any) -> Any:
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
             "max_position_embeddings": "n_positions"}  # fmt: skip
    return tiny(GPT2Config(**{names.get(key, key): value for key, value in {**COMMON, **changes}.items()}))


def bert() -> Any:
    """A model that is not causal."""
    kind: Any = BertForMaskedLM  # without types
    return kind(BertConfig(**{**COMMON, "intermediate_size": 64})).eval()


llama, qwen3 = grouped(LlamaConfig), grouped(Qwen3Config, head_dim=16)

MODELS: dict[str, Callable[..., Any]] = {
    "llama": llama,
    "qwen3": qwen3,
    "gpt2": gpt2,
    "mistral": grouped(MistralConfig, sliding_window=4),
    "gemma3": grouped(
        Gemma3TextConfig, head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": grouped(Phi3Config),
    "opt": lambda: tiny(OPTConfig(**COMMON, ffn_dim=64, word_embed_proj_dim=32)),
    "neox": lambda: tiny(GPTNeoXConfig(**COMMON, intermediate_size=64)),
    "falcon": lambda: tiny(FalconConfig(**COMMON)),
    "cohere": grouped(CohereConfig),
    "olmo2": grouped(Olmo2Config),
    "mixtral": grouped(MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "bloom": lambda: tiny(BloomConfig(**COMMON)),
    "mpt": lambda: tiny(MptConfig(**COMMON, max_seq_len=128)),
    "falcon-alibi": lambda: tiny(FalconConfig(**COMMON, alibi=True)),
    "llama4": grouped(
        Llama4TextConfig,
        head_dim=8,
        intermediate_size_mlp=48,
        attention_chunk_size=6,
        no_rope_layers=[1, 0],
        num_local_experts=4,
        moe_layers=[1],
        floor_scale=4,
    ),
    "qwen3-moe": grouped(Qwen3MoeConfig, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
}

QUICK = ("llama", "gpt2", "mistral")
"""Models for quick tests: rotary and learned positions, grouped queries, and a window."""


def byte_tokenizer() -> Any:
    """Each byte is a token, so that a character is up to four of them; token 0 is special."""
    letters = sorted(ByteLevel.alphabet())
    inner = Tokenizer(BPE({"<end>": 0, **{letter: number for number, letter in enumerate(letters, 1)}}, []))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = ByteDecoder()
    make: Any = PreTrainedTokenizerFast  # without types
    return make(tokenizer_object=inner, eos_token="<end>")
