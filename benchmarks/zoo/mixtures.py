"""Decoders with mixtures of experts.

Routers stay in float, but their inputs are quantized: a token near a tie may go to another expert than in float.
"""

from typing import Any

from benchmarks.zoo.encoder_decoders import translation
from benchmarks.zoo.language import causal
from benchmarks.zoo.subjects import TINY, Subject, add, masked, pretrained, subject, tokens

FAMILY = "mixtures"

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
          "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0,
          "num_key_value_heads": 4}  # fmt: skip

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"name": "Mixtral", "inputs": masked},
    "qwen2-moe": {"name": "Qwen2Moe", "shared_expert_intermediate_size": 96},
    "qwen3-moe": {"name": "Qwen3Moe"},
    "qwen3-next": {"name": "Qwen3Next", "layer_types": ["linear_attention", "full_attention"],
                   "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 4, "shared_expert_intermediate_size": 64},
    "deepseek-v2": {"name": "DeepseekV2", **LATENT, "topk_method": "greedy"},
    "deepseek-v3": {"name": "DeepseekV3", **LATENT},
    "gpt-oss": {"name": "GptOss", "sliding_window": 6},
    "granite-moe": {"name": "GraniteMoe"},
    "olmoe": {"name": "Olmoe"},
    "phimoe": {"name": "Phimoe"},
    "jetmoe": {"name": "JetMoe", "kv_channels": 16, "num_key_value_heads": 2},
    "ernie4.5-moe": {"name": "Ernie4_5_Moe", "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
    "glm4-moe": {"name": "Glm4Moe", **LATENT},
    "dots1": {"name": "Dots1", **LATENT},
    "hunyuan-moe": {"name": "HunYuanMoEV1", "moe_topk": 2},
    "minimax": {"name": "MiniMax", "layer_types": ["full_attention", "linear_attention"], "block_size": 8},
    "llama4": {"name": "Llama4", "config": "Llama4TextConfig", "intermediate_size_mlp": 96, "attn_scale": 0.1},
}  # fmt: skip

for _name, _options in MIXTURES.items():
    add(FAMILY, _name, lambda options=_options: causal(**{**EXPERTS, **options}))  # type: ignore[misc]


@subject(FAMILY, "dbrx")
def dbrx() -> Subject:
    """All experts in one matrix, which the model splits."""
    options = {
        "d_model": 64, "n_heads": 4, "n_layers": 1, "max_seq_len": 64, "vocab_size": TINY["vocab_size"],
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        "pad_token_id": 0,
    }  # fmt: skip
    return pretrained("DbrxForCausalLM", "DbrxConfig", **options), tokens


@subject(FAMILY, "switch-transformers")
def switch() -> Subject:
    """Sparse layers in an encoder-decoder, each token to one expert."""
    options = {
        "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
        "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
        "vocab_size": TINY["vocab_size"], "expert_capacity": 16,
    }  # fmt: skip
    model = pretrained("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", **options)
    return model, translation
