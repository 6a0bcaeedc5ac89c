"""Denoisers and autoencoders of diffusers, built from configurations without downloads."""

from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.subjects import Call, Subject, images, subject

FAMILY = "diffusion"


def diffuser(name: str, **options: Any) -> nn.Module:
    """A model of diffusers with random weights."""
    model: nn.Module = getattr(import_module("diffusers"), name)(**options)
    return model


def denoising(rows: int, size: int, **more: torch.Tensor) -> Call:
    """Noisy latents and their timesteps."""
    return {"sample": torch.randn(rows, 4, size, size), "timestep": torch.tensor(7), **more}


@subject(FAMILY, "unet2d")
def unet() -> Subject:
    """A U-Net with attention in its middle."""
    model = diffuser("UNet2DModel", sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64),
                     layers_per_block=1, norm_num_groups=8, attention_head_dim=16,
                     down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                     up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    return model, lambda rows, _: denoising(rows, 16)


@subject(FAMILY, "unet2d-condition")
def unet_condition() -> Subject:
    """The U-Net of Stable Diffusion: cross-attention to a prompt."""
    model = diffuser("UNet2DConditionModel", sample_size=16, block_out_channels=(32, 64), layers_per_block=1,
                     norm_num_groups=8, cross_attention_dim=48, attention_head_dim=4,
                     down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))  # fmt: skip
    return model, lambda rows, length: denoising(rows, 16, encoder_hidden_states=torch.randn(rows, length, 48))


@subject(FAMILY, "dit")
def dit() -> Subject:
    """A diffusion transformer, conditioned on a class."""
    model = diffuser(
        "DiTTransformer2DModel",
        sample_size=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=16,
        num_embeds_ada_norm=50,
        norm_num_groups=8,
    )
    return model, lambda rows, _: {
        "hidden_states": torch.randn(rows, 4, 8, 8),
        "timestep": torch.randint(0, 50, (rows,)),
        "class_labels": torch.randint(0, 50, (rows,)),
    }


@subject(FAMILY, "transformer2d")
def transformer2d() -> Subject:
    """Self- and cross-attention over the pixels of latents."""
    model = diffuser("Transformer2DModel", num_attention_heads=4, attention_head_dim=16, in_channels=32,
                     num_layers=2, norm_num_groups=8, cross_attention_dim=48)  # fmt: skip
    return model, lambda rows, length: {
        "hidden_states": torch.randn(rows, 32, 8, 8),
        "encoder_hidden_states": torch.randn(rows, length, 48),
    }


@subject(FAMILY, "pixart")
def pixart() -> Subject:
    """PixArt: a diffusion transformer over a caption."""
    model = diffuser("PixArtTransformer2DModel", sample_size=8, in_channels=4, out_channels=8, num_layers=2,
                     num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64, caption_channels=48,
                     norm_num_groups=8, use_additional_conditions=False)  # fmt: skip
    return model, lambda rows, length: {
        "hidden_states": torch.randn(rows, 4, 8, 8),
        "encoder_hidden_states": torch.randn(rows, length, 48),
        "timestep": torch.randint(0, 50, (rows,)),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@subject(FAMILY, "sd3")
def sd3() -> Subject:
    """Stable Diffusion 3: joint attention of a prompt and latents."""
    model = diffuser("SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
                     attention_head_dim=16, num_attention_heads=4, joint_attention_dim=48, caption_projection_dim=64,
                     pooled_projection_dim=32, pos_embed_max_size=16)  # fmt: skip
    return model, lambda rows, length: {
        "hidden_states": torch.randn(rows, 4, 8, 8),
        "encoder_hidden_states": torch.randn(rows, length, 48),
        "pooled_projections": torch.randn(rows, 32),
        "timestep": torch.rand(rows) * 50,
    }


@subject(FAMILY, "flux")
def flux() -> Subject:
    """Flux: double and single streams, with rotary positions of an image."""
    model = diffuser("FluxTransformer2DModel", patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
                     attention_head_dim=16, num_attention_heads=4, joint_attention_dim=48, pooled_projection_dim=32,
                     axes_dims_rope=(4, 4, 8), guidance_embeds=False)  # fmt: skip

    def call(rows: int, length: int) -> Call:
        return {
            "hidden_states": torch.randn(rows, 16, 16), "encoder_hidden_states": torch.randn(rows, length, 48),
            "pooled_projections": torch.randn(rows, 32), "timestep": torch.rand(rows), "img_ids": torch.rand(16, 3),
            "txt_ids": torch.zeros(length, 3),
        }  # fmt: skip

    return model, call


@subject(FAMILY, "vae")
def vae() -> Subject:
    """The autoencoder for latents: convolutions, with attention in the middle."""
    model = diffuser(
        "AutoencoderKL",
        block_out_channels=(16, 32),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return model, images(16, name="sample")


class AdaptiveBlock(nn.Module):
    """A block of a diffusion transformer: shift, scale and gate come from the condition."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        y = self.norm(x) * (1 + scale) + shift
        x = x + gate * self.attention(y, y, y, need_weights=False)[0]
        mixed: torch.Tensor = x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)
        return mixed


@subject(FAMILY, "own-dit-block")
def own_dit() -> Subject:
    """The same idea in plain torch."""
    return AdaptiveBlock(), lambda rows, length: {
        "x": torch.randn(rows, length, 64),
        "condition": torch.randn(rows, 64),
    }
