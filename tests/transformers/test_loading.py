"""Loading with a `QCompilerConfig`: decisions, codes and scales, files, and errors."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSeq2SeqLM,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    ViTConfig,
    ViTForImageClassification,
)
from transformers_models import AUTO, IDS, equal, llama_config, load, logits_of, saved

import qcompiler
from codegen.targets.hopper import HOPPER
from qcompiler import numerics
from qcompiler.errors import CaptureError, CodegenError, InputError, PassError, QCompilerError
from qcompiler.schemes.named import spec_of
from qcompiler.transformers import QCompilerConfig, QCompilerQuantizer, QuantizedLinear
from qcompiler.transformers.quantizer import check_runs, check_version, devices

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("plain"), llama_config())


@pytest.mark.parametrize(
    ("scheme", "overrides"),
    [
        ("fp8_tile", None),
        ("fp8_tile{k_block=64, scale=ue8m0}", {"*.o_proj": None}),
        ("fp8_row{dtype=f8e5m2}", None),
        ("int8_tensor", {"*.down_proj": "fp8_row", "lm_head": "fp8_tile"}),
    ],
)
def test_equals_the_compiler_and_round_trips(
    plain: Path, tmp_path: Path, scheme: str, overrides: dict[str, str | None] | None
) -> None:
    model = load(plain, scheme, overrides)
    options: dict[str, Any] = {"scheme": scheme, "overrides": overrides, "dynamic_shapes": None}
    compiled = qcompiler.compile(AUTO.from_pretrained(plain), example_inputs=(IDS,), **options)
    assert torch.equal(logits_of(model), compiled(IDS).logits)
    skipped = {row.weights[-1].removesuffix(".weight"): row.reason for row in compiled.report.skipped}
    assert model.qcompiler_report.skipped == skipped

    model.save_pretrained(tmp_path / "one")
    again = load(tmp_path / "one")
    assert equal(model, again) and torch.equal(logits_of(again), logits_of(model))
    assert again.qcompiler_report.quantized == model.qcompiler_report.quantized
    again.save_pretrained(tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("scheme", "prescaled"), [("fp8_tensor_static", 0), ("smoothquant_fp8", 1), ("smoothquant_o3", 1)]
)
def test_folders_of_the_compiler_load(tmp_path: Path, scheme: str, prescaled: int) -> None:
    """GELU does not commute with a scale, so that smoothing multiplies the input of the last linear in each call."""
    config = GPTNeoXConfig(hidden_size=192, intermediate_size=320, num_hidden_layers=1, num_attention_heads=6,
                           vocab_size=100, eos_token_id=0, bos_token_id=0)  # fmt: skip
    original = AUTO.from_pretrained(saved(tmp_path / "plain", config))
    options: dict[str, Any] = {"scheme": scheme, "dynamic_shapes": None}
    compiled = qcompiler.compile(original, calibration=[IDS], example_inputs=(IDS,), **options)
    compiled.save_checkpoint(tmp_path / "out", "qcompiler", model=original)
    model = load(tmp_path / "out")
    assert torch.equal(logits_of(model), compiled(IDS).logits)
    assert len(model.qcompiler_report.quantized) == 4 and str(model).count("prescaled") == prescaled
    model.save_pretrained(tmp_path / "again")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == two
    assert equal(load(tmp_path / "again"), model)


def test_gradients_flow_through_the_factors_of_the_input() -> None:
    layer = QuantizedLinear(64, 32, False, "int8_row", prescaled=True)
    weight, factors = torch.randn(32, 64), torch.rand(64) + 0.5
    codes, scale = numerics.quantize(weight / factors, spec_of("int8_row").w)
    for name, tensor in {"weight": codes, "weight_scale": scale, "input_prescale": factors}.items():
        getattr(layer, name).data.copy_(tensor)
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y - x @ weight.T).norm() < 0.02 * y.norm()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(5, 32) @ layer.dequantized(torch.float32))
    assert (layer.dequantized(torch.float32) - weight).norm() < 0.01 * weight.norm()


def test_the_oldest_transformers() -> None:
    check_version("5.23.0.dev0")
    with pytest.raises(
        QCompilerError, match=r"needs a newer transformers: got 5\.22\.1; need 5\.23 or newer\. Load a folder"
    ):
        check_version("5.22.1")


def test_layers_are_not_split(plain: Path, tmp_path: Path) -> None:
    model = AUTO.from_pretrained(plain)
    model.config.distributed_config = SimpleNamespace(tp_plan="auto", tp_size=2)  # as from_pretrained(tp_plan="auto")
    quantizer = QCompilerQuantizer(QCompilerConfig("fp8_tile"))
    with pytest.raises(
        PassError, match=r"splits layers, and these run whole: got tp_plan='auto', tp_size=2; need whole"
    ):
        quantizer.preprocess_model(model)
    model.config.distributed_config = SimpleNamespace(tp_plan=None, tp_size=1)
    quantizer.preprocess_model(model)


def test_factors_need_a_quantized_folder(plain: Path) -> None:
    with pytest.raises(PassError, match="'prescaled' describes a quantized folder, and this is a float model: got"):
        load(plain, "int8_row", prescaled=[UP])


def test_the_report_and_the_configuration_name_layers(tmp_path: Path) -> None:
    model = load(
        saved(tmp_path, llama_config(num_hidden_layers=2)), overrides={"*.up_proj": "int8_row"}, ignore=["*.1.*"]
    )
    lines = str(model.qcompiler_report).splitlines()
    assert any(re.fullmatch(r" model\.layers\.0\.mlp\.up_proj +int8_row", line) for line in lines)
    assert lines[-1] == "7 of 15 layers are quantized"
    said = model.config.to_dict()["quantization_config"]
    layers = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{x}_proj" for x in "koqv"))
    assert said == {
        "quant_method": "qcompiler", "version": 1, "scheme": "fp8_tile",
        "overrides": {"lm_head": None, **{f"model.layers.1.{layer}": None for layer in layers}, UP: "int8_row"},
    }  # fmt: skip


def test_codes_and_scales_keep_their_dtypes(plain: Path) -> None:
    model = load(plain, "fp8_row").to(torch.float32)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    dtypes = [tensor.dtype for tensor in (layer.weight, layer.weight_scale, layer.bias)]
    assert dtypes == [torch.float8_e4m3fn, torch.float32, torch.float32]
    assert layer.compute_dtype is logits_of(model).dtype is torch.float32
    assert not layer.weight.requires_grad and not layer.weight_scale.requires_grad


def test_models_that_read_the_dtype_of_a_weight(tmp_path: Path) -> None:
    """T5 keeps a layer in FP32, and casts the layer's input to the dtype of its weight unless it is INT8."""
    kind: Any = T5Config
    config = kind(d_model=64, d_kv=16, num_layers=1, num_heads=4, d_ff=128, vocab_size=100, decoder_start_token_id=0)
    torch.manual_seed(0)
    auto: Any = AutoModelForSeq2SeqLM
    auto.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    model = auto.from_pretrained(tmp_path / "plain", quantization_config=QCompilerConfig("int8_row"))
    model.save_pretrained(tmp_path / "out")
    again = auto.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found, wanted = (each(input_ids=IDS, decoder_input_ids=IDS).logits for each in (model, again))
    assert equal(model, again) and torch.equal(found, wanted)
    model = auto.from_pretrained(tmp_path / "plain", quantization_config=QCompilerConfig("fp8_tile"))
    with pytest.raises(InputError, match="a quantized layer has a wrong dtype: got float8_e4m3fn; need a float dtype"):
        model(input_ids=IDS, decoder_input_ids=IDS)


def test_only_models_of_token_ids(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(CaptureError, match=r"only models of token ids .*: got pixel_values\. Use qcompiler\.compile"):
        ViTForImageClassification.from_pretrained(tmp_path, quantization_config=QCompilerConfig())


class Odd(LlamaForCausalLM):  # type: ignore[no-untyped-call]  # few of its types exist
    """Reads the weights of layers outside of their modules."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.called, self.read = torch.nn.Linear(192, 64), torch.nn.Linear(192, 64)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        """Adds to the logits."""
        found = super().forward(input_ids=input_ids, **options)
        x = self.model.embed_tokens(input_ids)
        y = torch.nn.functional.linear(x, self.called.weight).mean() + self.read(x).mean() * self.read.weight.sum(0)[0]
        found.logits = found.logits + y * (x @ self.called.weight[0])[..., None]
        return found


def test_weights_that_are_read_outside_of_their_modules_stay_in_float(tmp_path: Path) -> None:
    Odd(llama_config()).save_pretrained(tmp_path)
    config = QCompilerConfig("int8_row")
    model: Any = Odd.from_pretrained(tmp_path, quantization_config=config)
    assert model.qcompiler_report.skipped["called"] == "its weight is multiplied in the model, outside of it"
    assert model.qcompiler_report.skipped["read"] == "aten.mul.Tensor also reads its weight"
    assert config.to_dict().keys() == {"quant_method", "version", "scheme"}, "the caller's value is unchanged"


def test_a_tied_vocabulary_projection_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, llama_config(tie_word_embeddings=True))
    with pytest.raises(PassError, match=r"'lm_head' names cannot be quantized: got lm_head: it shares its weight with"):
        load(folder, overrides={"lm_head": "fp8_tile"})
    assert "the vocabulary projection" in load(folder, "fp8_tile").qcompiler_report.skipped["lm_head"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"scheme": "fp8_tensor_static"},
            "the scheme 'fp8_tensor_static' needs calibration data, which from_pretrained",
        ),
        ({"overrides": {"*.up_proj": "smoothquant_o1"}}, "the scheme 'smoothquant_o1' needs calibration data"),
        ({"scheme": "fp8_tiles"}, "no such scheme: got 'fp8_tiles'"),
        ({"overrides": {"*.dwn_proj": None}}, "a pattern matches no matmul's weight: got '*.dwn_proj'. Did you mean"),
        ({"ignore": ["*"]}, "no layer of the model can be quantized: got model.layers.0.self_attn.q_proj: the pattern"),
        ({"bits": 4}, "the quantization configuration: the key 'bits' is not known: got 4"),
    ],
)
def test_errors_before_weights_are_read(plain: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(QCompilerError) as error:
        load(plain, **options)
    assert str(error.value).startswith(message)


def test_a_folder_of_a_newer_version_is_refused(plain: Path, tmp_path: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "qcompiler", "version": 2, "scheme": "fp8_tile"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QCompilerError, match="written by a newer qcompiler: got version 2; need version 1 or older"):
        load(tmp_path)


def test_a_folder_of_another_method_is_refused(plain: Path, tmp_path: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(plain / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="quantized with FineGrainedFP8Config but you are passing a QCompilerConfig"):
        load(tmp_path, "fp8_tile")


@pytest.mark.parametrize("name", [f"{UP}.weight", f"{UP}.weight_scale"])
def test_a_folder_without_codes_or_scales_is_refused(plain: Path, tmp_path: Path, name: str) -> None:
    load(plain, "int8_row").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(QCompilerError, match=f"lacks tensors of quantized layers: got {re.escape(name)}"):
        load(tmp_path)


def test_a_scheme_that_a_device_cannot_run_is_refused() -> None:
    with pytest.raises(
        CodegenError, match="'fp8_channel_reference' does not run on sm_90a: the scale of an activation"
    ):
        check_runs("fp8_channel_reference", spec_of("fp8_channel_reference"), HOPPER)
    check_runs("fp8_tile", spec_of("fp8_tile"), HOPPER)
    assert devices({"": "cpu", "lm_head": "disk"}) == [torch.device("cpu")] and devices("auto") == devices(None) == []


def test_a_configuration_is_a_value() -> None:
    config = QCompilerConfig("fp8_tile", {"a": "fp8_row"}, ignore=["b"])
    assert config.to_dict() == QCompilerConfig(**config.to_dict()).to_dict()
    assert config.to_dict()["overrides"] == {"a": "fp8_row", "b": None}
