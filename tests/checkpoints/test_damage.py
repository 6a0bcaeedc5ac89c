"""What a checkpoint's folder may not hold is refused with a sentence that names the file, and nothing else happens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qcompiler.checkpoints import read
from qcompiler.checkpoints.quantized_weight import not_finite
from qcompiler.errors import QCompilerError

GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}


def compressed(**changes: Any) -> dict[str, Any]:
    group = {**GROUP, "weights": {**GROUP["weights"], **changes.pop("weights", {})}, **changes}  # type: ignore[dict-item]
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": group}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights = {"up.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), "up.weight_scale": torch.ones(4, 1)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": compressed()}))
    return tmp_path


def test_it_is_read_as_it_is(folder: Path) -> None:
    assert list(read(folder).stored) == ["up.weight"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": ["fp8"]}, r"an unknown kind of quantization: got quant_method \['fp8'\]"),
        (compressed(weights={"type": ["float"]}), "the group 'g' has unsupported weights"),
        (compressed(weights={"strategy": {}}), "the weights of group 'g' have an unknown strategy: got {}"),
        (compressed(targets=["re:("]), r"a target is not a regular expression: got 're:\(': missing \)"),
        (compressed(targets=["re:a{99999999999}"]), "a target is not a regular expression: .* too big"),
    ],
)
def test_a_wrong_kind_of_value_in_the_configuration(folder: Path, said: dict[str, Any], message: str) -> None:
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    with pytest.raises(QCompilerError, match=message):
        read(folder)


@pytest.mark.parametrize("text", ["[" * 99999, '{"a": ' + "1" * 9999 + "}", "[]", '"\xff'])
def test_a_configuration_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    words = r"a file (cannot be read as JSON|does not hold a JSON object): .*config\.json"
    with pytest.raises(QCompilerError, match=words):
        read(folder)


def test_an_index_with_a_name_that_no_file_can_have(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"up.weight": "x" * 300}}))
    with pytest.raises(QCompilerError, match="File name too long"):
        read(folder)


@pytest.mark.parametrize(
    ("dtype", "bits", "number"),
    [
        (torch.float8_e4m3fn, 0x7F, "nan"), (torch.float8_e4m3fn, 0xFF, "nan"), (torch.float8_e5m2, 0x7E, "nan"),
        (torch.float8_e5m2, 0xFD, "nan"), (torch.float8_e5m2, 0x7C, "inf"), (torch.float8_e5m2, 0xFC, "-inf"),
    ],
)  # fmt: skip
def test_a_code_that_is_not_a_number(folder: Path, dtype: torch.dtype, bits: int, number: str) -> None:
    codes = torch.arange(64, dtype=torch.uint8).reshape(8, 8)
    codes[5, 3] = bits
    config = {"quant_method": "fp8", "weight_block_size": None}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file({"up.weight": codes.view(dtype), "up.weight_scale": torch.ones(1)}, folder / "model.safetensors")
    found = read(folder)
    with pytest.raises(QCompilerError) as error:
        found.quantized("up.weight")
    assert f"a code of a quantized weight is not a number: got {number} at [5, 3]; need finite codes" in str(
        error.value
    )
    assert f"{folder / 'model.safetensors'}: up.weight" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_all_finite_codes_are_read(folder: Path, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert not_finite(codes[codes.float().isfinite()].reshape(1, -1)) is None
