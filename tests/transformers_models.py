"""Tiny random transformers models in folders, and comparisons of loaded models."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from qcompiler.transformers import QCompilerConfig

AUTO: Any = AutoModelForCausalLM  # without types
IDS = torch.arange(18).reshape(2, 9)

MIXTURE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100, "tie_word_embeddings": False,
}  # fmt: skip


def llama_config(**changes: Any) -> LlamaConfig:
    """Sizes that 128 does not divide, and biases."""
    sizes: dict[str, Any] = {
        "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 1, "num_attention_heads": 6,
        "num_key_value_heads": 3, "vocab_size": 100, "tie_word_embeddings": False, "attention_bias": True,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


def mixtral_config() -> MixtralConfig:
    """Experts whose names in files differ from those in the model."""
    return MixtralConfig(**MIXTURE, num_local_experts=4)


def qwen3_moe_config(size: int = 128) -> Qwen3MoeConfig:
    """Experts of `size` rows."""
    return Qwen3MoeConfig(**MIXTURE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=size)


def saved(folder: Path, config: Any) -> Path:
    """Writes a random model in BF16; returns the folder."""
    torch.manual_seed(0)
    model = AUTO.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


def load(folder: Path, *arguments: Any, **options: Any) -> Any:
    """Loads a folder; quantizes it if there are arguments of a `QCompilerConfig`."""
    config = {"quantization_config": QCompilerConfig(*arguments, **options)} if arguments or options else {}
    return AUTO.from_pretrained(folder, **config)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """Logits for `IDS`."""
    return torch.as_tensor(model(IDS).logits)


def equal(one: Any, other: Any) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    first, second = (
        {name: tensor.contiguous().view(torch.uint8) for name, tensor in model.state_dict().items()}
        for model in (one, other)
    )
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
