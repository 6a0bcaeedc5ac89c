"""What a checkpoint has beside its weights: scales of the key-value cache, zero points, groups without weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import qcompiler
from qcompiler import QCompilerError
from qcompiler.checkpoints import load_model, read
from qcompiler.checkpoints.cache_scales import CacheScales, kept
from qcompiler.html import html_report

AUTO: Any = AutoModelForCausalLM  # without types
IDS = torch.arange(18).reshape(2, 9)
ATTENTION = "model.layers.0.self_attn."
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
WEIGHTS = {**CACHE, "strategy": "channel"}
GROUP: dict[str, Any] = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}
SAID: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": GROUP},
    "ignore": ["lm_head"], "kv_cache_scheme": CACHE,
}  # fmt: skip


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("cache") / "float"
    AUTO.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def written(folder: Path, float_folder: Path, extra: dict[str, torch.Tensor], **changes: Any) -> Path:
    """An FP8 folder by channel with some tensors more."""
    tensors = load_file(float_folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[f"{name}_scale"] = tensors[name].abs().amax(1, keepdim=True) / 448
        tensors[name] = (tensors[name] / tensors[f"{name}_scale"]).to(torch.float8_e4m3fn)
    folder.mkdir()
    save_file({**tensors, **extra}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((float_folder / "config.json").read_text())
    document = {**config, "quantization_config": {**SAID, **changes}}
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("k_scale", "v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale", "q_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
        ("kv_scale",),
        (),
    ],
)
def test_cache_scales_are_kept(tmp_path: Path, float_folder: Path, names: tuple[str, ...]) -> None:
    scales = {ATTENTION + name: torch.tensor([0.5 + index]) for index, name in enumerate(names)}
    folder = written(tmp_path / "fp8", float_folder, scales)
    checkpoint, model = read(folder), load_model(folder)
    assert {*checkpoint.cache.tensors} == {*scales} and checkpoint.cache.scheme == CACHE
    assert kept(model).tensors.keys() == scales.keys() and not {*scales} & {*model.state_dict()}
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()


def test_cache_scales_stand_in_the_report_and_are_written_back(tmp_path: Path, float_folder: Path) -> None:
    scales = {f"{ATTENTION}{key}_proj.{key}_scale": torch.tensor([0.5]) for key in "kv"}
    folder = written(tmp_path / "fp8", float_folder, scales)
    compiled = qcompiler.compile(folder, scheme="fp8_row", example_inputs=(IDS,), dynamic_shapes=None)
    (note,) = compiled.report.notes
    assert note.startswith("the checkpoint has 2 scales for an 8-bit key-value cache: kept and written back")
    assert f"note: {note}" in str(compiled.report)
    assert json.dumps(note) in html_report(compiled)
    compiled.save(tmp_path / "artefact")
    assert qcompiler.load(tmp_path / "artefact").report == compiled.report
    compiled.save_checkpoint(tmp_path / "back", "compressed-tensors")
    again = read(tmp_path / "back")
    assert again.cache.scheme == CACHE and {*again.cache.tensors} == {*scales}
    assert all(torch.equal(again.cache.tensors[name], scale) for name, scale in scales.items())


def test_only_the_cache_is_quantized(tmp_path: Path, float_folder: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    tensors = load_file(float_folder / "model.safetensors")
    save_file({**tensors, f"{ATTENTION}k_scale": torch.tensor(0.5)}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((float_folder / "config.json").read_text())
    said = {**SAID, "config_groups": {}}
    for quantization in (said, {"quant_method": "modelopt", "quant_algo": None, "kv_cache_scheme": CACHE}):
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        model: Any = load_model(folder)
        assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"]) and len(kept(model).tensors) == 1


@pytest.mark.parametrize(
    ("extra", "changes", "words"),
    [
        ({"k_scale": torch.tensor([1], dtype=torch.int32)}, {}, ["k_scale", "int32"]),
        ({"v_scale": torch.tensor([float("nan")])}, {},
         ["a scale of the key-value cache is invalid", "v_scale'", "nan at [0]"]),
        ({"kv_scale": torch.tensor(-1.0)}, {}, ["is invalid", "kv_scale'", "-1"]),
        ({}, {"kv_cache_scheme": "fp8"}, ["'kv_cache_scheme' is malformed", "'fp8'"]),
        ({"k_proj.weight_zero_point": torch.tensor([[3]], dtype=torch.int8)}, {}, ["k_proj.weight_zero_point"]),
        ({}, {"config_groups": {"g": {**GROUP, "weights": {**WEIGHTS, "symmetric": False}}}},
         ["asymmetric", "weight_zero_point"]),
        ({}, {"config_groups": {"g": {**GROUP, "input_activations": {**CACHE, "symmetric": False}}}},
         ["asymmetric", "input_zero_point"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    tmp_path: Path, float_folder: Path, extra: Any, changes: dict[str, Any], words: list[str]
) -> None:
    folder = written(tmp_path / "fp8", float_folder, {ATTENTION + key: t for key, t in extra.items()}, **changes)
    with pytest.raises(QCompilerError) as error:
        read(folder)
    assert all(word in str(error.value) for word in (*words, str(tmp_path))), error.value


def test_activation_scales_are_positive(tmp_path: Path, float_folder: Path) -> None:
    groups = {"group_0": {**GROUP, "input_activations": CACHE}}
    for index, wrong in enumerate((float("inf"), float("nan"), -0.5, 0.0)):
        extra = {f"{ATTENTION}q_proj.input_scale": torch.tensor([wrong])}
        folder = written(tmp_path / str(index), float_folder, extra, config_groups=groups)
        with pytest.raises(QCompilerError, match=r"this is not a valid scale.*q_proj\.input_scale"):
            read(folder)


def test_activation_scales_that_nothing_declares_are_refused(tmp_path: Path, float_folder: Path) -> None:
    folder = written(tmp_path / "fp8", float_folder, {f"{ATTENTION}q_proj.input_scale": torch.tensor([0.5])})
    with pytest.raises(QCompilerError, match=r"files have tensors that the model lacks.*q_proj\.input_scale"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.int32])
def test_zero_points_that_are_zero_are_accepted(tmp_path: Path, float_folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(float_folder / "model.safetensors")
    names = [name for name in tensors if name.endswith("proj.weight")]
    extra = {name + "_zero_point": torch.zeros(len(tensors[name]), 1).to(dtype) for name in names}
    extra |= {name.replace("weight", "input_offset"): torch.zeros(1).to(dtype) for name in names}
    asymmetric = {"group_0": {**GROUP, "weights": {**WEIGHTS, "symmetric": False}}}
    folder = written(tmp_path / "fp8", float_folder, extra, config_groups=asymmetric)
    plain: Any = load_model(written(tmp_path / "plain", float_folder, {}))
    loaded: Any = load_model(folder)
    up = "model.layers.0.mlp.up_proj"
    assert torch.equal(loaded.get_submodule(up).weight, plain.get_submodule(up).weight)


def test_a_group_without_weights_is_skipped_and_named(tmp_path: Path, float_folder: Path) -> None:
    """llm-compressor writes one for outputs, and another way to quantize the cache."""
    outputs = {"targets": ["re:.*k_proj", "re:.*v_proj"], "weights": None, "input_activations": None,
               "output_activations": CACHE}  # fmt: skip
    scale = {f"{ATTENTION}k_proj.output_scale": torch.tensor([0.5])}
    other = {"model.layers.0.mlp.up_proj.output_scale": torch.tensor([0.5])}
    groups = {"group_0": {**GROUP, "output_activations": CACHE}, "group_1": outputs}
    folder = written(tmp_path / "fp8", float_folder, scale | other, config_groups=groups, kv_cache_scheme=None)
    found = read(folder)
    assert len(found.stored) == 7 and {*found.cache.tensors} == {*scale}
    assert found.notes[:2] == (
        "the group 'group_1' quantizes no weights and is skipped",
        "the group 'group_0' also quantizes the outputs of its modules, which is not done here",
    )
    with torch.no_grad():
        assert torch.isfinite(load_model(folder)(IDS).logits).all()


def test_fbgemm_folders_are_read(tmp_path: Path, float_folder: Path) -> None:
    first = written(tmp_path / "one", float_folder, {}, kv_cache_scheme=None)
    config = json.loads((first / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0,
                                     "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    want = {name: read(first).quantized(name).dequantized() for name in read(first).stored}
    (first / "config.json").write_text(json.dumps(config))
    found = read(first)
    assert found.notes == ("the checkpoint bounds activation scales (activation_scale_ub 1200.0): not applied",)
    assert {name: how.format.block for name, how in found.stored.items()} == dict.fromkeys(want, (1, -1))
    assert all(torch.equal(found.quantized(name).dequantized(), numbers) for name, numbers in want.items())


@pytest.mark.parametrize(
    "names",
    [
        ("k_scale", "v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
        ("kv_cache_scaling_factor",),
        ("qkv_proj.output_scale",),
    ],
)
def test_scales_are_those_of_their_attention_module(names: tuple[str, ...]) -> None:
    tensors = {ATTENTION + name: torch.tensor([0.5 + index]) for index, name in enumerate(names)}
    assert CacheScales(tensors).by_module == {ATTENTION.removesuffix("."): (0.5, 0.5 + (len(names) - 1))}
