"""Encoder-decoders for text."""

from typing import Any

import torch

from benchmarks.zoo.subjects import TINY, Call, Subject, add, masked, pretrained, tokens

FAMILY = "encoder_decoders"

SIZES: dict[str, Any] = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
    "vocab_size": TINY["vocab_size"], "init_std": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "forced_eos_token_id": 2, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4,
}  # fmt: skip

PAIRS: dict[str, dict[str, Any]] = {
    "t5": {"model": "T5ForConditionalGeneration"},
    "t5-gated": {"model": "T5ForConditionalGeneration", "feed_forward_proj": "gated-gelu",
                 "tie_word_embeddings": False},
    "umt5": {"model": "UMT5ForConditionalGeneration"},
    "bart": {"model": "BartForConditionalGeneration"},
    "mbart": {"model": "MBartForConditionalGeneration"},
    "pegasus": {"model": "PegasusForConditionalGeneration"},
    "marian": {"model": "MarianMTModel", "config": "MarianConfig"},
    "blenderbot": {"model": "BlenderbotForConditionalGeneration"},
    "m2m100": {"model": "M2M100ForConditionalGeneration"},
    "led": {"model": "LEDForConditionalGeneration", "attention_window": 4, "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64},
}  # fmt: skip


def translation(rows: int, length: int) -> Call:
    """A padded source and a shorter target."""
    return {**masked(rows, length), "decoder_input_ids": tokens(rows, length // 2)["input_ids"]}


def pair(model: str, config: str = "", **changes: Any) -> Subject:
    """An encoder-decoder of transformers; `XForConditionalGeneration` has an `XConfig`."""
    config = config or model.removesuffix("ForConditionalGeneration") + "Config"
    return pretrained(model, config, **{**SIZES, **changes}), translation


for _name, _options in PAIRS.items():
    add(FAMILY, _name, lambda options=_options: pair(**options))  # type: ignore[misc]


def fsmt() -> Subject:
    """FSMT; without a decoder mask it derives one from input values, and a cache would cut off its inputs."""
    sizes = {"src_vocab_size": TINY["vocab_size"], "tgt_vocab_size": TINY["vocab_size"], "langs": ["en", "de"]}
    model, calls = pair("FSMTForConditionalGeneration", **sizes)
    return model, lambda rows, length: {
        **calls(rows, length),
        "decoder_attention_mask": torch.ones(rows, length // 2, dtype=torch.long),
        "use_cache": False,
    }


add(FAMILY, "fsmt", fsmt)


def t5gemma() -> Subject:
    """Two Gemmas joined by cross-attention."""
    side = {**TINY, "sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention",
            "full_attention"]}  # fmt: skip
    return pretrained(
        "T5GemmaForConditionalGeneration", "T5GemmaConfig", encoder=side, decoder=side, vocab_size=TINY["vocab_size"]
    ), translation


add(FAMILY, "t5gemma", t5gemma)
