"""Keys and values that a config group of compressed-tensors or ModelOpt may have.

"group_0": {"targets": ["Linear"], "weights": {...}, "input_activations": {...}, "output_activations": {...}}
"""

from collections.abc import Mapping
from typing import Any

from qcompiler.checkpoints.config_keys import ANY, check_keys, one_of

FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "mixed-precision")

GROUP_KEYS = {
    "targets": ANY, "weights": ANY, "input_activations": ANY, "output_activations": ANY, "format": one_of(*FORMATS),
}  # fmt: skip

NUMBERS = {"num_bits": ANY, "type": ANY, "strategy": ANY, "dynamic": ANY, "block_structure": ANY, "symmetric": ANY,
           "scale_dtype": ANY, "zp_dtype": ANY, "observer": ANY, "observer_kwargs": ANY}  # fmt: skip
WEIGHT_KEYS = {**NUMBERS, "group_size": one_of(-1), "actorder": one_of(False, "weight", "static")}
"""A `group_size` of -1 means the whole channel; these GPTQ orders keep the columns in place."""

INPUT_KEYS = {**NUMBERS, "group_size": ANY, "num_bits": one_of(8), "symmetric": one_of(True), "actorder": one_of(False)}
"""The scheme that compiles the model chooses the granularity of dynamic activation scales."""

STATIC_INPUT_KEYS = {**INPUT_KEYS, "symmetric": ANY}
"""Zero points of static scales are in the files and are checked when read."""

OUTPUT_KEYS = {**NUMBERS, "group_size": ANY, "actorder": ANY}
"""qcompiler does not quantize outputs, so it accepts any value."""


def check_group(name: str, said: Mapping[str, Any]) -> None:
    """Raises QCompilerError for a group key that is unknown or has an unsupported value."""
    check_keys(said, GROUP_KEYS, f"the group '{name}'")
    inputs = said.get("input_activations")
    static = isinstance(inputs, dict) and inputs.get("dynamic", False) is False
    for key, known, what in (
        ("weights", WEIGHT_KEYS, "weights"),
        ("input_activations", STATIC_INPUT_KEYS if static else INPUT_KEYS, "activations"),
        ("output_activations", OUTPUT_KEYS, "outputs"),
    ):
        if isinstance(part := said.get(key), dict):
            check_keys(part, known, f"the {what} of group '{name}'")
