"""The quantization method "qcompiler" of vLLM: reads `quantization_config`, and chooses a method for each layer."""

from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from codegen.support import why_not
from qcompiler.checkpoints.layer_schemes import METHOD, LayerSchemes
from qcompiler.errors import QCompilerError
from qcompiler.schemes.pipelines import QuantizationSpec
from qcompiler.vllm.existing import OWN, ExistingConfig
from qcompiler.vllm.experts import QCompilerMoEMethod, scheme_of_experts
from qcompiler.vllm.fusing import enable
from qcompiler.vllm.linear import QCompilerLinearMethod
from qcompiler.vllm.operators_config import OperatorsConfig


@register_quantization_config(METHOD)
class QCompilerConfig(OperatorsConfig):
    """The schemes of a folder that qcompiler wrote."""

    def __init__(self, schemes: LayerSchemes, cache_scheme: object = None) -> None:
        super().__init__()
        self.schemes = schemes
        # vLLM's static scales are for FP8; it skips scales of other caches.
        self.has_cache_scales = isinstance(cache_scheme, dict) and cache_scheme.get("type") == "float"

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """This method if the user asks for it, for a folder of one of vLLM's own methods that `existing` reads."""
        return METHOD if user_quant == METHOD and hf_quant_cfg.get("quant_method") in OWN else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Reads the configuration; vLLM does so in its main process first, before it starts others.

        Raises:
            QCompilerError: It is malformed, or of a newer qcompiler; or the device cannot run one of its schemes.
        """
        if config.get("quant_method") in OWN:
            return ExistingConfig.from_config(config)
        schemes = LayerSchemes.read(config, "quantization_config")
        for text, spec in schemes.specs.items() if current_platform.is_cuda() else ():
            if (why := why_not(spec.x, spec.w)) is not None:
                raise QCompilerError(f"no GPU kernel runs the scheme '{text}': {why}", fix="Choose another scheme.")
        return cls(schemes, config.get("kv_cache_scheme"))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Renames layers as vLLM does for a model."""
        overrides = hf_to_vllm_mapper.apply_dict(dict(self.schemes.overrides))
        prescaled = hf_to_vllm_mapper.apply_list(sorted(self.schemes.prescaled))
        self.schemes = LayerSchemes(self.schemes.scheme, overrides, frozenset(prescaled))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for a layer; None for vLLM's own.

        Raises:
            QCompilerError: The parts of a merged layer have different schemes, or factors of the input channels only in
                part; or the plug-in does not support the layer.
        """
        if isinstance(layer, LinearBase):
            spec = self._spec(prefix)
            if spec is None:
                return UnquantizedLinearMethod()
            enable()
            return QCompilerLinearMethod(spec, prefix, self._parts(prefix), prescaled=self._is_prescaled(prefix))
        if isinstance(layer, RoutedExperts):
            scheme = scheme_of_experts(self.schemes, layer, prefix)
            return None if scheme is None else QCompilerMoEMethod(self.schemes.specs[scheme], layer, prefix)
        if isinstance(layer, ParallelLMHead):
            self._check_in_float(layer, prefix)
        return BaseKVCacheMethod(self) if isinstance(layer, Attention) and self.has_cache_scales else None

    def _spec(self, prefix: str) -> QuantizationSpec | None:
        """The quantization spec of a layer, whose parts must agree."""
        parts = self._parts(prefix)
        found = {self.schemes.of(part): part for part in parts}
        if len(found) > 1:
            got = ", ".join(f"{scheme or 'float'} in '{part}'" for scheme, part in found.items())
            last = [part.rpartition(".")[2] for part in parts]
            raise QCompilerError(
                f"vLLM merges {', '.join(last)} into one layer, and they have different schemes",
                got=got,
                need="one scheme",
                fix=f'Compile with equal overrides: {{"*.{last[0]}": SCHEME, ...}}.',
            )
        return self.schemes.spec(parts[0])

    def _is_prescaled(self, prefix: str) -> bool:
        """Whether smoothing's factors multiply the input of a layer, for all of its parts or none."""
        parts = self._parts(prefix)
        found = [part for part in parts if part in self.schemes.prescaled]
        if 0 < len(found) < len(parts):
            last = [part.rpartition(".")[2] for part in parts]
            without = ", ".join(repr(part) for part in parts if part not in found)
            raise QCompilerError(
                f"vLLM merges {', '.join(last)} into one layer, and only a part has factors of the input channels",
                got=f"none for {without}",
                need="factors for all parts, or for none",
                fix=f'Compile with equal overrides: {{"*.{last[0]}": SCHEME, ...}}.',
            )
        return bool(found)

    def _parts(self, prefix: str) -> list[str]:
        """The names in the files of the layers that vLLM merges into one."""
        path, dot, last = prefix.rpartition(".")
        return [f"{path}{dot}{name}" for name in self.packed_modules_mapping.get(last, [last])]

    def _check_in_float(self, layer: torch.nn.Module, prefix: str) -> None:
        """Raises QCompilerError if a layer is quantized for which there is no method."""
        if any(self.schemes.of(name) for name in self._parts(prefix)):
            raise QCompilerError(
                f"the plug-in does not run a quantized {type(layer).__name__}",
                got=f"'{prefix}'",
                fix=f'Leave it in float: overrides={{"*{prefix.rpartition(".")[2]}*": None}}.',
            )
