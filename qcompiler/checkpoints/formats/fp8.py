"""The block-FP8 format of Hugging Face and DeepSeek: `quant_method: fp8`.

    model.layers.0.mlp.up_proj.weight              F8_E4M3 [N, K]
    model.layers.0.mlp.up_proj.weight_scale_inv    F32 [ceil(N / 128), ceil(K / 128)]

    "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], ...}

Despite its name, `weight_scale_inv` is the factor that codes are multiplied by. The engine that runs the model
quantizes activations in each call.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qcompiler.checkpoints.companions import FP8, fp8_weights, scale_beside, x_scale_beside, zero_points_beside
from qcompiler.checkpoints.config_keys import ANY, check_keys, one_of
from qcompiler.checkpoints.files import TensorFiles
from qcompiler.checkpoints.format import CheckpointFormat, register
from qcompiler.checkpoints.quantized_weight import UE8M0, QuantizedWeight, StoredAs, powers_of_two
from qcompiler.errors import QCompilerError, did_you_mean
from qcompiler.numerics import ALL, format_of

METHOD = "fp8"

SCALE = "_scale_inv"
"""Suffix of a scale's name."""

SCALES = (SCALE, "_scale")
"""Suffixes that are read; AutoFP8 uses the second."""

SCHEMES = ("dynamic", "static")
"""Activation scales: computed in each call, or stored in the files."""

SCALE_FORMATS = {"float": torch.float32, "ue8m0": UE8M0}
"""`scale_fmt` -> the element type of stored scales."""

KEYS = {
    "quant_method": ANY, "activation_scheme": ANY, "weight_block_size": ANY,  # read below
    "fmt": one_of("e4m3", "e4m3fn", "float8_e4m3fn", "e5m2", "float8_e5m2"), "scale_fmt": one_of("float", "ue8m0"),
    "expert_dtype": one_of("fp8"), "modules_to_not_convert": ANY, "modules_to_convert": ANY, "ignored_layers": ANY,
    "ignore": ANY, "exclude_modules": ANY, "dequantize": ANY, "kv_cache_scheme": ANY, "packed_modules_mapping": ANY,
    "quantization_version": ANY, "version": ANY, "producer": ANY, "is_checkpoint_fp8_serialized": ANY,
}  # fmt: skip
"""Keys that DeepSeek, Qwen, MiniMax, AutoFP8 and transformers write. The tensors show which layers are quantized and
the types of codes and scales; KV caches stay in float."""


@dataclass(frozen=True)
class BlockFp8:
    """FP8 e4m3 with one scale for each block of a weight.

    Attributes:
        scale_format: How scales are stored: one of `SCALE_FORMATS`.
    """

    scale_format: str = "float"
    fix: ClassVar[str] = 'Use format="compressed-tensors", or the scheme "fp8_tile" for these layers.'
    readers: ClassVar[tuple[str, ...]] = ("vllm", "transformers")

    def __post_init__(self) -> None:
        """Raises QCompilerError if the scale format is unknown."""
        if self.scale_format not in SCALE_FORMATS:
            fix = did_you_mean(str(self.scale_format), SCALE_FORMATS)
            raise QCompilerError("no such scale format", got=repr(self.scale_format), fix=fix)

    def why_not(self, weight: QuantizedWeight) -> str | None:
        """The reason why this format cannot store a quantized weight; None if it can."""
        if weight.codes.dtype is not torch.float8_e4m3fn:
            return f"its codes are {str(weight.codes.dtype).removeprefix('torch.')}, not float8_e4m3fn"
        if min(weight.block) < 1:
            return f"its scales are for {list(weight.block)}, not for blocks such as [128, 128]"
        if weight.x_scale is not None:
            return "its activation scale is static, not computed in each call"
        if self.scale_format == "ue8m0" and not powers_of_two(weight.scale):
            return "its scales are not powers of two, as ue8m0 needs; the scheme fp8_tile{scale=ue8m0} makes them"
        return None

    def why_unread(self, weight: QuantizedWeight) -> str | None:
        """The reason why transformers cannot derive the block size of a weight from the number of its scales."""
        if any(size > block and size % block for size, block in weight.blocked_axes):
            return "transformers without a GPU derives the block size from the shapes, and misreads or refuses them"
        return None

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Codes and scales by their names in the file."""
        return {name: weight.codes, name + SCALE: weight.scale.to(SCALE_FORMATS[self.scale_format])}

    def config(self, weights: Mapping[str, QuantizedWeight], unconverted: Collection[str]) -> dict[str, Any]:
        """The `quantization_config`. Raises QCompilerError if block sizes differ."""
        blocks = {weight.block: name for name, weight in weights.items()}
        if len(blocks) > 1:
            got = ", ".join(f"{list(block)} in '{name}'" for block, name in blocks.items())
            raise QCompilerError("the format 'fp8' needs one block size", got=got, fix=self.fix)
        said = {
            "quant_method": METHOD,
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": list(next(iter(blocks))),
            "modules_to_not_convert": sorted(unconverted),
        }
        return said if self.scale_format == "float" else {**said, "scale_fmt": self.scale_format}


def stored_weights(said: Mapping[str, Any], tensors: TensorFiles) -> dict[str, StoredAs]:
    """The quantized weights of a folder: each FP8 weight and its scale.

    Reads DeepSeek's layout; AutoFP8's, with `weight_scale` and `input_scale`; and Mistral's, with scalar
    `weight_scale_inv` and `activation_scale`.

    Args:
        said: The `quantization_config`.
        tensors: The tensors of the folder.

    Raises:
        QCompilerError: The configuration is malformed or not supported, or a scale has no weight.
    """
    check_keys(said, KEYS, "the quantization configuration")
    if (scheme := said.get("activation_scheme", "dynamic")) not in SCHEMES:
        raise QCompilerError("an unknown activation scheme", got=repr(scheme), need=" or ".join(map(repr, SCHEMES)))
    block = _block(said.get("weight_block_size"))
    for name in tensors:
        weight = name.removesuffix(SCALE)
        if name.endswith("weight" + SCALE) and (weight not in tensors or tensors.dtype(weight) not in FP8):
            found = str(tensors.dtype(weight)).removeprefix("torch.") if weight in tensors else "nothing"
            raise QCompilerError(f"a scale has no FP8 weight: '{name}'", got=found, need=f"FP8 in '{weight}'")
    return {
        name: StoredAs(
            scale_beside(name, tensors, SCALES),
            format_of(block, tensors.dtype(name)),
            x_scale_beside(name, tensors) if scheme == "static" else None,
            zero_points_beside(name, tensors),
        )
        for name in fp8_weights(tensors)
    }


def _block(said: Any) -> tuple[int, int]:
    """The block size; without one, a weight has a single scale."""
    if said is None:
        return ALL, ALL
    sizes = [size for size in said if type(size) is int and size > 0] if isinstance(said, list) else []
    if len(sizes) != 2 or len(said) != 2:
        raise QCompilerError("'weight_block_size' is malformed", got=said, need="two positive numbers, or null")
    return sizes[0], sizes[1]


register(CheckpointFormat(METHOD, read=stored_weights, writer=BlockFp8, scale_suffix=SCALE))
