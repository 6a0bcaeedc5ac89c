"""Dense decoders."""

from typing import Any

import torch

from benchmarks.zoo.subjects import TINY, Inputs, Subject, add, masked, pretrained, tokens

FAMILY = "language"


def causal(name: str, inputs: Inputs = tokens, config: str = "", model: str = "", **changes: Any) -> Subject:
    """A causal language model of transformers: `NameForCausalLM` of a `NameConfig`.

    It has one layer, or one for each of `layer_types`.
    """
    options = {**TINY, "num_hidden_layers": len(changes.get("layer_types", [""])), **changes}
    return pretrained(model or f"{name}ForCausalLM", config or f"{name}Config", **options), inputs


GPT_SIZES = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_inner": 96, "n_positions": 64}

DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"name": "Llama", "inputs": masked},
    "qwen2": {"name": "Qwen2", "inputs": masked},
    "qwen3": {"name": "Qwen3", "tie_word_embeddings": True},
    "gemma": {"name": "Gemma"},
    "gemma2": {"name": "Gemma2", "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3": {"name": "Gemma3", "config": "Gemma3TextConfig", "sliding_window": 8,
               "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {"name": "Phi"},
    "phi3": {"name": "Phi3", "sliding_window": 8},
    "gpt2": {"name": "GPT2", "model": "GPT2LMHeadModel", "inputs": masked, **GPT_SIZES},
    "gpt-neo": {"name": "GPTNeo", "num_hidden_layers": None, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
                "window_size": 8,
                "attention_types": [[["global", "local"], 1]]},
    "gpt-neox": {"name": "GPTNeoX", "inputs": masked},
    "gptj": {"name": "GPTJ", **GPT_SIZES, "rotary_dim": 8},
    "codegen": {"name": "CodeGen", **GPT_SIZES, "rotary_dim": 8},
    "gpt-bigcode": {"name": "GPTBigCode", **GPT_SIZES},
    "opt": {"name": "OPT", "ffn_dim": 96, "word_embed_proj_dim": 64, "inputs": masked},
    "bloom": {"name": "Bloom", "n_layer": 1, "n_head": 4, "inputs": masked},
    "mpt": {"name": "Mpt", "d_model": 64, "n_heads": 4, "n_layers": 1, "max_seq_len": 64, "expansion_ratio": 2},
    "falcon": {"name": "Falcon", "inputs": masked, "head_dim": None, "new_decoder_architecture": True,
               "num_kv_heads": 2},
    "cohere": {"name": "Cohere"},
    "cohere2": {"name": "Cohere2", "sliding_window": 8},
    "olmo2": {"name": "Olmo2"},
    "olmo3": {"name": "Olmo3", "sliding_window": 8},
    "mistral": {"name": "Mistral", "sliding_window": 6, "inputs": masked},
    "granite": {"name": "Granite"},
    "stablelm": {"name": "StableLm", "use_qkv_bias": True},
    "starcoder2": {"name": "Starcoder2"},
    "glm4": {"name": "Glm4"},
    "nemotron": {"name": "Nemotron"},
    "smollm3": {"name": "SmolLM3"},
    "ernie4.5": {"name": "Ernie4_5"},
    "exaone4": {"name": "Exaone4", "sliding_window": 8},
    "xglm": {"name": "XGLM", "d_model": 64, "num_layers": 1, "attention_heads": 4, "ffn_dim": 96},
    "biogpt": {"name": "BioGpt"},
    "persimmon": {"name": "Persimmon"},
    "ctrl": {"name": "CTRL", "model": "CTRLLMHeadModel", "n_embd": 64, "n_layer": 1, "n_head": 4, "dff": 96,
             "n_positions": 64},
}  # fmt: skip

for _name, _options in DECODERS.items():
    add(FAMILY, _name, lambda options=_options: causal(**options))  # type: ignore[misc]

add(FAMILY, "llama-bf16", lambda: (causal("Llama")[0].to(torch.bfloat16), masked))
