"""qcompiler's own format, which stores the result of any scheme: `quant_method: qcompiler`.

    model.layers.0.mlp.up_proj.weight          F8_E4M3, F8_E5M2 or I8 [N, K]
    model.layers.0.mlp.up_proj.weight_scale    F32 [ceil(N / 128), ceil(K / 128)], [N, 1] or [1, 1]
    model.layers.0.mlp.up_proj.input_scale     F32 [1], if the activation has a static scale
    model.layers.0.mlp.up_proj.input_prescale  F32 [K], if smoothing multiplies the activation before it is quantized

`layer_schemes` describes the configuration. Unlike other formats it also stores how activations are quantized in each
layer, so that transformers and vLLM, with qcompiler's plug-ins, compute what the compiled model computes.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompiler.checkpoints.companions import stem, x_scale_beside
from qcompiler.checkpoints.files import TensorFiles
from qcompiler.checkpoints.format import CheckpointFormat, register
from qcompiler.checkpoints.layer_schemes import METHOD, PRESCALE, SCALE, X_SCALE, LayerSchemes
from qcompiler.checkpoints.quantized_weight import QuantizedWeight, StoredAs
from qcompiler.errors import QCompilerError
from qcompiler.ir import Format
from qcompiler.numerics import torch_dtype
from qcompiler.schemes.quantized_formats import Formats
from qcompiler.schemes.stored import DYNAMIC, STATIC


class Own:
    """The result of any scheme."""

    fix = "Choose a named scheme for these layers, or leave them in float: overrides={pattern: None}."
    readers: tuple[str, ...] = ()  # only through our plug-ins

    def why_not(self, weight: QuantizedWeight) -> str | None:
        """The reason why this format cannot store a quantized weight; None if it can."""
        return (
            None if _scheme(weight) is not None else f"no scheme has its formats, {weight.x_format} x {weight.format}"
        )

    def why_unread(self, weight: QuantizedWeight) -> str | None:
        """None: our plug-ins read partial blocks."""

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Codes and scales by their names in the file."""
        found = {name: weight.codes, stem(name) + SCALE: weight.scale}
        found |= {} if weight.x_scale is None else {stem(name) + X_SCALE: weight.x_scale.reshape(1)}
        return found | ({} if weight.prescale is None else {stem(name) + PRESCALE: weight.prescale})

    def config(self, weights: Mapping[str, QuantizedWeight], unconverted: Collection[str]) -> dict[str, Any]:
        """The `quantization_config`: the most frequent scheme, and each layer that has another one or none."""
        schemes = {name.removesuffix(".weight"): str(_scheme(weight)) for name, weight in weights.items()}
        usual = Counter(schemes.values()).most_common(1)[0][0]
        others = {name: scheme for name, scheme in sorted(schemes.items()) if scheme != usual}
        prescaled = {name.removesuffix(".weight") for name, weight in weights.items() if weight.prescale is not None}
        return LayerSchemes(usual, {**dict.fromkeys(sorted(unconverted)), **others}, prescaled).config()


def _scheme(weight: QuantizedWeight) -> str | None:
    """The scheme of a weight, as text; None if no scheme has its formats."""
    if weight.x_format is None:  # the graph only dequantizes it
        return (DYNAMIC if weight.x_scale is None else STATIC).get(weight.format)
    format = replace(weight.format, profile=weight.x_format.profile)
    x_format = replace(weight.x_format, scale_layout="row_major")
    return Formats(x_format, format, weight.x_scale is not None).scheme


def stored_weights(said: Mapping[str, Any], tensors: TensorFiles) -> dict[str, StoredAs]:
    """The quantized weights of a folder: each weight with a scale.

    Args:
        said: The `quantization_config`.
        tensors: The tensors of the folder.

    Raises:
        QCompilerError: The configuration is malformed or of a newer version, or it and the tensors disagree.
    """
    schemes = LayerSchemes.read(said)
    weights = {stem(name) + SCALE: name for name in tensors}
    found: dict[str, StoredAs] = {}
    for scale in tensors:
        if not scale.endswith(SCALE):
            continue
        if (name := weights.get(scale)) is None:
            raise QCompilerError(f"a scale has no weight: '{scale}'", need=f"'{scale.removesuffix('_scale')}'")
        spec = schemes.spec(name.removesuffix(".weight"))
        if spec is None:
            raise QCompilerError(f"a layer in float has a scale: '{scale}'", need="a scheme for it in 'overrides'")
        _check_codes(name, tensors, spec.w)
        x_scale = x_scale_beside(name, tensors) if spec.static else None
        prescale = _prescale_beside(name, tensors, schemes)
        found[name] = StoredAs(scale, replace(spec.w, profile=Format.profile), x_scale, prescale=prescale)
    return found


def _prescale_beside(weight: str, tensors: TensorFiles, schemes: LayerSchemes) -> str | None:
    """The name of a weight's factors of the input channels, if the configuration declares them.

    Raises:
        QCompilerError: The configuration and the tensors disagree, or the factors are not K positive FP32 numbers.
    """
    name, declared = stem(weight) + PRESCALE, weight.removesuffix(".weight") in schemes.prescaled
    if declared is not (name in tensors):
        got, need = ("it is missing", "the tensor") if declared else ("no entry for it", "its layer in 'prescaled'")
        raise QCompilerError(f"the configuration and the tensors disagree about '{name}'", got=got, need=need)
    if not declared:
        return None
    pairs = (tensors.dtype(name), tensors.shape(name)), (torch.float32, tensors.shape(weight)[-1:])
    if pairs[0] != pairs[1]:
        kinds = [f"{str(dtype).removeprefix('torch.')}{list(shape)}" for dtype, shape in pairs]
        raise QCompilerError("factors of input channels do not fit their weight", got=kinds[0], need=kinds[1],
                             where=f"{tensors.folder}: {name}")  # fmt: skip
    factors = tensors[name]
    if not bool((factors.isfinite() & (factors > 0)).all()):
        need = "positive finite numbers"
        raise QCompilerError("factors of input channels are not valid", need=need, where=f"{tensors.folder}: {name}")
    return name


def _check_codes(name: str, tensors: TensorFiles, format: Format) -> None:
    """Raises QCompilerError if codes have another dtype than their scheme."""
    dtypes = tensors.dtype(name), torch_dtype(format.element)
    if dtypes[0] is not dtypes[1]:
        got, need = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise QCompilerError(f"the codes of '{name}' have another type than its scheme", got=got, need=need)


register(CheckpointFormat(METHOD, read=stored_weights, writer=lambda _: Own(), schemes=LayerSchemes.read,
                          prescales=True))  # fmt: skip
