"""Stacked experts: equal to the compiler, in the files of each expert, and differentiable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers_models import AUTO, IDS, equal, load, logits_of, mixtral_config, qwen3_moe_config, saved

import qcompiler
from qcompiler import numerics
from qcompiler.transformers.experts import QuantizedExperts


@pytest.mark.parametrize("config", [mixtral_config, qwen3_moe_config])
def test_equals_the_compiler_and_its_files(tmp_path: Path, config: Callable[[], Any]) -> None:
    plain = saved(tmp_path / "plain", config())
    model = load(plain, "fp8_tile")
    assert model.qcompiler_report.quantized["model.layers.0.mlp.experts"] == "fp8_tile"
    assert model.qcompiler_report.skipped["model.layers.0.mlp.gate"].startswith("it is a router")
    original = AUTO.from_pretrained(plain)
    compiled = qcompiler.compile(original, scheme="fp8_tile", example_inputs=(IDS,), dynamic_shapes=None)
    assert torch.equal(logits_of(model), compiled(IDS).logits)

    model.save_pretrained(tmp_path / "one")
    compiled.save_checkpoint(tmp_path / "two", "qcompiler", model=original)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8)) for name in one)
    assert equal(load(tmp_path / "one"), model) and equal(load(tmp_path / "two"), model)


def test_files_with_experts_in_float(tmp_path: Path) -> None:
    original = AUTO.from_pretrained(saved(tmp_path / "plain", mixtral_config()))
    compiled = qcompiler.compile(original, ignore=["*.experts"], example_inputs=(IDS,), dynamic_shapes=None)
    compiled.save_checkpoint(tmp_path / "out", "qcompiler", model=original)
    model = load(tmp_path / "out")
    assert "model.layers.0.mlp.experts" in model.qcompiler_report.skipped
    assert torch.equal(logits_of(model), compiled(IDS).logits)


def test_experts_that_no_file_can_hold_stay_in_float(tmp_path: Path) -> None:
    report = load(saved(tmp_path, qwen3_moe_config(size=192)), "fp8_tile").qcompiler_report
    why = "an expert has 192 rows, not a multiple of 128, so it cannot be stored by itself"
    assert report.skipped["model.layers.0.mlp.experts"] == why and len(report.quantized) == 4


def test_the_gradient_goes_through_dequantized_weights(tmp_path: Path) -> None:
    model = load(saved(tmp_path, qwen3_moe_config()), "fp8_tile")
    layer: QuantizedExperts = model.get_submodule("model.layers.0.mlp.experts")
    x = torch.randn(6, 128, requires_grad=True)
    offsets = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    dy = torch.randn(6, 256)
    layer.multiply(x, "gate_up_proj", offsets).backward(dy)
    w = numerics.dequantize(layer.gate_up_proj, layer.gate_up_proj_scale, format=layer.w_format)  # type: ignore[arg-type]
    wanted = torch.stack([row @ w[expert] for row, expert in zip(dy, (0, 0, 2, 2, 2, 3), strict=True)])
    torch.testing.assert_close(x.grad, wanted)
