"""Small mixtures of experts of transformers, with random weights; arguments replace sizes of a configuration."""

from collections.abc import Callable
from typing import Any

import transformers as hf
from torch import nn

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "head_dim": 32,
}  # fmt: skip
MODELS: dict[str, Callable[..., nn.Module]] = {
    "mixtral": lambda **own: hf.MixtralModel(hf.MixtralConfig(**{**SIZES, **own}, num_local_experts=4)),
    "qwen3": lambda **own: hf.Qwen3MoeModel(
        hf.Qwen3MoeConfig(
            **{**SIZES, **own}, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=128, norm_topk_prob=True
        )
    ),
    "gpt-oss": lambda **own: hf.GptOssModel(
        hf.GptOssConfig(
            **{**SIZES, "intermediate_size": 128, **own}, num_local_experts=8, num_experts_per_tok=4, sliding_window=8,
            layer_types=["sliding_attention"],
        )
    ),
    "deepseek": lambda **own: hf.DeepseekV3Model(
        hf.DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 4, "head_dim": 16, **own}, n_routed_experts=8, num_experts_per_tok=2,
            n_group=2, topk_group=1, moe_intermediate_size=128, first_k_dense_replace=0, n_shared_experts=1,
            q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32,
        )
    ),
}  # fmt: skip
