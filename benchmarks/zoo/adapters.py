"""Models with parameter-efficient adapters of peft: next to the weights, or merged into them."""

from importlib import import_module
from typing import Any

from torch import nn

from benchmarks.zoo.language import causal
from benchmarks.zoo.subjects import TINY, Subject, add, masked, pretrained, tokens

FAMILY = "adapters"


def disturbed(model: nn.Module) -> nn.Module:
    """Replaces the zeros that adapters start with by random values, as if trained."""
    for name, parameter in model.named_parameters():
        if "lora_" in name or "ia3_" in name or "vera_" in name:
            nn.init.normal_(parameter, mean=float("ia3_" in name), std=0.1)
    return model


def adapted(config: str, base: nn.Module, merge: bool = False, **options: Any) -> nn.Module:
    """A model inside an adapter of peft."""
    peft = import_module("peft")
    model = disturbed(peft.get_peft_model(base, getattr(peft, config)(**options)))
    merged: nn.Module = model.merge_and_unload() if merge else model
    return merged


ATTENTION = ["q_proj", "v_proj", "down_proj"]


def llama(config: str, merge: bool = False, **options: Any) -> Subject:
    """A Llama with an adapter on some projections."""
    return adapted(config, causal("Llama")[0], merge, task_type="CAUSAL_LM", **options), masked


add(FAMILY, "lora-llama", lambda: llama("LoraConfig", r=8, target_modules=ATTENTION))
add(FAMILY, "lora-llama-merged", lambda: llama("LoraConfig", True, r=8, target_modules=ATTENTION))
add(FAMILY, "dora-llama", lambda: llama("LoraConfig", r=8, use_dora=True, target_modules=ATTENTION))
add(FAMILY, "ia3-llama", lambda: llama("IA3Config", target_modules=ATTENTION, feedforward_modules=["down_proj"]))


def prefix_tuned() -> Subject:
    """Prompt tuning: learned embeddings before the token embeddings."""
    base = causal("Llama")[0]
    return adapted("PromptTuningConfig", base, task_type="CAUSAL_LM", num_virtual_tokens=4), masked


add(FAMILY, "prompt-tuning", prefix_tuned)


def lora_bert() -> Subject:
    """A classifier whose encoder has adapters."""
    base = pretrained("BertForSequenceClassification", "BertConfig", **TINY)
    return adapted("LoraConfig", base, r=4, target_modules=["query", "value"], task_type="SEQ_CLS"), masked


add(FAMILY, "lora-bert", lora_bert)


def lora_gpt2() -> Subject:
    """Adapters on Conv1D, whose weights are transposed."""
    base = causal("GPT2", model="GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=4, n_positions=64)[0]
    options = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    return adapted("LoraConfig", base, **options), tokens


add(FAMILY, "lora-gpt2", lora_gpt2)
