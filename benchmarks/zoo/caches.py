"""Decode steps: one or a few tokens, with the keys and values of earlier tokens."""

import torch

from benchmarks.zoo.encoder_decoders import pair
from benchmarks.zoo.language import causal
from benchmarks.zoo.subjects import Call, Subject, subject, tokens

FAMILY = "caches"


def after_prompt(model: torch.nn.Module, steps: int = 1, **options: object) -> Subject:
    """Steps of a model after a prompt, with the cache from that prompt."""

    def call(rows: int, length: int) -> Call:
        with torch.no_grad():
            cache = model(**tokens(rows, length), use_cache=True, **options).past_key_values
        return {**tokens(rows, steps), "past_key_values": cache}

    return model.eval(), call


@subject(FAMILY, "llama-dynamic-cache")
def llama_dynamic() -> Subject:
    """A cache that grows with each step."""
    return after_prompt(causal("Llama")[0])


@subject(FAMILY, "qwen3-dynamic-cache-prefill")
def qwen_prefill() -> Subject:
    """Several tokens after a prompt, as in chunked prefill."""
    return after_prompt(causal("Qwen3")[0], steps=3)


@subject(FAMILY, "gpt2-dynamic-cache")
def gpt2_dynamic() -> Subject:
    """Learned positions, counted from the cache's length."""
    return after_prompt(causal("GPT2", model="GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=4, n_positions=64)[0])


@subject(FAMILY, "gemma3-sliding-cache")
def gemma_sliding() -> Subject:
    """A sliding-window layer and a full-attention layer."""
    layers = ["sliding_attention", "full_attention"]
    return after_prompt(causal("Gemma3", config="Gemma3TextConfig", sliding_window=8, layer_types=layers)[0])


@subject(FAMILY, "llama-static-cache")
def llama_static() -> Subject:
    """A cache of a fixed length, written in place at the positions that the call names."""
    from transformers import StaticCache

    model = causal("Llama")[0].eval()

    def call(rows: int, _: int) -> Call:
        cache = StaticCache(config=model.config, max_cache_len=24)
        with torch.no_grad():
            model(**tokens(2, 12), past_key_values=cache)
        return {**tokens(2, 1), "past_key_values": cache, "position_ids": torch.tensor([[12]])}

    return model, call


@subject(FAMILY, "mixtral-dynamic-cache")
def mixtral_dynamic() -> Subject:
    """A decode step of a mixture."""
    return after_prompt(causal("Mixtral", num_local_experts=4, num_experts_per_tok=2)[0])


@subject(FAMILY, "llama-returns-cache")
def llama_returns() -> Subject:
    """A prefill that returns the cache."""
    return causal("Llama")[0], lambda rows, length: {**tokens(rows, length), "use_cache": True}


@subject(FAMILY, "bart-decode")
def bart_decode() -> Subject:
    """A decoder step over the hidden states of an earlier encoder run."""
    model = pair("BartForConditionalGeneration")[0].eval()

    def call(rows: int, length: int) -> Call:
        from transformers.modeling_outputs import BaseModelOutput

        states = BaseModelOutput(last_hidden_state=torch.randn(rows, length, 64))
        return {"encoder_outputs": states, "decoder_input_ids": tokens(rows, 3)["input_ids"]}

    return model, call
