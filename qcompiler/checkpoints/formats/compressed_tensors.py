"""The 8-bit formats of the compressed-tensors library: `quant_method: compressed-tensors`.

    model.layers.0.mlp.up_proj.weight          F8_E4M3 or I8 [N, K]
    model.layers.0.mlp.up_proj.weight_scale    F32 [ceil(N / 128), ceil(K / 128)], [N, 1] or [1]
    model.layers.0.mlp.up_proj.input_scale     F32 [1], if the activation has a static scale

Weights with the same quantization form a config group. A group lists its layers by full name, unless it is the only
group: then it targets every linear that is not ignored.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from qcompiler.checkpoints import compressed_groups
from qcompiler.checkpoints.companions import stem
from qcompiler.checkpoints.format import CheckpointFormat, register
from qcompiler.checkpoints.quantized_weight import QuantizedWeight
from qcompiler.numerics import ALL

METHOD = "compressed-tensors"
SCALE, INPUT_SCALE = "weight_scale", "input_scale"
KINDS = {torch.float8_e4m3fn: ("float", "float-quantized"), torch.int8: ("int", "int-quantized")}
"""Element type of codes -> its name in the configuration, and the storage format."""

CHANNEL, TENSOR = (1, ALL), (ALL, ALL)


class CompressedTensors:
    """FP8 per block, channel or tensor; INT8 per channel or tensor."""

    fix = "Choose another scheme for these layers, or leave them in float: overrides={pattern: None}."
    readers = ("vllm", "transformers")

    def why_not(self, weight: QuantizedWeight) -> str | None:
        """The reason why this format cannot store a quantized weight; None if it can."""
        if not weight.format.symmetric or (weight.x_format is not None and not weight.x_format.symmetric):
            return "it or its activation is quantized with zero points"
        kind = str(weight.codes.dtype).removeprefix("torch.")
        if weight.codes.dtype not in KINDS:
            return f"its codes are {kind}, not float8_e4m3fn or int8"
        integers = weight.codes.dtype is torch.int8
        if weight.block not in (CHANNEL, TENSOR) and (integers or min(weight.block) < 1):
            return f"its codes are {kind} with a scale for each {list(weight.block)}"
        x_block = weight.x_format.block if weight.x_format else CHANNEL
        if x_block[0] != 1 and x_block != TENSOR:
            return "its activations have a scale for each channel over all tokens"
        if integers and x_block == TENSOR and weight.x_scale is None:
            return "its activations are int8 with one scale for all tokens, computed in each call"
        if integers and x_block not in (CHANNEL, TENSOR):
            return f"its activations are int8 in tiles of {list(x_block)}"
        return None

    def why_unread(self, weight: QuantizedWeight) -> str | None:
        """The reason why transformers cannot split the activation of a weight into whole groups."""
        if any(size % block for size, block in weight.blocked_axes[1:]):
            return "transformers cannot run those whose number of input channels is not a multiple of the block"
        return None

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Codes and scales by their names in the file."""
        beside = stem(name)
        scale = weight.scale.reshape(1) if weight.block == TENSOR else weight.scale
        found = {name: weight.codes, beside + SCALE: scale}
        return found if weight.x_scale is None else {**found, beside + INPUT_SCALE: weight.x_scale.reshape(1)}

    def config(self, weights: Mapping[str, QuantizedWeight], unconverted: Collection[str]) -> dict[str, Any]:
        """The `quantization_config`."""
        groups: list[tuple[dict[str, Any], list[str]]] = []
        for name, weight in weights.items():
            said = _scheme(weight)
            members = next((members for scheme, members in groups if scheme == said), None)
            if members is None:
                groups.append((said, members := []))
            members.append(name.removesuffix(".weight"))
        single = len(groups) == 1
        formats = {scheme["format"] for scheme, _ in groups}
        return {
            "quant_method": METHOD,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{index}": {"targets": ["Linear"] if single else sorted(members), **scheme}
                for index, (scheme, members) in enumerate(groups)
            },
            "ignore": sorted(unconverted),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def _scheme(weight: QuantizedWeight) -> dict[str, Any]:
    """The configuration of a group, without its targets."""
    kind, stored = KINDS[weight.codes.dtype]
    common = {"num_bits": 8, "type": kind, "symmetric": True}
    return {
        "format": stored,
        "weights": {**common, "dynamic": False, **_strategy(weight.block, "channel")},
        "input_activations": {**common, "dynamic": weight.x_scale is None, **_activations(weight)},
        "output_activations": None,
    }


def _strategy(block: tuple[int, int], row: str) -> dict[str, Any]:
    if block == TENSOR:
        return {"strategy": "tensor"}
    return {"strategy": row} if block == CHANNEL else {"strategy": "block", "block_structure": list(block)}


def _activations(weight: QuantizedWeight) -> dict[str, Any]:
    """The strategy for activations; if the graph does not specify one, the one that matches the weight's."""
    usual = CHANNEL if weight.block in (CHANNEL, TENSOR) else (1, weight.block[1])
    block = weight.x_format.block if weight.x_format else usual
    if block[0] == 1 and block[1] != ALL:
        return {"strategy": "group", "group_size": block[1]}
    return _strategy(block, "token")


register(
    CheckpointFormat(
        METHOD,
        read=compressed_groups.stored_weights,
        writer=lambda _: CompressedTensors(),
        notes=compressed_groups.notes,
        is_float=compressed_groups.is_float,
    )
)
