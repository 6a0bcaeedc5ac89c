"""A checkpoint is taken whole or refused: tensors, scales and keys of the configuration that would change numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import qcompiler
from qcompiler import CaptureError, QCompilerError, numerics
from qcompiler.capture.stored_weights import unusable
from qcompiler.checkpoints import load_model, read

AUTO: Any = AutoModelForCausalLM  # without types
IDS = torch.arange(18).reshape(2, 9)
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
BLOCKED = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
CACHE = {"num_bits": 8, "type": "float", "dynamic": False}
UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


def compressed(kind: str = "int", **group: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel", "dynamic": False}
    weights |= group.pop("weights", {})
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"g": {"targets": ["Linear"], "weights": weights, **group}},
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of a small model in float."""
    return saved(LlamaConfig(**SIZES, tie_word_embeddings=False), tmp_path_factory.mktemp("base"))


def saved(config: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    AUTO.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())


def quantized(tensors: dict[str, Tensor], dtype: torch.dtype = torch.int8) -> dict[str, Tensor]:
    """Channel by channel, with `weight_scale`."""
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith("proj.weight") or ".experts." in name]:
        found[name], found[f"{name}_scale"] = numerics.quantize(tensors[name], numerics.format_of((1, -1), dtype))
    return found


def blocked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        found[name], found[f"{name}_scale_inv"] = numerics.quantize(tensors[name], numerics.format_of((128, 128)))
    return found


def folder(path: Path, tensors: dict[str, Tensor], config: dict[str, Any], **more: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**config, **more}))
    return path


# Where the quantization is declared


@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "thinker_config"])
def test_a_configuration_is_read_from_each_place(tmp_path: Path, base: Any, place: str) -> None:
    tensors, config = base
    said = {"quantization_config": compressed()} if place == "thinker_config" else compressed()
    path = folder(tmp_path, quantized(tensors), config, **{place: said})
    assert read(path).method == "compressed-tensors" and UP in read(path).stored
    loaded: Any = load_model(path)
    want = read(path).quantized(UP).dequantized(torch.bfloat16)
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, want)
    assert not hasattr(loaded.config, "quantization_config") and not hasattr(loaded.config, "compression_config")


def test_two_configurations_must_agree(tmp_path: Path, base: Any) -> None:
    tensors, config = base
    both = {"quantization_config": compressed(), "compression_config": compressed()}
    assert read(folder(tmp_path, quantized(tensors), config, **both)).stored
    both["compression_config"] = compressed("float")
    with pytest.raises(QCompilerError, match="two quantization configurations differ: got quantization_config, comp"):
        read(folder(tmp_path, quantized(tensors), config, **both))


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize(
    ("file", "more"),
    [
        ("hf_quant_config.json", {}),
        ("quant_model_description.json", {}),
        ("", {"quantize": "w8a8_dynamic"}),
        ("", {"thinker_config": {"quantization": {"bits": 8}}}),
    ],
)
def test_what_is_declared_elsewhere_is_named(tmp_path: Path, base: Any, file: str, more: Any, scales: bool) -> None:
    tensors, config = base
    stored = quantized(tensors)
    path = folder(tmp_path, {k: v for k, v in stored.items() if scales or "scale" not in k}, config, **more)
    if file:
        (path / file).write_text("{}")
    problem = "files have tensors that the model lacks" if scales else "weights of the model are integers"
    named = file or next(iter(more))
    with pytest.raises(QCompilerError, match=rf"{problem}.*declares a quantization that is not read: .*{named}"):
        load_model(path)


def test_an_fp8_weight_without_any_configuration_is_an_error_that_names_files(tmp_path: Path, base: Any) -> None:
    tensors, config = base
    path = folder(tmp_path, quantized(tensors, torch.float8_e4m3fn), config)
    (path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(QCompilerError, match=r"need a 'quantization_config'.*hf_quant_config\.json.*weight_scale'"):
        load_model(path)


def test_harmless_files_and_keys_stay_harmless(tmp_path: Path, base: Any) -> None:
    tensors, config = base
    path = folder(tmp_path, tensors, config, quantization_config=None, quant_mode=False, compression_config={})
    for name in ("adapter_config.json", "hf_quant_config.json", "spec.yaml"):
        (path / name).write_text('{"base_model_name_or_path": "nowhere"}')
    (path / "generation_config.json").write_text('{"top_k": 7, "do_sample": true}')
    loaded: Any = load_model(path)
    assert torch.equal(loaded.get_parameter(UP), tensors[UP])
    assert loaded.generation_config.top_k == 7 and loaded.config.name_or_path == str(path)


@pytest.mark.parametrize("key", ["transform_config", "rotation_config", "online_hadamard_transform", "QuaRot"])
def test_transformed_weights_are_refused(tmp_path: Path, base: Any, key: str) -> None:
    tensors, config = base
    with pytest.raises(QCompilerError, match=rf"stored transformed are not supported: got the key '{key}'"):
        load_model(folder(tmp_path, tensors, config, **{key: {"R4": "hadamard"}}))
    said = compressed() | {key: {"config_groups": {"R4": {"type": "hadamard"}}}}
    with pytest.raises(QCompilerError, match=f"the quantization configuration: .*'{key}'"):
        load_model(folder(tmp_path, quantized(tensors), config, quantization_config=said))


@pytest.mark.parametrize(
    "said",
    [
        BLOCKED,
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        compressed() | {"kv_cache_scheme": CACHE},
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": CACHE},
    ],
)
def test_a_configuration_that_no_weight_follows(tmp_path: Path, base: Any, said: Any) -> None:
    tensors, config = base
    problem = "no weight is quantized as the checkpoint declares: got quant_method '{}'"
    with pytest.raises(QCompilerError, match=problem.format(said["quant_method"])):
        load_model(folder(tmp_path, tensors, config, quantization_config=said))


def test_a_configuration_without_groups_for_weights_is_of_a_model_in_float(tmp_path: Path, base: Any) -> None:
    tensors, config = base
    said = compressed()
    said["config_groups"]["g"]["weights"] = None
    loaded: Any = load_model(folder(tmp_path, tensors, config, quantization_config=said))
    assert torch.equal(loaded.get_parameter(UP), tensors[UP])


# Names, shapes and element types, the same on both ways


@pytest.fixture(params=["float", "quantized"])
def way(request: pytest.FixtureRequest, base: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, config = base
    if request.param == "float":
        return dict(tensors), config
    return blocked(tensors), {**config, "quantization_config": BLOCKED}


def test_tensors_must_be_those_of_the_model(tmp_path: Path, way: Any) -> None:
    tensors, config = way
    with pytest.raises(QCompilerError, match=r"files have tensors that the model lacks: got model\.more\.weight"):
        load_model(folder(tmp_path, {**tensors, "model.more.weight": torch.ones(2)}, config))
    with pytest.raises(QCompilerError, match=f"the files lack weights of the model: got {NORM}"):
        load_model(folder(tmp_path, {name: t for name, t in tensors.items() if name != NORM}, config))
    with pytest.raises(QCompilerError, match="another shape"):
        load_model(folder(tmp_path, {**tensors, NORM: torch.ones(63, dtype=torch.bfloat16)}, config))
    with pytest.raises(QCompilerError, match=f"are integers in the files.*: got int8 in {NORM}"):
        load_model(folder(tmp_path, {**tensors, NORM: torch.ones(64, dtype=torch.int8)}, config))


def test_what_the_architecture_ignores_is_ignored(tmp_path: Path, way: Any) -> None:
    tensors, config = way
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    assert load_model(folder(tmp_path, tensors | old, config)).get_parameter(NORM).shape == (64,)


def test_a_tied_weight_may_be_under_either_name(tmp_path: Path, way: Any) -> None:
    tensors, config = way
    head = tensors.pop("lm_head.weight")
    for kept, gone in (
        ("model.embed_tokens.weight", "lm_head.weight"),
        ("lm_head.weight", "model.embed_tokens.weight"),
    ):
        found = {name: tensor for name, tensor in tensors.items() if name != gone} | {kept: head}
        loaded: Any = load_model(folder(tmp_path, found, config, tie_word_embeddings=True))
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight and torch.equal(loaded.lm_head.weight, head)


def test_a_tied_embedding_may_be_quantized(tmp_path: Path, base: Any) -> None:
    tensors, config = base
    embed = "model.embed_tokens.weight"
    codes, scale = numerics.quantize(tensors[embed], numerics.format_of((128, 128)))
    found = {name: tensor for name, tensor in blocked(tensors).items() if name != "lm_head.weight"}
    found |= {embed: codes, f"{embed}_scale_inv": scale}
    path = folder(tmp_path, found, config, tie_word_embeddings=True, quantization_config=BLOCKED)
    loaded: Any = load_model(path)
    want = numerics.dequantize(
        codes, scale, format=numerics.format_of((128, 128), codes.dtype), out_dtype=torch.bfloat16
    )
    assert torch.equal(loaded.lm_head.weight, want) and torch.equal(loaded.model.embed_tokens.weight, want)
    parameters = (loaded.lm_head._parameters["weight"], loaded.model.embed_tokens._parameters["weight"])
    assert parameters[0] is parameters[1] and loaded(IDS).logits.isfinite().all()
    assert loaded.all_tied_weights_keys == {"lm_head.weight": embed}
    compiled = qcompiler.compile(path, example_inputs=(IDS,))
    assert "lm_head.weight" in {name for row in compiled.report.quantized for name in row.weights}
    with pytest.raises(
        QCompilerError, match=f"cannot hold 1 of the weights:\n  {embed}: it is not the weight of a lin"
    ):
        compiled.save_checkpoint(tmp_path / "out", "fp8")


def test_an_index_must_list_all_that_is_there(tmp_path: Path, base: Any) -> None:
    tensors, config = base
    path, index = folder(tmp_path, tensors, config), tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: "model.safetensors" for name in tensors if name != UP}}))
    with pytest.raises(QCompilerError, match=f"a file has a tensor that the index does not list: got {UP}"):
        read(path)
    (path / "model.safetensors").rename(path / "model-00001.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001.safetensors")}))
    assert len(read(path).tensors) == len(tensors)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(QCompilerError, match="the folder holds two checkpoints"):
        read(path)


def test_the_configuration_may_not_name_other_files(tmp_path: Path, base: Any) -> None:
    with pytest.raises(QCompilerError, match="refers to other weight files: got 'other'"):
        read(folder(tmp_path, *base, transformers_weights="other"))


# Scales


@pytest.mark.parametrize(
    ("value", "got"), [(math.nan, "nan at"), (math.inf, "inf at"), (-math.inf, "-inf at"), (-0.5, "-0.5 at")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_is_not_a_number(tmp_path: Path, base: Any, value: float, got: str, dtype: torch.dtype) -> None:
    tensors, config = base
    stored = {name: t.to(dtype) if "scale" in name else t for name, t in quantized(tensors).items()}
    stored[f"{UP}_scale"][3] = value
    path = folder(tmp_path, stored, config, quantization_config=compressed())
    with pytest.raises(QCompilerError) as error:
        load_model(path)
    assert f"the scale of '{UP}' is not a valid scale: got {got} [3, 0]" in str(error.value)
    assert f"{path}: {UP}_scale" in str(error.value)
    stored[f"{UP}_scale"][3] = 0
    assert read(folder(tmp_path, stored, config, quantization_config=compressed())).scale(UP)[3] == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_the_byte_255_of_an_exponent_is_not_a_number(tmp_path: Path, base: Any, dtype: torch.dtype) -> None:
    tensors, config = base
    stored = blocked(tensors)
    stored[f"{UP}_scale_inv"] = torch.tensor([[255]], dtype=torch.uint8).view(dtype)
    with pytest.raises(QCompilerError, match=r"is not a valid scale: got nan at \[0, 0\]"):
        read(folder(tmp_path, stored, config, quantization_config=BLOCKED))


@given(st.lists(st.floats(width=32, min_value=0, max_value=2), max_size=9), st.floats(width=32), st.integers(0, 9))
@example([1.0], math.nan, 1)
def test_the_first_unusable_element_is_named(fine: list[float], value: float, at: int) -> None:
    numbers = [*fine[:at], value, *fine[at:]]
    usable = math.isfinite(value) and value >= 0
    why = unusable(torch.tensor(numbers, dtype=torch.float32))
    assert (why is None) == usable
    assert usable or (why is not None and why.endswith(f" at [{min(at, len(fine))}]"))
    assert unusable(torch.empty(0)) is None and unusable(torch.tensor(-2.0)) == "-2"


def test_scales_of_modules_that_others_loaded() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 128)).eval()
    layer: Any = model[0]
    codes, _ = numerics.quantize(layer.weight.detach(), numerics.format_of((-1, -1)))
    layer._parameters["weight"] = torch.nn.Parameter(codes, requires_grad=False)
    layer.register_parameter("weight_scale_inv", torch.nn.Parameter(torch.tensor(math.nan), requires_grad=False))
    with pytest.raises(CaptureError, match=r"the scale of '0\.weight' is not a valid scale: got nan; need finite"):
        qcompiler.compile(model, example_inputs=(torch.randn(2, 128),))


@pytest.mark.parametrize("experts", [False, True])
def test_channel_scales_may_have_one_axis(tmp_path: Path, base: Any, experts: bool) -> None:
    tensors, config = base
    if experts:
        mixture = MixtralConfig(**SIZES, num_local_experts=2, tie_word_embeddings=False)
        tensors, config = saved(mixture, tmp_path)
    two = quantized(tensors)
    one = {name: tensor.flatten() if "scale" in name else tensor for name, tensor in two.items()}
    models: list[Any] = [
        load_model(folder(tmp_path / axes, found, config, quantization_config=compressed()))
        for axes, found in (("one", one), ("two", two))
    ]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert any(tensor.dtype is torch.int8 for tensor in states[0].values())


def test_a_scale_under_another_name_is_named(tmp_path: Path, base: Any) -> None:
    tensors, config = base
    stored = blocked(tensors)
    stored["model.layers.0.mlp.up_proj.scale"] = stored.pop(f"{UP}_scale_inv")
    with pytest.raises(QCompilerError, match=rf"need '{UP}_scale_inv'.*Beside it is 'model.layers.0.mlp.up_proj.scal"):
        read(folder(tmp_path, stored, config, quantization_config=BLOCKED))


# What transformers cannot make


@pytest.mark.parametrize(
    "change", [{"rope_parameters": {"rope_type": "weird"}}, {"pad_token_id": 5000}, {"hidden_act": "weird"}]
)
def test_errors_of_transformers_are_one_sentence(tmp_path: Path, way: Any, change: dict[str, Any]) -> None:
    tensors, config = way
    with pytest.raises(QCompilerError, match=r"transformers cannot .*: got .*\(in ") as error:
        load_model(folder(tmp_path, tensors, config, **change))
    assert error.value.__cause__ is not None


@pytest.mark.parametrize("named", [["NoSuchModel"], "LlamaForCausalLM", {"a": 1}, [5], ["AutoConfig"], ["Trainer"]])
def test_an_architecture_that_is_none(tmp_path: Path, base: Any, named: Any) -> None:
    tensors, config = base
    with pytest.raises(QCompilerError, match=r"architecture|configuration"):
        load_model(folder(tmp_path, tensors, config, architectures=named))


def test_a_head_needs_an_architecture(tmp_path: Path, way: Any) -> None:
    tensors, config = way
    words = r"that the model lacks: got lm_head\.weight.*names no architecture, so that the model has no head"
    with pytest.raises(QCompilerError, match=words):
        load_model(folder(tmp_path, tensors, {key: value for key, value in config.items() if key != "architectures"}))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_a_model_does_not_compute_in_the_type_of_its_codes(tmp_path: Path, way: Any, dtype: str) -> None:
    tensors, config = way
    loaded: Any = load_model(folder(tmp_path, tensors, config, dtype=dtype))
    assert loaded(IDS).logits.dtype is torch.bfloat16


@pytest.mark.parametrize("names", ["LlamaForCausalLM", {"a": 1}])
def test_architectures_that_are_no_list(tmp_path: Path, base: Any, names: Any) -> None:
    tensors, config = base
    with pytest.raises(QCompilerError, match=r"'architectures' in config\.json is not a list: got"):
        load_model(folder(tmp_path, tensors, config, architectures=names))


def test_an_error_of_transformers_keeps_its_reason(tmp_path: Path, base: Any) -> None:
    tensors, config = base
    with pytest.raises(QCompilerError, match=r"Validation error for field 'hidden_size': .*expected int, got str"):
        load_model(folder(tmp_path, tensors, config, hidden_size="64"))
