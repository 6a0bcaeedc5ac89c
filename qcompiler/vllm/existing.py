"""qcompiler's kernels for folders of vLLM's own methods, `fp8` and `compressed-tensors`: `quantization="qcompiler"`.

    fp8                  weight_block_size [128, 128]              ->  tiles of x, blocks of w; scales: weight_scale_inv
    fp8                  one scale for each weight                 ->  x per token or static, w per tensor
    compressed-tensors   8 bits; channel, tensor or block scales   ->  the granularities that the group declares

vLLM's configuration of the folder decides which linears are quantized, and how. What has no kernel here, such as
experts, weights without quantized activations, and zero points, keeps vLLM's method.
"""

from collections.abc import Mapping
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.platforms import current_platform

from codegen.support import why_not
from qcompiler.checkpoints.layer_schemes import SCALE
from qcompiler.ir import ALL, Format
from qcompiler.ir.formats import FP8_BLOCK, FP8_ROW, FP8_TENSOR, FP8_TILE, INT8_ROW, INT8_TENSOR
from qcompiler.schemes.pipelines import QuantizationSpec
from qcompiler.vllm.fusing import enable
from qcompiler.vllm.linear import QCompilerLinearMethod
from qcompiler.vllm.operators_config import OperatorsConfig

OWN: Mapping[str, type[QuantizationConfig]] = {"fp8": Fp8Config, "compressed-tensors": CompressedTensorsConfig}
"""`quant_method` -> vLLM's configuration."""

ROWS = {"float": FP8_ROW, "int": INT8_ROW}
TENSORS = {"float": FP8_TENSOR, "int": INT8_TENSOR}
FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
"""Formats of compressed-tensors whose weights are plain codes `[N, K]`."""

log = init_logger("vllm.qcompiler")


class ExistingConfig(OperatorsConfig):
    """vLLM's configuration of a folder, with qcompiler's method for the linears that it can run.

    Args:
        own: vLLM's configuration.
    """

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.own = own
        self.get_cache_scale_mapper = own.get_cache_scale_mapper

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ExistingConfig":
        """Reads the configuration as vLLM does, with its errors."""
        return cls(OWN[config["quant_method"]].from_config(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Renames layers as vLLM does for a model."""
        self.own.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """qcompiler's method for a quantized linear that it can run; otherwise vLLM's."""
        self.own.packed_modules_mapping = self.packed_modules_mapping
        found = self._found(layer, prefix) if isinstance(layer, LinearBase) else None
        if found is None:
            return self.own.get_quant_method(layer, prefix)
        spec, scale = found if isinstance(found, tuple) else (None, found)
        why = scale if spec is None else why_not(spec.x, spec.w) if current_platform.is_cuda() else None
        if spec is None or why is not None:
            log.warning("vLLM's own method runs '%s': %s", prefix, why)
            return self.own.get_quant_method(layer, prefix)
        path, dot, last = prefix.rpartition(".")
        sources = [f"{path}{dot}{name}" for name in self.packed_modules_mapping.get(last, [last])]
        enable()
        return QCompilerLinearMethod(spec, prefix, sources, scale=scale)

    def _found(self, layer: torch.nn.Module, prefix: str) -> tuple[QuantizationSpec, str] | str | None:
        """The quantization spec of a linear and the name of its scales; a reason against; None if it is in float."""
        if isinstance(self.own, Fp8Config):
            skipped = is_layer_skipped(
                prefix=prefix, ignored_layers=self.own.ignored_layers, fused_mapping=self.packed_modules_mapping,
                match_mode=self.own.ignored_layers_match_mode,
            )  # fmt: skip
            return None if skipped else of_fp8(self.own.weight_block_size, self.own.activation_scheme)
        group = self.own.get_scheme_dict(layer, prefix)
        if group is None or group.get("weights") is None:
            return None
        if self.own.transform_config is not None and self.own.transform_config.config_groups:
            return "its weights are transformed"
        spec = of_group(group["weights"], group.get("input_activations"), group.get("format"))
        return spec if isinstance(spec, str) else (spec, SCALE)


def of_fp8(block: list[int] | None, activations: str) -> tuple[QuantizationSpec, str]:
    """The quantization spec of an `fp8` folder and the name of its scales.

    Args:
        block: Rows and columns of a weight that share a scale; None for one scale.
        activations: "dynamic" or "static".
    """
    if block is not None:
        rows, columns = block
        return QuantizationSpec(
            FP8_TILE.with_block((1, columns)), FP8_BLOCK.with_block((rows, columns))
        ), "weight_scale_inv"
    static = activations == "static"
    return QuantizationSpec(FP8_TENSOR if static else FP8_ROW, FP8_TENSOR, static), SCALE


def of_group(weights: Any, inputs: Any, format: str | None) -> QuantizationSpec | str:
    """The quantization spec of a group of compressed-tensors, or the reason why it keeps vLLM's method.

    Args:
        weights: The arguments of the weights, as compressed-tensors parses them.
        inputs: The arguments of the activations; None if they are in float.
        format: How the weights are stored.
    """
    if inputs is None:
        return "its activations are not quantized"
    if format not in FORMATS:
        return f"its weights are stored as '{format}'"
    kind = str(weights.type)
    if (weights.num_bits, inputs.num_bits) != (8, 8) or str(inputs.type) != kind or kind not in ROWS:
        return "its weights and activations are not both FP8 or both INT8"
    if not (weights.symmetric and inputs.symmetric):
        return "its codes are asymmetric"
    if weights.actorder not in (None, "static", "weight"):
        return "its columns are in another order"
    w, x = _of_weights(weights, kind), _of_inputs(inputs, weights, kind)
    if isinstance(w, str):
        return w
    return x if isinstance(x, str) else QuantizationSpec(x, w, inputs.dynamic is False)


def _of_weights(said: Any, kind: str) -> Format | str:
    strategy = str(said.strategy)
    if strategy == "block":
        return FP8_BLOCK.with_block(tuple(said.block_structure)) if kind == "float" else "INT8 blocks have no kernel"
    blocks = {"channel": (1, ALL), "tensor": (ALL, ALL)}
    return ROWS[kind].with_block(blocks[strategy]) if strategy in blocks else f"its weights have scales per {strategy}"


def _of_inputs(said: Any, weights: Any, kind: str) -> Format | str:
    strategy = str(said.strategy)
    if strategy == "tensor":
        return TENSORS[kind]
    if said.dynamic is not True:
        return f"its static activation scales are per {strategy}"
    if strategy == "token":
        return ROWS[kind]
    if strategy == "group" and kind == "float" and str(weights.strategy) == "block":
        return FP8_TILE.with_block((1, said.group_size))
    return f"its activations have scales per {strategy}"
