"""The keys of a quantization configuration: those that published checkpoints have are read, all others are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qcompiler.checkpoints import read
from qcompiler.checkpoints.compressed_groups import KEYS
from qcompiler.checkpoints.config_keys import check_keys
from qcompiler.checkpoints.group_keys import GROUP_KEYS, WEIGHT_KEYS
from qcompiler.errors import QCompilerError

BLOCKED = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
FIXED = {"num_bits": 8, "type": "float", "dynamic": False}
MODELOPT: dict[str, Any] = {
    "quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"input_activations": {**FIXED, "dynamic": True}, "weights": FIXED}},
    "kv_cache_scheme": FIXED, "producer": {"name": "modelopt", "version": "0.29.0"}, "pre_quant_scale": False,
}  # fmt: skip


def compressed(**group: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    weights |= group.pop("weights", {})
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"g": {"targets": ["Linear"], "weights": weights, **group}},
    }


def with_empty_group(**group: Any) -> dict[str, Any]:
    """A second group, which quantizes no weights."""
    said = compressed()
    said["config_groups"]["h"] = {"targets": ["up"], "weights": None, **group}
    return said


def folder(path: Path, said: dict[str, Any]) -> Path:
    """A checkpoint of one weight."""
    blocks = said["quant_method"] == "fp8"
    scale = {"up.weight_scale_inv": torch.ones(1, 1)} if blocks else {"up.weight_scale": torch.ones(4, 1)}
    save_file({"up.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), **scale}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": said}))
    return path


FINE = [
    BLOCKED
    | {"modules_to_not_convert": ["lm_head"], "fmt": "float8_e4m3fn", "scale_fmt": "ue8m0", "dequantize": False},
    FBGEMM,
    MODELOPT,
    MODELOPT | {"kv_cache_quant_algo": "FP8", "group_size": None, "exclude_modules": ["lm_head"]},
    BLOCKED | {"ignored_layers": ["lm_head"], "kv_cache_scheme": None, "quantization_version": 2, "unknown": None},
]


@pytest.mark.parametrize("said", FINE)
def test_published_keys_are_known(tmp_path: Path, said: dict[str, Any]) -> None:
    assert [*read(folder(tmp_path, said)).stored] == ["up.weight"]


def test_keys_that_compressed_tensors_writes_are_known(tmp_path: Path) -> None:
    none: dict[str, Any] = dict.fromkeys(("actorder", "block_structure", "group_size", "observer_kwargs"))
    none |= {"observer": "minmax", "observer_kwargs": {}}
    activations = {**none, "num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    said = compressed(weights=none | {"actorder": "static"}, input_activations=activations, output_activations=None)
    said |= {
        "quantization_status": "frozen", "global_compression_ratio": 1.5, "version": "0.9.1", "kv_cache_scheme": None,
        "sparsity_config": {"format": "dense", "sparsity_structure": "unstructured"}, "transform_config": {},
    }  # fmt: skip
    assert [*read(folder(tmp_path, said)).stored] == ["up.weight"]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (BLOCKED | {"rotation": "quarot"}, "the key 'rotation' is not known: got 'quarot'"),
        (BLOCKED | {"sym": False}, "the key 'sym' is not known: got False"),
        (BLOCKED | {"scale_fmt": "log2"}, "'scale_fmt' has a value that is not supported: got 'log2'; need 'float' or"),
        (BLOCKED | {"expert_dtype": "fp4"}, "'expert_dtype' has a value that is not supported: got 'fp4'"),
        (BLOCKED | {"activation_schema": "x"}, "Did you mean 'activation_scheme'?"),
        (compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparsity_config' has a value"),
        (compressed() | {"transform_config": {"config_groups": {"R4": {}}}}, "'transform_config' has a value"),
        (compressed(weights={"actorder": "group"}), "the weights of group 'g': 'actorder' has a value"),
        (compressed(weights={"actorder": True}), "'actorder' has a value that is not supported: got True"),
        (compressed(weights={"group_size": 32}), "'group_size' has a value that is not supported: got 32; need -1"),
        (compressed(weights={"permutation": [1]}), "the weights of group 'g': the key 'permutation' is not known"),
        (compressed(output_activations={"rotation": 1}), "the outputs of group 'g': the key 'rotation' is not known"),
        (compressed(input_activations=FIXED | {"transform": 1}), "the activations of group 'g': the key 'transform'"),
        (compressed(other={"dynamic": True}), "the group 'g': the key 'other' is not known"),
        (with_empty_group(clip=0.9), "the group 'h': the key 'clip' is not known: got 0.9"),
        (FBGEMM | {"rotation": "quarot"}, "the key 'rotation' is not known: got 'quarot'"),
        (MODELOPT | {"pre_quant_scale": True}, "'pre_quant_scale' has a value that is not supported: got True"),
        (MODELOPT | {"has_zero_point": True}, "'has_zero_point' has a value that is not supported: got True"),
        (MODELOPT | {"quantized_layers": {"up": {}}}, "the key 'quantized_layers' is not known"),
        (
            MODELOPT | {"config_groups": {"g": {"weights": {"group_size": 16}}}},
            "the weights of group 'g': 'group_size'",
        ),
        (MODELOPT | {"config_groups": [1]}, "'config_groups' is not a JSON object with groups"),
        (compressed(format="pack-quantized"), "the group 'g': 'format' has a value"),
        (compressed(input_activations={"dynamic": True, "symmetric": False}), "the activations of group 'g': 'symm"),
        (compressed(input_activations={"dynamic": True, "num_bits": 4}), "'num_bits' has a value"),
    ],
)
def test_keys_that_change_what_weights_mean(tmp_path: Path, said: dict[str, Any], words: str) -> None:
    with pytest.raises(QCompilerError) as error:
        read(folder(tmp_path, said))
    assert words in str(error.value) and "config.json" in str(error.value), error.value


@given(
    key=st.text(min_size=1, max_size=8) | st.sampled_from([*KEYS, *GROUP_KEYS]),
    value=st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=2),
)
def test_only_an_empty_value_of_an_unknown_key_is_passed_over(key: str, value: Any) -> None:
    if key in WEIGHT_KEYS or value is None or value == []:
        check_keys({key: value}, {key: WEIGHT_KEYS["num_bits"]}, "it")
        return
    with pytest.raises(QCompilerError, match="is not known"):
        check_keys({key: value}, WEIGHT_KEYS, "it")


def test_a_separate_file_of_modelopt(tmp_path: Path) -> None:
    path, file = folder(tmp_path, MODELOPT), tmp_path / "hf_quant_config.json"
    said: dict[str, Any] = {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "exclude_modules": ["lm_head"]}
    file.write_text(json.dumps({"producer": {}, "quantization": said}))
    assert [*read(path).stored] == ["up.weight"]
    file.write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(QCompilerError, match=r"configurations differ: got .*'FP8' in hf_quant_config\.json"):
        read(path)
    (path / "config.json").write_text("{}")
    file.write_text(json.dumps({"quantization": said | {"kv_cache_quant_algo": "FP8"}}))
    assert [*read(path).stored] == ["up.weight"] and read(path).cache.scheme == FIXED
    for document, words in (
        ({"quantization": said | {"rotation": 1}}, "the key 'rotation' is not known"),
        ({"quantization": said, "transforms": 1}, "the key 'transforms' is not known"),
        ({"quantization": "FP8"}, "'quantization' is not a JSON object"),
    ):
        file.write_text(json.dumps(document))
        with pytest.raises(QCompilerError, match=words) as error:
            read(path)
        assert str(file) in str(error.value)
