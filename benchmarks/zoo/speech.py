"""Speech encoders, and encoder-decoders from audio."""

from typing import Any

import torch

from benchmarks.zoo.subjects import TINY, Call, Subject, add, pretrained, subject, tokens

FAMILY = "speech"

WAVES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32,
    "conv_dim": [32, 32], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer",
    "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def waves(rows: int, length: int) -> Call:
    """Raw audio."""
    return {"input_values": torch.randn(rows, 40 * length)}


def waveform(model: str, config: str = "", **changes: Any) -> Subject:
    """A model of raw audio."""
    return pretrained(model, config or model.removesuffix("Model") + "Config", **{**WAVES, **changes}), waves


add(FAMILY, "wav2vec2", lambda: waveform("Wav2Vec2Model"))
add(FAMILY, "wav2vec2-ctc", lambda: waveform("Wav2Vec2ForCTC", "Wav2Vec2Config", do_stable_layer_norm=True))
add(FAMILY, "hubert", lambda: waveform("HubertModel"))
add(FAMILY, "wavlm", lambda: waveform("WavLMModel"))
add(FAMILY, "unispeech-sat", lambda: waveform("UniSpeechSatModel"))
add(FAMILY, "data2vec-audio", lambda: waveform("Data2VecAudioModel", conv_pos_kernel_size=5))
add(FAMILY, "sew", lambda: waveform("SEWModel", squeeze_factor=2))


@subject(FAMILY, "wav2vec2-bert")
def wav2vec2_bert() -> Subject:
    """A conformer over mel features."""
    options = {**WAVES, "feature_projection_input_dim": 32, "conv_depthwise_kernel_size": 3,
               "left_max_position_embeddings": 4, "right_max_position_embeddings": 4}  # fmt: skip
    model = pretrained("Wav2Vec2BertModel", "Wav2Vec2BertConfig", **options)
    return model, lambda rows, length: {"input_features": torch.randn(rows, length, 32)}


@subject(FAMILY, "ast")
def ast() -> Subject:
    """The audio spectrogram transformer: patches of a fixed-size spectrogram."""
    options = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
               "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16,
               "initializer_range": 0.1}  # fmt: skip
    model = pretrained("ASTModel", "ASTConfig", **options)
    return model, lambda rows, _: {"input_values": torch.randn(rows, 32, 16)}


SPEECH_TO_TEXT: dict[str, Any] = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "init_std": 0.1,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": TINY["vocab_size"],
    "num_mel_bins": 16, "max_source_positions": 24, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "conv_channels": 32, "input_feat_per_channel": 16,
}  # fmt: skip


@subject(FAMILY, "whisper")
def whisper() -> Subject:
    """Mel features of a fixed length, and a transcript."""
    model = pretrained("WhisperForConditionalGeneration", "WhisperConfig", **SPEECH_TO_TEXT)
    return model, lambda rows, length: {
        "input_features": torch.randn(rows, 16, 48),
        "decoder_input_ids": tokens(rows, length // 2)["input_ids"],
    }


@subject(FAMILY, "speech-to-text")
def speech_to_text() -> Subject:
    """Features of any length, through two strided convolutions."""
    model = pretrained("Speech2TextForConditionalGeneration", "Speech2TextConfig", **SPEECH_TO_TEXT)
    return model, lambda rows, length: {
        "input_features": torch.randn(rows, 4 * (length // 2), 16),
        "decoder_input_ids": tokens(rows, length // 2)["input_ids"],
    }


@subject(FAMILY, "moonshine")
def moonshine() -> Subject:
    """Raw audio, and a transcript."""
    options = {
        **TINY,
        "encoder_num_hidden_layers": 1,
        "decoder_num_hidden_layers": 1,
        "num_key_value_heads": 4,
        "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4,
        "decoder_start_token_id": 1,
    }
    model = pretrained("MoonshineForConditionalGeneration", "MoonshineConfig", **options)
    return model, lambda rows, length: {
        "input_values": torch.randn(rows, 400 * length),
        "decoder_input_ids": tokens(rows, length // 2)["input_ids"],
    }
