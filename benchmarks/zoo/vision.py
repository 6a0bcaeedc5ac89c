"""Vision transformers, convolutional networks, detectors and segmenters."""

from typing import Any

import torch

from benchmarks.zoo.subjects import Call, Subject, add, images, pretrained, subject

FAMILY = "vision"

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.1, "mlp_ratio": 2.0, "num_labels": 10,
}  # fmt: skip
STAGES = {"hidden_sizes": [64, 96], "depths": [1, 1], "num_stages": 2, "layer_scale_init_value": 1.0}
WINDOWS = {
    "embed_dim": 64,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "patch_size": 2,
    "hidden_size": None,
    "num_attention_heads": None,
    "num_hidden_layers": None,
}

MODELS: dict[str, dict[str, Any]] = {
    "vit": {"model": "ViTModel"},
    "vit-classifier": {"model": "ViTForImageClassification", "config": "ViTConfig"},
    "deit": {"model": "DeiTModel"},
    "beit": {"model": "BeitModel", "use_relative_position_bias": True, "use_mask_token": False},
    "swin": {"model": "SwinModel", **WINDOWS},
    "swinv2": {"model": "Swinv2Model", **WINDOWS},
    "convnext": {"model": "ConvNextModel", **STAGES, "patch_size": 4},
    "convnextv2": {"model": "ConvNextV2Model", **STAGES, "patch_size": 4},
    "resnet": {"model": "ResNetForImageClassification", "config": "ResNetConfig", "embedding_size": 32,
               "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic", "num_labels": 32},
    "dinov2": {"model": "Dinov2Model", "mlp_ratio": 2},
    "dinov3": {"model": "DINOv3ViTModel", "num_register_tokens": 2},
    "segformer": {"model": "SegformerForSemanticSegmentation", "config": "SegformerConfig",
                  "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [32, 64],
                  "patch_sizes": [3, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
                  "decoder_hidden_size": 64},
    "pvt": {"model": "PvtModel", "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1],
            "hidden_sizes": [32, 64], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2]},
    "hiera": {"model": "HieraModel", "embed_dim": 32, "image_size": [64, 64], "patch_size": [7, 7],
              "patch_stride": [4, 4], "patch_padding": [3, 3], "depths": [1, 1], "num_heads": [1, 2],
              "masked_unit_size": [4, 4], "num_query_pool": 1, "query_stride": [2, 2]},
    "yolos": {"model": "YolosForObjectDetection", "config": "YolosConfig", "image_size": [32, 32],
              "num_detection_tokens": 5},
    "dpt": {"model": "DPTForDepthEstimation", "config": "DPTConfig", "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 16, "head_in_index": -1},
    "ijepa": {"model": "IJepaModel"},
    "poolformer": {"model": "PoolFormerForImageClassification", "config": "PoolFormerConfig", "num_labels": 32,
                   "hidden_sizes": [32, 64], "depths": [1, 1], "patch_sizes": [7, 3],
                   "strides": [4, 2], "padding": [2, 1], "num_encoder_blocks": 2},
    "mobilevit": {"model": "MobileViTModel", "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 40,
                  48, 64], "patch_size": 2, "image_size": 64},
    "levit": {"model": "LevitModel", "image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4],
              "depths": [1, 1, 1], "key_dim": [16, 16, 16],
              "mlp_ratio": [2, 2, 2], "patch_size": 16},
}  # fmt: skip
OTHER_SIZES = {"hiera": 64, "mobilevit": 64, "levit": 64}


def vision(model: str, config: str = "", size: int = 32, **changes: Any) -> Subject:
    """A vision model of transformers; `XModel` has an `XConfig`."""
    config = config or model.removesuffix("Model") + "Config"
    return pretrained(model, config, **{**SIZES, **changes}), images(size)


for _name, _options in MODELS.items():
    _size = OTHER_SIZES.get(_name, 32)
    add(FAMILY, _name, lambda options=_options, size=_size: vision(**options, size=size))  # type: ignore[misc]


@subject(FAMILY, "vit-mae")
def vit_mae() -> Subject:
    """A masked autoencoder; the noise that selects patches is an input."""
    options = {**SIZES, "decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4,
               "decoder_intermediate_size": 96}  # fmt: skip
    model = pretrained("ViTMAEForPreTraining", "ViTMAEConfig", **options)
    return model, lambda rows, _: {"pixel_values": torch.randn(rows, 3, 32, 32), "noise": torch.rand(rows, 16)}


DETECTOR = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_queries": 5, "num_labels": 7, "use_timm_backbone": False,
    "use_pretrained_backbone": False, "backbone": None,
}  # fmt: skip


def backbone() -> Any:
    """The configuration of a small residual network."""
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )


def detector(name: str, **changes: Any) -> Subject:
    """A detector with a residual network and a mask of the pixels."""

    def call(rows: int, _: int) -> Call:
        return {"pixel_values": torch.randn(rows, 3, 64, 64), "pixel_mask": torch.ones(rows, 64, 64, dtype=torch.int64)}

    options = {**DETECTOR, "backbone_config": backbone(), **changes}
    return pretrained(f"{name}ForObjectDetection", f"{name}Config", **options), call


add(FAMILY, "detr", lambda: detector("Detr"))
add(FAMILY, "conditional-detr", lambda: detector("ConditionalDetr"))


def prompted(rows: int, size: int) -> Call:
    """Images with one prompt point each."""
    return {"pixel_values": torch.randn(rows, 3, size, size), "input_points": torch.rand(rows, 1, 1, 2) * size}


@subject(FAMILY, "sam")
def sam() -> Subject:
    """Segment Anything: an image encoder, prompts, and a mask decoder."""
    model = pretrained(
        "SamModel", "SamConfig",
        vision_config={"hidden_size": 64, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "image_size": 32, "patch_size": 8, "mlp_dim": 96, "window_size": 2, "global_attn_indexes": [1],
                       "num_pos_feats": 16},
        prompt_encoder_config={"hidden_size": 32, "image_size": 32, "patch_size": 8, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                             "iou_head_hidden_dim": 32},
    )  # fmt: skip
    return model, lambda rows, _: prompted(rows, 32)


@subject(FAMILY, "sam2")
def sam2() -> Subject:
    """Segment Anything 2, for images."""
    model = pretrained(
        "Sam2Model", "Sam2Config",
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model", "hidden_size": 32, "num_attention_heads": 1,
                "image_size": [64, 64], "patch_kernel_size": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3],
                "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [32, 48, 64, 96],
                "num_attention_heads_per_stage": [1, 1, 2, 2], "window_size_per_stage": [4, 4, 2, 2],
                "global_attention_blocks": [3], "window_positional_embedding_background_size": [4, 4],
            },
            "backbone_channel_list": [96, 64, 48, 32], "fpn_hidden_size": 32, "num_feature_levels": 3,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                             "iou_head_hidden_dim": 32},
    )  # fmt: skip
    return model, lambda rows, _: prompted(rows, 64)
