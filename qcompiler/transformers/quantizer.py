"""The quantizer that transformers calls while it loads a model.

from_pretrained(folder, quantization_config=QCompilerConfig(...))    decides; quantizes each weight right after reading
from_pretrained(folder of quant_method "qcompiler")                  reads codes and scales
"""

import copy
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from codegen.direct import kernels
from qcompiler import numerics
from qcompiler.checkpoints.layer_schemes import METHOD, LayerSchemes
from qcompiler.errors import CodegenError, PassError, QCompilerError
from qcompiler.runtime.device import AUTO, CUDA, Target, target_for
from qcompiler.schemes.named import spec_of
from qcompiler.schemes.pipelines import QuantizationSpec
from qcompiler.transformers.config import QCompilerConfig
from qcompiler.transformers.decisions import Decisions, decide, stored_decisions
from qcompiler.transformers.experts import QuantizedExperts
from qcompiler.transformers.linear import QuantizedLinear, frozen
from qcompiler.transformers.report import LayerReport

CODES, SCALE = "weight", "weight_scale"

QUANTIZED = (QuantizedLinear, QuantizedExperts)

INITIALIZED = "_is_hf_initialized"
"""Transformers' mark of tensors that it has loaded, and of modules that it does not initialize."""

OLDEST = (5, 23)
"""The oldest transformers that quantizes while it loads, by tests; older ones read quantized folders."""

SHOWN = 3
"""Maximum number of tensors in an error."""


CALIBRATE = (
    'Compile the model with calibration data, save it with save_checkpoint(folder, "qcompiler"), and load that folder.'
)


class QuantizeOnLoad(ConversionOps):
    """weight -> weight (codes), weight_scale; runs for each weight right after it is read."""

    def convert(self, input_dict: dict[str, Any], *_: Any, model: Any = None, **__: Any) -> dict[str, Any]:
        """Quantizes the weights, by their full names."""
        found: dict[str, Any] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            layer = model.get_submodule(name.rpartition(".")[0])
            w = layer.w_format
            codes, scale = kernels.quantize(weight, [*w.block], numerics.torch_dtype(w.element), w.profile, "row_major")
            found |= {name: frozen(codes), f"{name}_scale": frozen(scale)}
        return found


class QCompilerQuantizer(HfQuantizer):
    """Replaces `nn.Linear` by `QuantizedLinear` in a model whose weights are not loaded yet."""

    requires_calibration = False
    quantization_config: QCompilerConfig
    serialized_names: dict[str, list[str]] = {CODES: [CODES, SCALE]}  # noqa: RUF012  # as in the base class

    def __init__(self, quantization_config: QCompilerConfig, **options: Any) -> None:
        super().__init__(copy.copy(quantization_config), **options)  # decisions for one model change it

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Checks the schemes before anything is read.

        Raises:
            QCompilerError: transformers is too old to quantize a float model while it loads.
            PassError: A scheme needs calibration data, which loading a float model does not have.
            CodegenError: No kernel of a device runs a scheme.
        """
        texts = {text: spec_of(text) for text in used_schemes(self.quantization_config.schemes)}
        if not self.pre_quantized:
            check_version(transformers.__version__)
            for text, spec in texts.items():
                check_no_calibration(text, spec)
            if prescaled := self.quantization_config.schemes.prescaled:
                raise PassError("'prescaled' describes a quantized folder, and this is a float model",
                                got=repr(sorted(prescaled)[0]), need="none", fix=CALIBRATE)  # fmt: skip
        for device in devices(device_map):
            target = target_for(AUTO, device)
            for text, spec in texts.items():
                check_runs(text, spec, target)

    def _process_model_before_weight_loading(self, model: Any, **__: Any) -> None:
        check_not_split(model.config)
        schemes = self.quantization_config.schemes
        if self.pre_quantized:
            decisions = stored_decisions(model, schemes)
        else:
            decisions = decide(model, schemes)
            self.quantization_config.schemes = named(schemes.scheme, decisions)
        for name, scheme in decisions.schemes.items():
            model.set_submodule(name, like(model.get_submodule(name), scheme, name in decisions.prescaled))
        model.qcompiler_report = LayerReport(decisions.schemes, decisions.skipped)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if not self.pre_quantized:  # the scales of experts are split by file as their codes are
            conversions = self.update_weight_conversions(model._weight_conversions, model)  # type: ignore[no-untyped-call]
            model._weight_conversions = conversions
        absent = []
        for name, layer in model.named_modules():
            if isinstance(layer, QUANTIZED):
                for part, tensor in layer.stored().items():
                    tensor.requires_grad_(False)
                    loaded = tensor.is_meta or hasattr(tensor, INITIALIZED)  # on meta: offloaded to disk
                    absent += [] if loaded else [f"{name}.{part}"]
        if absent:
            more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
            fix = "Write the folder again; the model cannot be used."
            raise QCompilerError(
                "the folder lacks tensors of quantized layers", got=", ".join(absent[:SHOWN]) + more, fix=fix
            )
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **__: Any) -> bool:
        """Whether a parameter is read as a float weight and stored as codes and scale."""
        name, _, tensor = param_name.rpartition(".")
        module = model.get_submodule(name)
        return not self.pre_quantized and isinstance(module, QUANTIZED) and f"{tensor}_scale" in module.stored()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype that a tensor of a folder is cast to; None for codes, also in modules that stay in FP32."""
        lazy = hasattr(param, "get_dtype")  # a tensor of a safetensors file
        is_codes = param.get_dtype().startswith(("F8", "I8")) if lazy else param.dtype.itemsize == 1
        return None if is_codes else dtype

    def get_quantize_ops(self) -> QuantizeOnLoad:
        """The operation that quantizes a weight as it is read."""
        return QuantizeOnLoad()

    def get_weight_conversions(self) -> list[Any]:
        """None: folders store what the modules hold."""
        return []

    def is_serializable(self) -> bool:
        """True: `save_pretrained` writes codes and scales."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters on quantized layers get gradients; quantized weights do not."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: the operators have fake implementations."""
        return True


def used_schemes(schemes: LayerSchemes) -> list[str]:
    """The schemes of a configuration, as text, each once."""
    return [text for text in dict.fromkeys((schemes.scheme, *schemes.overrides.values())) if text is not None]


def check_version(version: str) -> None:
    """Raises QCompilerError for a transformers whose weight conversions lack what `QuantizeOnLoad` needs."""
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        need = ".".join(map(str, OLDEST))
        raise QCompilerError(
            "quantizing while a model loads needs a newer transformers", got=version, need=f"{need} or newer",
            fix="Load a folder that save_checkpoint wrote, which this version can, or update transformers.",
        )  # fmt: skip


def check_no_calibration(text: str, spec: QuantizationSpec) -> None:
    """Raises PassError if a scheme needs calibration data."""
    if spec.needs_calibration:
        problem = f"the scheme '{text}' needs calibration data, which from_pretrained does not have"
        raise PassError(problem, fix=CALIBRATE)


def check_not_split(config: Any) -> None:
    """Raises PassError if transformers would split the layers of a model over several GPUs."""
    distributed = getattr(config, "distributed_config", None)
    plan, size = (getattr(distributed, name, None) for name in ("tp_plan", "tp_size"))
    if plan is not None or (size is not None and size > 1):
        raise PassError(
            "transformers' tensor parallelism splits layers, and these run whole",
            got=f"tp_plan={plan!r}, tp_size={size!r}",
            need="whole layers on each GPU",
            fix="Load without tp_plan; a device_map places layers on several GPUs, and vLLM splits them.",
        )


def check_runs(text: str, spec: QuantizationSpec, target: Target) -> None:
    """Raises CodegenError if no kernel of a target runs a scheme."""
    if why := target.why_not(spec.x, spec.w):
        raise CodegenError(f"the scheme '{text}' does not run on {target.name}: {why}")


def devices(device_map: Any) -> list[torch.device]:
    """The devices that a `device_map` names; without the GPUs that torch does not find, which transformers reports."""
    named = device_map.values() if isinstance(device_map, dict) else [device_map]
    found = {torch.device("cuda", each) if isinstance(each, int) else each for each in named}
    known = ("auto", "balanced", "balanced_low_0", "sequential", "disk", None)
    all_named = [torch.device(each) for each in found if each not in known]
    return [device for device in all_named if device.type != CUDA or torch.cuda.is_available()]


def like(layer: Any, scheme: str, prescaled: bool) -> QuantizedLinear | QuantizedExperts:
    """A quantized layer in place of an `nn.Linear` or of stacked experts, without data."""
    made: QuantizedLinear | QuantizedExperts
    if not isinstance(layer, nn.Linear):
        made = QuantizedExperts(layer, scheme, device=torch.device("meta"))
        setattr(made, INITIALIZED, True)
        return made
    sizes = layer.in_features, layer.out_features, layer.bias is not None
    made = QuantizedLinear(*sizes, scheme, prescaled=prescaled, device=torch.device("meta"), dtype=layer.weight.dtype)
    setattr(made, INITIALIZED, True)  # transformers cannot initialize codes that a folder lacks
    return made


def named(scheme: str, decisions: Decisions) -> LayerSchemes:
    """The same decisions as a configuration whose overrides name layers."""
    others = {layer: text for layer, text in decisions.schemes.items() if text != scheme}
    return LayerSchemes(scheme, {**dict.fromkeys(sorted(decisions.skipped)), **others})


register_quantization_config(METHOD)(QCompilerConfig)
register_quantizer(METHOD)(QCompilerQuantizer)
