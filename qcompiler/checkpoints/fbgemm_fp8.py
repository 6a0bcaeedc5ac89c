"""FP8 by output channel as fbgemm and transformers' FbgemmFp8 write it: `quant_method: fbgemm_fp8`.

    model.layers.0.mlp.up_proj.weight          F8_E4M3 [N, K]
    model.layers.0.mlp.up_proj.weight_scale    F32 [N, 1]

Activations are quantized per token in each call. `activation_scale_ub` bounds the magnitude that their scale covers,
1200 in published files; the bound is not applied here.
"""

from collections.abc import Mapping
from typing import Any

from qcompiler.checkpoints.companions import fp8_weights, scale_beside
from qcompiler.checkpoints.config_keys import ANY, check_keys
from qcompiler.checkpoints.files import TensorFiles
from qcompiler.checkpoints.quantized_weight import StoredAs
from qcompiler.numerics import ALL

METHOD = "fbgemm_fp8"
BOUND = "activation_scale_ub"

KEYS = {"quant_method": ANY, BOUND: ANY, "modules_to_not_convert": ANY, "dequantize": ANY, "version": ANY}
"""Which keys transformers writes; the tensors tell what is converted."""


def stored_weights(said: Mapping[str, Any], tensors: TensorFiles) -> dict[str, StoredAs]:
    """The quantized weights of a folder: each FP8 weight, with the scale beside it.

    Raises:
        QCompilerError: The configuration has a key that is not known.
    """
    check_keys(said, KEYS, "the quantization configuration")
    return {name: StoredAs(scale_beside(name, tensors, ("_scale",)), (1, ALL)) for name in fp8_weights(tensors)}


def notes(said: Mapping[str, Any]) -> list[str]:
    """What the report says of the configuration."""
    bound = said.get(BOUND)
    return [] if bound is None else [f"the checkpoint bounds activation scales ({BOUND} {bound}): not applied"]
