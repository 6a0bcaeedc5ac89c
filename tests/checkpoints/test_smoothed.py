"""Models that are smoothed and not quantized, written in high precision: the model's own code computes the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config

import qcompiler
from qcompiler import PassError, QCompilerError
from qcompiler.checkpoints import load_model, smoothing, write

AUTO: Any = AutoModelForCausalLM  # without types


class Normed(torch.nn.Module):
    """A norm, two linears that read it, and a third linear, whose input scale `up` absorbs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(64)
        self.up, self.gate = torch.nn.Linear(64, 96), torch.nn.Linear(64, 96)
        self.down = torch.nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        return self.down(self.up(normed) * self.gate(normed).sigmoid())  # type: ignore[no-any-return]


def outliers(rows: int = 64) -> torch.Tensor:
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 50
    return x


def test_a_smoothed_model_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Normed().eval(), outliers()
    with torch.no_grad():
        model.norm.weight[5] = 20
        model.norm.bias.add_(0.5)
    steps = smoothing("smoothquant_o1{pow2=true}")
    compiled = qcompiler.compile(model, pipeline=steps, calibration=[x], strict=False)
    write(compiled, tmp_path / "out", "float")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    twin = Normed().eval()
    twin.load_state_dict(tensors)
    assert torch.equal(twin(x), model(x))  # powers of two: not a bit is another
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, tensors[name])}
    assert {"norm.weight", "norm.bias", "up.weight", "gate.weight"} <= moved
    assert model.norm.weight[5] / twin.norm.weight[5] > 2  # the outlier has gone into the weights


def test_a_smoothed_language_model_is_loaded_by_transformers(tmp_path: Path) -> None:
    """Gemma multiplies by 1 + w: the gain that is written is (1 + w) / s - 1."""
    config = Gemma2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AUTO.from_config(config, dtype=torch.float32).eval()
    ids = torch.arange(24).reshape(2, 12)
    compiled = qcompiler.compile(model, pipeline=smoothing("smoothquant_o1"), calibration=[ids], strict=False)
    write(compiled, tmp_path / "out", "float")
    loaded = load_model(tmp_path / "out")
    want, got = model(ids).logits, loaded(ids).logits
    assert torch.allclose(got, want, atol=1e-5) and not torch.equal(got, want)
    gain = "model.layers.0.input_layernorm.weight"
    assert not torch.allclose(loaded.get_parameter(gain), model.get_parameter(gain), atol=1e-2)


def test_a_smoothed_and_quantized_model_is_written_as_it_multiplies(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Normed().eval(), outliers()
    compiled = qcompiler.compile(model, scheme="smoothquant_o1{w=channel, pow2=true}", calibration=[x])
    if any("in front" in row.remark for row in compiled.report.rows):
        pytest.fail(f"this model folds everywhere:\n{compiled.report}")
    write(compiled, tmp_path / "out", "compressed-tensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    twin = Normed().eval()
    floats = {
        name: tensor for name, tensor in tensors.items() if tensor.dtype is torch.float32 and "_scale" not in name
    }
    floats |= {f"{n}.weight": tensors[f"{n}.weight"] * tensors[f"{n}.weight_scale"] for n in ("up", "gate", "down")}
    twin.load_state_dict(floats)
    assert (twin(x) - model(x)).norm() / model(x).norm() < 0.02  # what rounding weights to INT8 costs


def test_a_factor_that_no_weight_takes_in_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 32)).eval(), outliers()
    compiled = qcompiler.compile(model, scheme="smoothquant_o1", calibration=[x])
    with pytest.raises(QCompilerError, match="factor of each channel, which cannot be folded into a weight"):
        write(compiled, tmp_path / "out", "compressed-tensors")
    with pytest.raises(PassError, match="does not smooth"):
        smoothing("fp8_tile")
