"""State-space models, linear recurrences, hybrids with attention, and models of time series."""

from typing import Any

import torch

from benchmarks.zoo.language import causal
from benchmarks.zoo.subjects import TINY, Call, Subject, add, pretrained, subject

FAMILY = "state_space"

MAMBA: dict[str, Any] = {
    "state_size": 8, "conv_kernel": 4, "expand": 2, "time_step_rank": 4, "num_heads": 8, "head_dim": 16, "n_groups": 1,
    "chunk_size": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4, "mamba_n_heads": 8,
    "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8, "mamba_headdim": 16, "mamba_ngroups": 1,
    "n_mamba_heads": 2, "use_mamba_kernels": False, "num_experts": 2,
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"name": "Mamba"},
    "mamba2": {"name": "Mamba2"},
    "falcon-mamba": {"name": "FalconMamba"},
    "recurrent-gemma": {"name": "RecurrentGemma", "num_hidden_layers": 2, "lru_width": 64, "attention_window_size": 8,
                        "block_types": ["recurrent", "attention"]},
    "jamba": {"name": "Jamba", "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
              "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"name": "Bamba", "num_hidden_layers": 2, "attn_layer_indices": [1]},
    "falcon-h1": {"name": "FalconH1", "mamba_d_ssm": 128},
    "zamba2": {"name": "Zamba2", "num_hidden_layers": 2, "num_mem_blocks": 1, "n_mamba_heads": 8,
               "layers_block_type": ["mamba", "hybrid"],
               "attention_head_dim": 32, "attention_hidden_size": 128, "num_key_value_heads": 4},
    "xlstm": {"name": "xLSTM", "config": "xLSTMConfig", "embedding_dim": 64, "num_blocks": 1,
              "num_hidden_layers": 1, "num_heads": 4, "chunk_size": 8, "qk_dim_factor": 1.0},
    "lfm2": {"name": "Lfm2", "layer_types": ["conv", "full_attention"], "block_multiple_of": 32},
}  # fmt: skip

for _name, _options in MODELS.items():
    add(FAMILY, _name, lambda options=_options: causal(**{**MAMBA, **options}))  # type: ignore[misc]


@subject(FAMILY, "rwkv")
def rwkv() -> Subject:
    """RWKV; its first call, made here, rescales weights in place."""
    model, inputs = causal("Rwkv", num_hidden_layers=2, attention_hidden_size=64, context_length=64)
    model.eval()(**inputs(1, 4))
    return model, inputs


@subject(FAMILY, "patch-tst")
def patch_tst() -> Subject:
    """Forecasts from patches of a time series."""
    options = {"d_model": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "context_length": 32,
               "patch_length": 8, "patch_stride": 8, "prediction_length": 4, "num_input_channels": 2, "init_std": 0.1,
               "loss": "mse"}  # fmt: skip
    model = pretrained("PatchTSTForPrediction", "PatchTSTConfig", **options)
    return model, lambda rows, _: {"past_values": torch.randn(rows, 32, 2)}


@subject(FAMILY, "decision-transformer")
def decision_transformer() -> Subject:
    """Predicts actions from states, rewards and the target return."""
    options = {"state_dim": 6, "act_dim": 3, "hidden_size": 64, "n_layer": 2, "n_head": 4, "max_ep_len": 64,
               "n_positions": 128, "vocab_size": TINY["vocab_size"], "initializer_range": 0.1}  # fmt: skip

    def call(rows: int, length: int) -> Call:
        return {
            "states": torch.randn(rows, length, 6),
            "actions": torch.randn(rows, length, 3),
            "rewards": torch.randn(rows, length, 1),
            "returns_to_go": torch.randn(rows, length, 1),
            "timesteps": torch.arange(length).expand(rows, -1).clone(),
            "attention_mask": torch.ones(rows, length, dtype=torch.int64),
        }

    return pretrained("DecisionTransformerModel", "DecisionTransformerConfig", **options), call
