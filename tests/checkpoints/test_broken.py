"""Checkpoints that are broken or malicious: an error of ours that names the file and the tensor, and nothing else."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qcompiler import QCompilerError, numerics
from qcompiler.checkpoints import read
from qcompiler.checkpoints.folders import INDEX

BLOCKED = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GROUP: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": GROUP}}


def folder(path: Path, said: dict[str, Any], *, sharded: bool = False) -> Path:
    """A small checkpoint of one FP8 weight and a norm."""
    path.mkdir(exist_ok=True)
    blocks = said["quant_method"] == "fp8"
    codes, scale = numerics.quantize(torch.randn(200, 256), numerics.format_of((128, 128) if blocks else (1, -1)))
    tensors = {
        "up.weight": codes,
        "up.weight_scale_inv" if blocks else "up.weight_scale": scale,
        "norm.weight": torch.ones(4),
    }
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": said}))
    if not sharded:
        save_file(tensors, path / "model.safetensors")
        return path
    places = {name: f"model-{index}.safetensors" for index, name in enumerate(tensors)}
    for name, file in places.items():
        save_file({name: tensors[name]}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def change_said(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(changes)
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("said", [BLOCKED, COMPRESSED], ids=["fp8", "compressed-tensors"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_whole_one_is_read(tmp_path: Path, said: dict[str, Any], sharded: bool) -> None:
    found = read(folder(tmp_path, said, sharded=sharded))
    assert {*found.stored} == {"up.weight"} and found.method == said["quant_method"]
    assert found.quantized("up.weight").dequantized().shape == (200, 256)
    assert found.tensors.shape("norm.weight") == (4,) and len(found.tensors) == 3


def test_a_target_may_be_the_name_of_one_module_beside_a_class(tmp_path: Path) -> None:
    tensor = {**GROUP, "weights": {**GROUP["weights"], "strategy": "tensor"}, "targets": ["norm"]}
    said = {**COMPRESSED, "config_groups": {"group_0": tensor, "group_1": GROUP}}
    assert read(folder(tmp_path, said)).stored["up.weight"].format.block == (1, -1)


def test_a_pattern_that_would_take_years_is_an_error(tmp_path: Path) -> None:
    said = {**COMPRESSED, "config_groups": {"g": {**GROUP, "targets": ["re:(?:a|aa)+$"]}}}
    path = folder(tmp_path, said)
    change_tensors(path, lambda found: [found.update({f"{'a' * 90}b.{key[3:]}": found.pop(key)}) for key in [*found]
                                        if key.startswith("up.")])  # fmt: skip
    with pytest.raises(QCompilerError, match="takes too long to match a name"):
        read(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("up.weight_scale_inv"), ["no scale: 'up.weight'", "up.weight_scale_inv"]),
        (lambda tensors: tensors.pop("up.weight"), ["has no FP8 weight: 'up.weight_scale_inv'", "nothing"]),
        (lambda tensors: tensors.update({"up.weight_scale_inv": torch.ones(2, 3)}), ["got [2, 3]; need [2, 2]"]),
        (lambda tensors: tensors.update({"up.weight_scale_inv": torch.ones(4)}), ["got [4]; need [2, 2]"]),
        (lambda tensors: tensors.update({"up.weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)}), ["torch.int32"]),
        (lambda tensors: tensors.update({"up.weight": torch.ones(200, 256)}), ["float32", "FP8 in 'up.weight'"]),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: Callable[[Any], Any], words: list[str]) -> None:
    path = folder(tmp_path, BLOCKED)
    change_tensors(path, change)
    with pytest.raises(QCompilerError) as error:
        read(path)
    assert all(word in str(error.value) for word in (*words, str(path))), error.value


@pytest.mark.parametrize(
    ("said", "changes", "words"),
    [
        (BLOCKED, {"quant_method": "fpp8"}, ["quant_method 'fpp8'", "Did you mean 'fp8'?"]),
        (BLOCKED, {"quant_method": None}, ["quant_method None"]),
        (BLOCKED, {"activation_scheme": "fixed"}, ["unknown activation scheme", "'fixed'"]),
        (BLOCKED, {"weight_block_size": [128, 0]}, ["weight_block_size", "[128, 0]"]),
        (BLOCKED, {"weight_block_size": None}, ["need [1, 1]"]),
        (BLOCKED, {"weight_block_size": [64, 64]}, ["got [2, 2]; need [4, 4]"]),
        (COMPRESSED, {"format": "pack-quantized"}, ["unknown format", "'pack-quantized'"]),
        (COMPRESSED, {"config_groups": []}, ["config_groups"]),
        (COMPRESSED, {"config_groups": {"g": {"targets": ["Linear"]}}}, ["group 'g' is malformed"]),
        (COMPRESSED, {"config_groups": {"g": {**GROUP, "targets": ["re:("]}}}, ["not a regular expression"]),
        (COMPRESSED, {"config_groups": {"g": {**GROUP, "targets": ["a.b"]}}}, ["which group 'up'"]),
        (COMPRESSED, {"config_groups": {"g": {**GROUP, "weights": {"strategy": "group", "type": "float"}}}},
         ["strategy", "'group'"]),
        (COMPRESSED, {"config_groups": {"g": {**GROUP, "weights": {**GROUP["weights"], "num_bits": 4}}}}, ["4 bits"]),
        (COMPRESSED, {"config_groups": {"g": {**GROUP, "input_activations": {"dynamic": False, "strategy": "token"}}}},
         ["unsupported scales", "'token'"]),
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit(
    tmp_path: Path, said: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    path = folder(tmp_path, said)
    change_said(path, **changes)
    with pytest.raises(QCompilerError) as error:
        read(path)
    assert all(word in str(error.value) for word in (*words, str(tmp_path))), error.value


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "C:\\x", 5, None]
)
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, name: Any) -> None:
    path = folder(tmp_path / "checkpoint", BLOCKED, sharded=True)
    save_file({"up.weight": torch.ones(1)}, tmp_path / "secret.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"up.weight": name}}))
    with pytest.raises(QCompilerError, match="leads out of the folder"):
        read(path)


def test_files_that_are_missing_or_cut_off(tmp_path: Path) -> None:
    path = folder(tmp_path, BLOCKED, sharded=True)
    whole = (path / "model-0.safetensors").read_bytes()
    (path / "model-0.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(QCompilerError, match=r"not in safetensors format.*model-0"):
        read(path)
    (path / "model-0.safetensors").unlink()
    with pytest.raises(QCompilerError, match=r"missing.*model-0\.safetensors"):
        read(path)
    save_file({"other": torch.ones(1)}, path / "model-0.safetensors")
    with pytest.raises(QCompilerError, match=r"not in its file: got up\.weight"):
        read(path)
    with pytest.raises(QCompilerError, match="no such folder"):
        read(path / "nowhere")
    (path / "empty").mkdir()
    with pytest.raises(QCompilerError, match="holds no checkpoint"):
        read(path / "empty")
    (path / "config.json").write_text("[" * 100_000)
    save_file({"up.weight": torch.ones(1)}, path / "model-0.safetensors")
    with pytest.raises(QCompilerError, match="as JSON"):
        read(path)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    top = tmp_path_factory.mktemp("originals")
    return [
        folder(top / f"{said['quant_method']}{sharded}", said, sharded=sharded)
        for said in (BLOCKED, COMPRESSED)
        for sharded in (False, True)
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=100)
@given(data=st.data())
def test_whatever_a_configuration_says_the_error_is_ours(originals: list[Path], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(originals))
    file = path / data.draw(st.sampled_from([f for f in ("config.json", INDEX) if (path / f).exists()]))
    before = file.read_text()
    document = here = json.loads(before)
    while True:  # down to some leaf, or to something on the way
        key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        if not isinstance(here[key], dict | list) or not here[key] or data.draw(st.booleans()):
            break
        here = here[key]
    here[key] = data.draw(JSON)
    file.write_text(json.dumps(document))
    try:
        with contextlib.suppress(QCompilerError):
            read(path)
    finally:
        file.write_text(before)


@settings(max_examples=150)
@given(data=st.data())
def test_whatever_happens_to_the_bytes_the_error_is_ours(originals: list[Path], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(originals))
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    before = file.read_bytes()
    place = data.draw(st.integers(0, min(len(before), 2000)))
    cut = data.draw(st.integers(0, 8))
    file.write_bytes(before[:place] + data.draw(st.binary(max_size=8)) + before[place + cut :])
    try:
        with contextlib.suppress(QCompilerError):
            found = read(path)
            for name in found.stored:
                found.quantized(name).dequantized()
            for name in found.tensors:
                found.tensors[name]
    finally:
        file.write_bytes(before)
