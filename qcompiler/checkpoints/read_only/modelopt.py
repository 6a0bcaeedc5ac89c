"""The FP8 formats of NVIDIA's ModelOpt: `quant_method: modelopt`, in `config.json` or in `hf_quant_config.json`.

model.layers.0.mlp.up_proj.weight          F8_E4M3 [N, K]
model.layers.0.mlp.up_proj.weight_scale    F32 [], for FP8_PER_CHANNEL_PER_TOKEN [N]
model.layers.0.mlp.up_proj.input_scale     F32 [], for FP8

hf_quant_config.json    {"producer": {...}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"], ...}}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompiler.checkpoints.companions import fp8_weights, scale_beside, x_scale_beside, zero_points_beside
from qcompiler.checkpoints.config_keys import ANY, check_keys, one_of
from qcompiler.checkpoints.files import TensorFiles, read_json
from qcompiler.checkpoints.folders import CONFIG
from qcompiler.checkpoints.format import CheckpointFormat, register
from qcompiler.checkpoints.group_keys import check_group
from qcompiler.checkpoints.quantized_weight import StoredAs
from qcompiler.errors import QCompilerError, did_you_mean
from qcompiler.numerics import ALL, format_of

METHOD = "modelopt"
FILE = "hf_quant_config.json"

ALGORITHMS = {
    "FP8": ((ALL, ALL), True),
    "FP8_PER_CHANNEL_PER_TOKEN": ((1, ALL), False),
    "FP8_PB_WO": ((128, 128), False),
}
"""`quant_algo` -> block of a weight's scale, and whether activations have static scales."""

CACHE_ALGORITHM = "kv_cache_quant_algo"
CACHE_SCHEMES: dict[str, dict[str, Any]] = {
    "FP8": {"num_bits": 8, "type": "float", "dynamic": False},
    "INT8": {"num_bits": 8, "type": "int", "dynamic": False},
}
"""`kv_cache_quant_algo` -> the equivalent `kv_cache_scheme`."""

KEYS = {
    "quant_method": ANY, "quant_algo": ANY, "config_groups": ANY, "kv_cache_scheme": ANY, CACHE_ALGORITHM: ANY,  # read
    "group_size": one_of(128), "has_zero_point": one_of(False), "pre_quant_scale": one_of(False),
    "ignore": ANY, "exclude_modules": ANY, "producer": ANY, "quant_library": ANY, "packed_modules_mapping": ANY,
}  # fmt: skip
"""Keys that ModelOpt writes for FP8. A `pre_quant_scale` multiplies activations, as AWQ does."""

FILE_KEYS = {"producer": ANY, "quantization": ANY}


def separate(folder: Path, said: Mapping[str, Any] | None) -> tuple[dict[str, Any], str] | None:
    """The configuration in `hf_quant_config.json`, and its path; None if it adds nothing to `config.json`.

    Raises:
        QCompilerError: The file is not the JSON that ModelOpt writes, or it differs from `config.json`.
    """
    if (found := _separate(folder)) is None:
        return None
    if said is not None and said.get("quant_algo") != found.get("quant_algo"):
        got = f"quant_algo {said.get('quant_algo')!r}, and {found.get('quant_algo')!r} in {FILE}"
        raise QCompilerError(
            "two quantization configurations differ", got=got, where=str(folder / CONFIG), fix="Remove the wrong one."
        )
    return (found, str(folder / FILE)) if said is None else None


def _separate(folder: Path) -> dict[str, Any] | None:
    """`hf_quant_config.json` with the keys of a `quantization_config`; None if it declares nothing."""
    path = folder / FILE
    if not path.is_file() or (said := (document := read_json(path)).get("quantization")) is None:
        return None
    check_keys(document, FILE_KEYS, str(path))
    if not isinstance(said, dict):
        raise QCompilerError("'quantization' is not a JSON object", got=type(said).__name__, where=str(path))
    cache = said.get(CACHE_ALGORITHM)
    scheme = CACHE_SCHEMES.get(str(cache), {CACHE_ALGORITHM: cache}) if cache else None
    return {"kv_cache_scheme": scheme, **said, "quant_method": METHOD}


def stored_weights(said: Mapping[str, Any], tensors: TensorFiles) -> dict[str, StoredAs]:
    """The quantized weights of a folder: each FP8 weight and its scales.

    Raises:
        QCompilerError: The algorithm is not supported, or an activation scale or a zero point is invalid.
    """
    algorithm = said.get("quant_algo")
    if algorithm is None and (said.get("kv_cache_scheme") or said.get(CACHE_ALGORITHM)):
        _check_keys(said)
        return {}  # only the cache is quantized
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        fix = did_you_mean(str(algorithm), ALGORITHMS)
        raise QCompilerError(
            "an unsupported quantization of ModelOpt",
            got=f"quant_algo {algorithm!r}",
            need=" or ".join(ALGORITHMS),
            fix=fix,
        )
    _check_keys(said)
    block, static = ALGORITHMS[algorithm]
    return {
        name: StoredAs(
            scale_beside(name, tensors, ("_scale",)),
            format_of(block, tensors.dtype(name)),
            x_scale_beside(name, tensors) if static else None,
            zero_points_beside(name, tensors),
        )
        for name in fp8_weights(tensors)
    }


def is_float(said: Mapping[str, Any]) -> bool:
    """Whether a valid configuration quantizes only the cache, not weights."""
    return said.get("quant_algo") is None


def _check_keys(said: Mapping[str, Any]) -> None:
    """Raises QCompilerError for a key of the configuration or its groups that is unknown or has a wrong value."""
    check_keys(said, KEYS, "the quantization configuration")
    groups = said.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise QCompilerError("'config_groups' is not a JSON object with groups", got=repr(groups))
    for name, group in groups.items():
        check_group(name, group)


register(CheckpointFormat(METHOD, read=stored_weights, is_float=is_float, separate=separate, files=(FILE,)))
