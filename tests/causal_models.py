"""Tiny random causal language models of many architectures, captured with two symbolic sizes."""

from functools import cache
from typing import Any

import torch
from decoding_models import tiny
from torch import Tensor
from transformers import AutoConfig

from qcompiler.capture import capture
from qcompiler.ir import Graph

BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
BOTH = {"num_hidden_layers": 2, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "head_dim": 4,
          "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
          "first_k_dense_replace": 0}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "mistral": {"sliding_window": 4},
    "gemma2": BOTH,
    "gemma3_text": BOTH,
    "phi3": {"sliding_window": 5},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "falcon": {"alibi": False, "multi_query": True, "new_decoder_architecture": False, "head_dim": None},
    "cohere": {},
    "olmo2": {},
    "deepseek_v2": {**EXPERTS, **LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**EXPERTS, **LATENT},
    "gpt_oss": {**EXPERTS, **BOTH},
    "mixtral": EXPERTS,
    "bloom": {},
    "mpt": {"max_seq_len": 64},
    "falcon_alibi": {"model_type": "falcon", "alibi": True, "new_decoder_architecture": False, "head_dim": None},
    "llama4_text": {
        **EXPERTS,
        "num_hidden_layers": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 4,
        "no_rope_layers": [1, 0],
        "moe_layers": [1],
        "floor_scale": 3,
    },
}
"""Type of model -> what its configuration changes."""

NOT_CAUSAL: dict[str, dict[str, Any]] = {"lfm2": {"layer_types": ["conv"]}}
"""Models that mix positions."""

WINDOWS: dict[str, list[int | None]] = {
    "mistral": [4], "gemma2": [4, None], "gemma3_text": [4, None], "phi3": [5], "gpt_oss": [4, None],
}  # fmt: skip
"""Type of model -> the window of each layer; one layer without a window in all others."""

NO_POSITIONS = ("bloom", "mpt")
"""Types of model without an input of position numbers."""

ALIBI = ("bloom", "mpt", "falcon_alibi")
"""Types of model with slopes."""

CHUNKS: dict[str, list[int | None]] = {"llama4_text": [4, None]}
"""Type of model -> the chunk of each layer."""


@cache
def captured(kind: str, *, positions: bool = False, padded: bool = False, spread: bool = True, **changes: Any) -> Graph:
    """The graph of a model of two rows.

    Args:
        kind: A type of model, of `MODELS` or `NOT_CAUSAL`.
        positions: Whether position numbers are an input.
        padded: Whether a mask of padding is an input.
        spread: See `tiny`.
        changes: Further entries of the configuration.
    """
    settings = {**BASE, **(MODELS | NOT_CAUSAL)[kind], **changes}
    settings = {name: value for name, value in settings.items() if value is not None}
    model = tiny(AutoConfig.for_model(**{"model_type": kind, **settings}), spread=spread)
    keywords: dict[str, Any] = {"use_cache": False}
    if positions:
        keywords["position_ids"] = torch.arange(9).repeat(2, 1)
    if padded:
        keywords["attention_mask"] = torch.ones(2, 9, dtype=torch.int64)
    return capture(model, (torch.randint(0, 64, (2, 9)),), keywords, check=False).graph


def inputs(graph: Graph, tokens: Tensor) -> list[Tensor]:
    """The inputs of a captured graph."""
    return [tokens, torch.arange(tokens.shape[1]).expand_as(tokens)][: len(graph.inputs)]
