"""Models of text and images: contrastive pairs, captioning models, and vision-language models."""

from typing import Any

import torch

from benchmarks.zoo.subjects import TINY, VOCABULARY, Call, Inputs, Subject, masked, pretrained, subject

FAMILY = "multimodal"

IMAGE = 100
"""The placeholder token for a piece of an image."""

TEXT: dict[str, Any] = {**TINY, "projection_dim": 48, "num_key_value_heads": 4}
VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "projection_dim": 48, "initializer_range": 0.1, "num_channels": 3,
}  # fmt: skip
DECODER: dict[str, Any] = {**TINY, "num_hidden_layers": 1}


def captioned(rows: int, length: int) -> Call:
    """A padded text and an image."""
    call = masked(rows, length)
    call["input_ids"].clamp_(max=IMAGE - 1)
    return {**call, "pixel_values": torch.randn(rows, 3, 32, 32)}


def seeing(pieces: int, **more: torch.Tensor) -> Inputs:
    """A text in which the first `pieces` tokens after the start are an image."""

    def call(rows: int, length: int) -> Call:
        ids = torch.randint(3, IMAGE - 2, (rows, length + pieces + 1))
        ids[:, 1 : 1 + pieces] = IMAGE
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            **more,
            "pixel_values": torch.randn(rows, 3, 32, 32),
        }

    return call


def dual(name: str, text: dict[str, Any] | None = None, **options: Any) -> Subject:
    """Two encoders with a shared embedding space."""
    sides = {"text_config": {**TEXT, **(text or {})}, "vision_config": VISION}
    return pretrained(f"{name}Model", f"{name}Config", **sides, projection_dim=48, **options), captioned


@subject(FAMILY, "clip")
def clip() -> Subject:
    """CLIP."""
    return dual("CLIP")


@subject(FAMILY, "siglip")
def siglip() -> Subject:
    """SigLIP: with a head of attention pooling."""
    return dual("Siglip")


@subject(FAMILY, "altclip")
def altclip() -> Subject:
    """CLIP with a multilingual text encoder."""
    return dual("AltCLIP", {"project_dim": 48})


@subject(FAMILY, "clipseg")
def clipseg() -> Subject:
    """Segmentation from a prompt."""
    sides = {"text_config": TEXT, "vision_config": VISION}
    model = pretrained("CLIPSegForImageSegmentation", "CLIPSegConfig", **sides, projection_dim=48, reduce_dim=16,
                       extract_layers=[0, 1], decoder_num_attention_heads=2, decoder_intermediate_size=32)  # fmt: skip
    return model, captioned


@subject(FAMILY, "vilt")
def vilt() -> Subject:
    """One encoder over words and patches."""
    model = pretrained("ViltModel", "ViltConfig", **{**TINY, "image_size": 32, "patch_size": 8, "max_image_length": -1})
    return model, captioned


@subject(FAMILY, "flava")
def flava() -> Subject:
    """Unimodal encoders and a joint encoder."""
    sides = {"text_config": TEXT, "image_config": VISION, "multimodal_config": VISION}
    return pretrained("FlavaModel", "FlavaConfig", **sides, projection_dim=48), captioned


@subject(FAMILY, "blip")
def blip() -> Subject:
    """Captions from an image."""
    text = {**TEXT, "encoder_hidden_size": 64, "is_decoder": True, "sep_token_id": 2}
    model = pretrained("BlipForConditionalGeneration", "BlipConfig", text_config=text, vision_config=VISION,
                       projection_dim=48, image_text_hidden_size=48)  # fmt: skip
    return model, captioned


@subject(FAMILY, "blip2")
def blip2() -> Subject:
    """A querying transformer between a vision encoder and a decoder."""
    queries = {**TINY, "encoder_hidden_size": 64, "cross_attention_frequency": 1}
    opt = {**DECODER, "model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 64}
    model = pretrained("Blip2ForConditionalGeneration", "Blip2Config", vision_config=VISION, qformer_config=queries,
                       text_config=opt, num_query_tokens=4, image_token_index=IMAGE)  # fmt: skip
    return model, seeing(4)


@subject(FAMILY, "llava")
def llava() -> Subject:
    """A vision tower projected into a Llama."""
    vision, text = {**VISION, "model_type": "clip_vision_model"}, {**DECODER, "model_type": "llama"}
    model = pretrained("LlavaForConditionalGeneration", "LlavaConfig", vision_config=vision, text_config=text,
                       image_token_index=IMAGE, vision_feature_layer=-1)  # fmt: skip
    return model, seeing(16)


@subject(FAMILY, "paligemma")
def paligemma() -> Subject:
    """SigLIP and Gemma, with bidirectional attention within the prefix."""
    vision = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    model = pretrained(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        vision_config=vision,
        text_config={**DECODER, "model_type": "gemma"},
        image_token_index=IMAGE,
        projection_dim=64,
    )
    inputs = seeing(16)
    return model, lambda rows, length: {
        **(call := inputs(rows, length)),
        "token_type_ids": torch.zeros_like(call["input_ids"]),
    }


@subject(FAMILY, "gemma3-vision")
def gemma3_vision() -> Subject:
    """Gemma 3 with images, pooled to fewer tokens."""
    vision = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    model = pretrained("Gemma3ForConditionalGeneration", "Gemma3Config", vision_config=vision, mm_tokens_per_image=4,
                       text_config={**DECODER, "sliding_window": 8, "layer_types": ["full_attention"]},
                       image_token_index=IMAGE, boi_token_index=98, eoi_token_index=99)  # fmt: skip
    inputs = seeing(4)
    return model, lambda rows, length: {
        **(call := inputs(rows, length)),
        "token_type_ids": (call["input_ids"] == IMAGE).long(),
    }


@subject(FAMILY, "idefics2")
def idefics2() -> Subject:
    """A perceiver between a vision encoder and a Mistral."""
    perceiver = {"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
                 "resampler_head_dim": 16, "num_key_value_heads": 2}  # fmt: skip
    model = pretrained("Idefics2ForConditionalGeneration", "Idefics2Config", vision_config=VISION,
                       perceiver_config=perceiver, text_config={**DECODER, "model_type": "mistral"},
                       image_token_id=IMAGE)  # fmt: skip
    return model, several_images(4)


@subject(FAMILY, "idefics3")
def idefics3() -> Subject:
    """Patches shuffled into fewer tokens before a Llama."""
    model = pretrained("Idefics3ForConditionalGeneration", "Idefics3Config", vision_config=VISION, scale_factor=2,
                       text_config={**DECODER, "model_type": "llama"}, image_token_id=IMAGE)  # fmt: skip
    return model, several_images(4)


@subject(FAMILY, "smolvlm")
def smolvlm() -> Subject:
    """Like Idefics3, but smaller."""
    model = pretrained("SmolVLMForConditionalGeneration", "SmolVLMConfig", vision_config=VISION, scale_factor=2,
                       text_config={**DECODER, "model_type": "llama"}, image_token_id=IMAGE)  # fmt: skip
    return model, several_images(4)


def several_images(pieces: int) -> Inputs:
    """Like `seeing`, with an axis for the images of each text."""
    inputs = seeing(pieces)
    return lambda rows, length: {**(call := inputs(rows, length)), "pixel_values": call["pixel_values"][:, None]}


GRID = {"image_token_id": IMAGE, "video_token_id": 101, "vision_start_token_id": 98, "vision_end_token_id": 99}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}


def patches(rows: int, length: int) -> Call:
    """One image of 4 x 4 patches for each text, merged 2 x 2 into 4 tokens."""
    ids = torch.randint(3, 97, (rows, length + 6))
    ids[:, 1], ids[:, 2:6], ids[:, 6] = 98, IMAGE, 99
    kinds = (ids == IMAGE).int()
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(16 * rows, 2 * 3 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows), "mm_token_type_ids": kinds,
    }  # fmt: skip


@subject(FAMILY, "qwen2-vl")
def qwen2_vl() -> Subject:
    """Images of any size; their grid is an input."""
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8,
              "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
    model = pretrained("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", vision_config=vision,
                       text_config={**DECODER, **ROPE}, **GRID)  # fmt: skip
    return model, patches


@subject(FAMILY, "qwen2-vl-vision")
def qwen2_vl_vision() -> Subject:
    """The vision tower alone; everything that depends on the grid's values is precomputed."""
    tower: Any = qwen2_vl()[0].get_submodule("model.visual")

    def call(rows: int, _: int) -> Call:
        from transformers.vision_utils import get_vision_attention_seqlens, get_vision_position_ids

        grid = torch.tensor([[1, 4, 4]] * rows)
        bounds, longest = get_vision_attention_seqlens(grid, tower.config)
        return {
            "hidden_states": torch.randn(16 * rows, 2 * 3 * 8 * 8), "grid_thw": grid, "cu_seqlens": bounds,
            "max_seqlen": longest, "position_ids": get_vision_position_ids(grid, 2),
        }  # fmt: skip

    return tower, call


@subject(FAMILY, "qwen2-vl-text")
def qwen2_vl_text() -> Subject:
    """The decoder alone, over embeddings and positions along three axes."""
    model = qwen2_vl()[0].get_submodule("model.language_model")
    return model, lambda rows, length: {
        "inputs_embeds": torch.randn(rows, length, 64),
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
        "position_ids": torch.arange(length).expand(3, rows, -1).clone(),
    }


@subject(FAMILY, "qwen2.5-vl")
def qwen25_vl() -> Subject:
    """The same with windows."""
    vision = {"depth": 2, "hidden_size": 64, "out_hidden_size": 64, "num_heads": 4, "intermediate_size": 96,
              "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
              "fullatt_block_indexes": [1]}  # fmt: skip
    model = pretrained("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", vision_config=vision,
                       text_config={**DECODER, **ROPE}, **GRID)  # fmt: skip
    return model, patches


@subject(FAMILY, "florence2")
def florence2() -> Subject:
    """A DaViT encoder and a BART."""
    vision = {"embed_dim": [32, 64], "depths": [1, 1], "num_heads": [2, 4], "num_groups": [2, 4], "patch_size": [7, 3],
              "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 4,
              "projection_dim": 64}  # fmt: skip
    text = {"model_type": "bart", "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2}  # fmt: skip
    model = pretrained("Florence2ForConditionalGeneration", "Florence2Config", vision_config=vision, text_config=text,
                       image_token_id=IMAGE)  # fmt: skip
    inputs = seeing(17)
    return model, lambda rows, length: {**inputs(rows, length), "decoder_input_ids": torch.randint(3, 90, (rows, 5))}
