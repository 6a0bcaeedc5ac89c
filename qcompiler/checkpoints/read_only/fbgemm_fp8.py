"""FP8 per output channel, as fbgemm and transformers' FbgemmFp8 write it: `quant_method: fbgemm_fp8`.

    model.layers.0.mlp.up_proj.weight          F8_E4M3 [N, K]
    model.layers.0.mlp.up_proj.weight_scale    F32 [N, 1]

Activations are quantized per token in each call. `activation_scale_ub` (1200 in published files) bounds the magnitude
that an activation scale covers; qcompiler does not apply the bound.
"""

from collections.abc import Mapping
from typing import Any

from qcompiler.checkpoints.companions import fp8_weights, scale_beside
from qcompiler.checkpoints.config_keys import ANY, check_keys
from qcompiler.checkpoints.files import TensorFiles
from qcompiler.checkpoints.format import CheckpointFormat, register
from qcompiler.checkpoints.quantized_weight import StoredAs
from qcompiler.ir.formats import FP8_ROW

METHOD = "fbgemm_fp8"
BOUND = "activation_scale_ub"

KEYS = {"quant_method": ANY, BOUND: ANY, "modules_to_not_convert": ANY, "dequantize": ANY, "version": ANY}
"""Keys that transformers writes; the tensors show which layers are quantized."""


def stored_weights(said: Mapping[str, Any], tensors: TensorFiles) -> dict[str, StoredAs]:
    """The quantized weights of a folder: each FP8 weight and its scale.

    Raises:
        QCompilerError: The configuration has an unknown key.
    """
    check_keys(said, KEYS, "the quantization configuration")
    return {name: StoredAs(scale_beside(name, tensors, ("_scale",)), FP8_ROW) for name in fp8_weights(tensors)}


def notes(said: Mapping[str, Any]) -> list[str]:
    """Report notes about the configuration."""
    bound = said.get(BOUND)
    return [] if bound is None else [f"the checkpoint bounds activation scales ({BOUND} {bound}): not applied"]


register(CheckpointFormat(METHOD, read=stored_weights, notes=notes))
