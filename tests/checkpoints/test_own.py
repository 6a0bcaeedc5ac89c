"""qcompiler's own format: any scheme, written and read bit for bit, and described layer by layer."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo2Config

import qcompiler
from qcompiler import QCompilerError
from qcompiler.checkpoints import load_model, read
from qcompiler.checkpoints.layer_schemes import LayerSchemes
from qcompiler.checkpoints.quantized_weight import equal_bits
from qcompiler.ir.formats import FP8_ROW

AUTO: Any = AutoModelForCausalLM  # without types
IDS = torch.arange(18).reshape(2, 9)
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A Llama whose sizes 128 does not divide; k and v have 96 rows each."""
    config = LlamaConfig(
        hidden_size=192, intermediate_size=320, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=3,
        vocab_size=100, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    loaded: torch.nn.Module = AUTO.from_config(config, dtype=torch.bfloat16).eval()
    return loaded


def declared(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize(
    ("scheme", "overrides"),
    [
        ("fp8_tile", None),
        ("fp8_tile{k_block=64, numerics=vllm}", None),
        ("int8_row{w=tensor}", None),
        ("fp8_tensor_static", None),
        ("fp8_tile", {"*.mlp.*": "int8_row", "*.o_proj": None, "lm_head": "fp8_row"}),
    ],
)
def test_codes_and_scales_come_back_bit_for_bit(
    model: torch.nn.Module, tmp_path: Path, scheme: str, overrides: dict[str, str | None] | None
) -> None:
    options: dict[str, Any] = {"scheme": scheme, "overrides": overrides, "dynamic_shapes": None}
    calibration = [IDS] if "static" in scheme else None
    compiled = qcompiler.compile(model, **options, example_inputs=(IDS,), calibration=calibration)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no reader of this format misreads partial blocks
        compiled.save_checkpoint(tmp_path / "one", "qcompiler")
    again = qcompiler.compile(tmp_path / "one", example_inputs=(IDS,), dynamic_shapes=None)
    assert torch.equal(again(IDS).logits, compiled(IDS).logits)
    again.save_checkpoint(tmp_path / "two", "qcompiler")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(equal_bits(one[name], two[name]) for name in one)
    assert declared(tmp_path / "one") == declared(tmp_path / "two")


@pytest.mark.parametrize("scheme", ["smoothquant_o1", "smoothquant_o3", "smoothquant_fp8", "smoothquant_o1{w=channel}"])
def test_factors_that_no_weight_absorbs(tmp_path: Path, scheme: str) -> None:
    """OLMo 2 has no norm before its projections, so that smoothing multiplies their inputs in each call."""
    config: Any = Olmo2Config(hidden_size=192, intermediate_size=320, num_hidden_layers=1, num_attention_heads=6,
                              num_key_value_heads=3, vocab_size=100, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    plain = AUTO.from_config(config, dtype=torch.bfloat16).eval()
    options: dict[str, Any] = {"example_inputs": (IDS,), "dynamic_shapes": None}
    compiled = qcompiler.compile(plain, scheme=scheme, calibration=[IDS], **options)
    with pytest.raises(
        QCompilerError, match=r"(?s)cannot hold 5 of .* factor of each channel.*Use format=\"qcompiler\""
    ):
        compiled.save_checkpoint(tmp_path / "foreign", "compressed-tensors")
    compiled.save_checkpoint(tmp_path / "one", "qcompiler")
    layers = [f"mlp.{name}_proj" for name in ("gate", "up")] + [f"self_attn.{name}_proj" for name in "kqv"]
    assert declared(tmp_path / "one")["prescaled"] == [f"model.layers.0.{layer}" for layer in layers]

    again = qcompiler.compile(tmp_path / "one", **options)
    assert torch.equal(again(IDS).logits, compiled(IDS).logits)
    kernels = [[op.name for op in model.graph.ops() if op.name.startswith("kernel.")] for model in (compiled, again)]
    assert kernels[0] == kernels[1], "q, k and v, and gate and up, share factors, scales and quantizations"
    assert len(again.report.quantized) == 7, "multiplications by factors are not layers"
    again.save_checkpoint(tmp_path / "two", "qcompiler")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(equal_bits(one[name], two[name]) for name in one)
    assert declared(tmp_path / "one") == declared(tmp_path / "two")

    loaded, q = load_model(tmp_path / "one"), "model.layers.0.self_attn.q_proj"
    weight = loaded.get_submodule(q).weight
    assert isinstance(weight, torch.Tensor), "it is the weight of the model, without smoothing"
    wanted = plain.get_parameter(f"{q}.weight")
    assert (weight - wanted).norm() < 0.03 * wanted.norm()
    factors = one[f"{q}.input_prescale"]
    assert (factors.dtype, [*factors.shape]) == (torch.float32, [192]) and bool((factors != 1).any())


def test_names_and_configuration(model: torch.nn.Module, tmp_path: Path) -> None:
    overrides = {"*.down_proj": "int8_tensor_static{w=channel}"}
    compiled = qcompiler.compile(
        model, scheme="fp8_tile", overrides=overrides, example_inputs=(IDS,), calibration=[IDS]
    )
    compiled.save_checkpoint(tmp_path / "out", "qcompiler")
    assert declared(tmp_path / "out") == {
        "quant_method": "qcompiler", "version": 1, "scheme": "fp8_tile",
        "overrides": {"lm_head": None, DOWN: "int8_tensor_static{w=channel}"},
    }  # fmt: skip
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {name.removeprefix(f"{DOWN}."): (t.dtype, [*t.shape]) for name, t in tensors.items() if DOWN in name}
    assert kinds == {
        "weight": (torch.int8, [192, 320]),
        "weight_scale": (torch.float32, [192, 1]),
        "input_scale": (torch.float32, [1]),
    }
    k = "model.layers.0.self_attn.k_proj.weight"
    assert (tensors[k].dtype, tensors[f"{k}_scale"].shape) == (torch.float8_e4m3fn, (1, 2))
    assert read(tmp_path / "out").stored[k].scale == f"{k}_scale"


def test_formats_without_a_scheme_are_refused(tmp_path: Path) -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(128, 64)).eval()
    steps = "canonicalize; quantize{x_format=#mxfp8, w_format=#mxfp8}; fuse-linear; fold-constants; to-kernels"
    odd = qcompiler.compile(plain, pipeline=steps, example_inputs=(torch.randn(2, 128),))
    with pytest.raises(QCompilerError, match=r"0\.weight: no scheme has its formats, #mxfp8 x #mxfp8"):
        odd.save_checkpoint(tmp_path / "odd", "qcompiler", model=plain)


def test_the_scheme_of_a_layer() -> None:
    schemes = LayerSchemes("fp8_tile", {"a": None, "a.b": "fp8_row"})
    assert [schemes.of(name) for name in ("a", "a.b", "a.c")] == [None, "fp8_row", "fp8_tile"]
    found = schemes.spec("a.b")
    assert found is not None and found.w == FP8_ROW and schemes.spec("a") is None


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"version": 2}, "the checkpoint was written by a newer qcompiler: got version 2; need version 1 or older"),
        ({"version": "1"}, "'version' is malformed: got '1'; need a positive number"),
        ({"scheme": None}, "the quantization configuration is malformed: got scheme None and overrides of type dict"),
        ({"overrides": [1]}, "the quantization configuration is malformed: got scheme 'fp8_row' and overrides of type"),
        ({"scheme": "fp8_rows"}, "no such scheme: got 'fp8_rows'"),
        ({"rotation": "hadamard"}, "the quantization configuration: the key 'rotation' is not known: got 'hadamard'"),
        ({"scheme": "int8_row"}, "the codes of '0.weight' have another type than its scheme: got float8_e4m3fn"),
        ({"overrides": {"0": None}}, "a layer in float has a scale: '0.weight_scale'"),
        ({"prescaled": "0"}, "'prescaled' is malformed: got '0'; need a list of names of modules"),
        (
            {"prescaled": ["0"]},
            "the configuration and the tensors disagree about '0.input_prescale': got it is missing",
        ),
        ({"prescaled": ["0"], "overrides": {"0": None}}, "a layer in float is 'prescaled': got '0'; need a scheme"),
    ],
)
def test_a_folder_is_refused_with_a_sentence(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    config = {"quant_method": "qcompiler", "version": 1, "scheme": "fp8_row", **said}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    codes = torch.zeros(32, 16, dtype=torch.float8_e4m3fn)
    save_file(
        {"0.weight": codes, "0.weight_scale": torch.ones(32, 1)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(QCompilerError) as error:
        read(tmp_path)
    assert str(error.value).startswith(message) and "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("prescaled", "factors", "message"),
    [
        ([], torch.ones(16), "disagree about '0.input_prescale': got no entry for it; need its layer in 'prescaled'"),
        (["0"], torch.ones(32), "factors of input channels do not fit their weight: got float32[32]; need float32[16]"),
        (["0"], torch.ones(16).bfloat16(), "do not fit their weight: got bfloat16[16]; need float32[16]"),
        (["0"], torch.zeros(16), "factors of input channels are not valid: need positive finite numbers"),
    ],
)
def test_wrong_factors_are_refused(tmp_path: Path, prescaled: list[str], factors: torch.Tensor, message: str) -> None:
    config = {"quant_method": "qcompiler", "version": 1, "scheme": "fp8_row", "prescaled": prescaled}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    tensors = {"0.weight": torch.zeros(32, 16, dtype=torch.float8_e4m3fn), "0.weight_scale": torch.ones(32, 1)}
    save_file({**tensors, "0.input_prescale": factors}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(QCompilerError) as error:
        read(tmp_path)
    assert message in str(error.value)
