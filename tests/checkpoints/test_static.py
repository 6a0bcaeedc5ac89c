"""Static activation scales of published FP8 and INT8 folders: used bit for bit, without calibration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.utils.quantization_config import FineGrainedFP8Config

import qcompiler
from qcompiler import CaptureError, PassError, QCompilerError
from qcompiler.checkpoints import load_model, read, reading
from qcompiler.checkpoints.files import TensorFiles
from qcompiler.cli import main
from qcompiler.compiler.model import CompiledModel

AUTO: Any = AutoModelForCausalLM  # without types
IDS = torch.arange(18).reshape(2, 9)
E4M3 = torch.float8_e4m3fn
TOP = {E4M3: 448.0, torch.int8: 127.0}
LAYER = "model.layers.0."
NUMBERS: dict[str, Any] = {"num_bits": 8, "symmetric": True, "strategy": "tensor", "dynamic": False}
FP8 = {**NUMBERS, "type": "float"}


def compressed(weights: dict[str, Any], activations: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    kind = f"{weights['type']}-quantized"
    return {"quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"],
            "config_groups": {"group_0": group}, **more}  # fmt: skip


AUTO_FP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
MISTRAL = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
           "modules_to_not_convert": ["lm_head"]}  # fmt: skip
MODELOPT_GROUP = {"weights": FP8, "input_activations": FP8, "targets": ["Linear"]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"],
            "config_groups": {"group_0": MODELOPT_GROUP}}  # fmt: skip


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in FP32."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("static") / "float"
    AUTO.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def rounded(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = E4M3) -> torch.Tensor:
    """Codes, computed here."""
    codes = (x / scale).clamp(-TOP[dtype], TOP[dtype])
    return (codes.round() if dtype is torch.int8 else codes).to(dtype)


def quantized(float_model: Path, dtype: torch.dtype = E4M3, *, by_channel: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of an llm-compressor folder: each linear has another activation scale."""
    tensors = load_file(float_model / "model.safetensors")
    for count, name in enumerate([name for name in tensors if name.endswith("proj.weight")]):
        weight = tensors[name]
        scale = weight.abs().amax(1, keepdim=True) if by_channel else weight.abs().max().reshape(1)
        tensors[name] = rounded(weight, scale / TOP[dtype], dtype)
        tensors[f"{name}_scale"] = scale / TOP[dtype]
        tensors[name.replace("weight", "input_scale")] = torch.tensor([(3.0 + count) / TOP[dtype]])
    return tensors


def renamed(tensors: dict[str, torch.Tensor], *changes: tuple[str, str]) -> dict[str, torch.Tensor]:
    """The same with one number a scale, and under other names."""
    found = {}
    for name, tensor in tensors.items():
        for old, new in changes:
            name = name.removesuffix(old) + new if name.endswith(old) else name
        found[name] = tensor.reshape(()) if "scale" in name else tensor
    return found


def written(folder: Path, float_model: Path, tensors: dict[str, torch.Tensor], said: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((float_model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config if said is None else {**config, "quantization_config": said}))
    return folder


def reference(float_model: Path, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of transformers' model, whose linears quantize their input and dequantize by hand."""
    model = AUTO.from_pretrained(float_model, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if f"{name}.weight_scale" in tensors:
            codes, scale, x_scale = (tensors[f"{name}.{key}"] for key in ("weight", "weight_scale", "input_scale"))
            weight = codes.float() * scale

            def forward(x: torch.Tensor, w: Any = weight, s: Any = x_scale, d: Any = codes.dtype) -> torch.Tensor:
                return torch.nn.functional.linear(rounded(x, s, d).float() * s, w)

            module.forward = forward
    with torch.no_grad():
        logits: torch.Tensor = model(IDS, use_cache=False).logits
    return logits


def compile_static(folder: Path, scheme: str = "fp8_tensor_static", **options: Any) -> CompiledModel:
    return qcompiler.compile(folder, scheme=scheme, example_inputs=(IDS,), dynamic_shapes=None, **options)


def x_scales(compiled: CompiledModel) -> list[torch.Tensor]:
    """The static scales of the compiled graph, in the order of its linears."""
    graph = compiled.graph
    ops = graph.ops("kernel.scaled_linear")
    return [graph.weights[str(op["x_scale"].op.attrs["name"])] for op in ops]


@pytest.fixture(scope="module")
def llm_compressor(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompiledModel]:
    folder = tmp_path_factory.mktemp("static") / "compressed"
    written(folder, float_model, quantized(float_model), compressed(FP8, FP8))
    return folder, compile_static(folder)


def test_the_scales_of_the_folder_are_used_as_they_are(
    float_model: Path, llm_compressor: tuple[Path, CompiledModel]
) -> None:
    folder, compiled = llm_compressor
    tensors = load_file(folder / "model.safetensors")
    assert torch.allclose(compiled(IDS).logits, reference(float_model, tensors), rtol=1e-5, atol=1e-6)
    stored = sorted(float(tensor) for name, tensor in tensors.items() if name.endswith("input_scale"))
    assert sorted(map(float, x_scales(compiled))) == stored and len(stored) == 7
    assert len(compiled.report.quantized) == 7
    assert all(
        "the model's own codes, scales and static activation scale" in row.remark for row in compiled.report.quantized
    )
    first = next(line for line in str(compiled.stages["captured"]).splitlines() if "x_scale" in line)
    assert "x_scale = 0.0" in first


@pytest.mark.parametrize(
    ("said", "changes"),
    [
        (AUTO_FP8, ()),
        (MISTRAL, (("weight_scale", "weight_scale_inv"), ("input_scale", "activation_scale"))),
        (MODELOPT, ()),
        (None, ()),
    ],
    ids=["AutoFP8", "Ministral-3", "ModelOpt", "hf_quant_config.json"],
)
def test_other_layouts_hold_the_same_model(
    tmp_path: Path, float_model: Path, llm_compressor: tuple[Path, CompiledModel], said: Any, changes: Any
) -> None:
    folder = written(tmp_path / "other", float_model, renamed(quantized(float_model), *changes), said)
    if said is None:
        document = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": []}}
        (folder / "hf_quant_config.json").write_text(json.dumps(document))
    first, second = read(llm_compressor[0]), read(folder)
    assert {*first.stored} == {*second.stored}
    for name in first.stored:
        one, other = first.quantized(name), second.quantized(name)
        assert torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
        assert torch.equal(one.scale, other.scale) and one.block == other.block
        assert one.x_scale is not None and other.x_scale is not None and torch.equal(one.x_scale, other.x_scale)
    layer: Any = load_model(folder).get_submodule(f"{LAYER}mlp.up_proj")
    want = first.quantized(f"{LAYER}mlp.up_proj.weight")
    assert torch.equal(layer.weight, want.dequantized())
    assert [[layer.stored_weights["weight"].x_scale]] == (want.x_scale.tolist() if want.x_scale is not None else [])


def test_a_folder_that_is_written_has_the_same_bytes(
    tmp_path: Path, llm_compressor: tuple[Path, CompiledModel]
) -> None:
    folder, compiled = llm_compressor
    compiled.save_checkpoint(tmp_path / "back", "compressed-tensors", reader=None)
    ours, theirs = load_file(tmp_path / "back" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    said = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert said["config_groups"]["group_0"]["input_activations"]["dynamic"] is False


@pytest.mark.parametrize("by_channel", [False, True])
def test_static_int8(tmp_path: Path, float_model: Path, by_channel: bool) -> None:
    """SmoothQuant W8A8 as llm-compressor writes it: zero points are there, and zero."""
    tensors = quantized(float_model, torch.int8, by_channel=by_channel)
    for name in [name for name in tensors if name.endswith("input_scale")]:
        tensors[name.replace("scale", "zero_point")] = torch.zeros(1, dtype=torch.int8)
        tensors[name.replace("input_scale", "weight_zero_point")] = torch.zeros(1, dtype=torch.int8)
    int8 = {**NUMBERS, "type": "int"}
    weights = {**int8, "strategy": "channel"} if by_channel else int8
    folder = written(tmp_path / "int8", float_model, tensors, compressed(weights, int8))
    compiled = compile_static(folder, "int8_tensor_static{w=channel}" if by_channel else "int8_tensor_static")
    assert torch.allclose(compiled(IDS).logits, reference(float_model, tensors), rtol=1e-5, atol=1e-6)
    assert sorted(map(float, x_scales(compiled))) == sorted(
        float(tensor) for name, tensor in tensors.items() if name.endswith("input_scale")
    )
    tensors[f"{LAYER}mlp.up_proj.weight_zero_point"] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(QCompilerError, match=rf"not zero: '{LAYER}mlp\.up_proj\.weight_zero_point'"):
        read(folder)


def test_layers_with_equal_activation_scales_are_merged(tmp_path: Path, float_model: Path) -> None:
    """q, k and v have different scales here, gate and up the same one; a dynamic scheme merges both groups."""
    tensors = quantized(float_model, by_channel=True)
    tensors[f"{LAYER}mlp.up_proj.input_scale"] = tensors[f"{LAYER}mlp.gate_proj.input_scale"].clone()
    folder = written(tmp_path / "one", float_model, tensors, compressed({**FP8, "strategy": "channel"}, FP8))
    scheme = "fp8_tensor_static{w=channel}"
    pipeline = qcompiler.Pipeline.parse(
        str(qcompiler.pipeline(scheme)).replace("static=true}", "static=true, min_columns=1}", 1)
    )
    merged = qcompiler.compile(folder, pipeline=pipeline, example_inputs=(IDS,), dynamic_shapes=None)
    assert len(merged.graph.ops("kernel.scaled_linear")) == 6
    assert "the activation scales of" in str(merged.skipped["merge-linears"])
    assert torch.allclose(merged(IDS).logits, reference(float_model, tensors), rtol=1e-5, atol=1e-6)


def test_modules_of_transformers_with_static_scales(
    tmp_path: Path, float_model: Path, llm_compressor: tuple[Path, CompiledModel]
) -> None:
    """What transformers itself makes of Ministral-3 on a GPU."""
    folder, compiled = llm_compressor
    tensors = load_file(folder / "model.safetensors")
    said = FineGrainedFP8Config(modules_to_not_convert=["lm_head"], activation_scheme="static")
    said.weight_block_size = None  # type: ignore[assignment]  # as Ministral-3 has it
    model = AUTO.from_pretrained(float_model, dtype=torch.float32).eval()
    model = replace_with_fp8_linear(model, ["lm_head"], said, pre_quantized=True).eval()
    for name, module in model.named_modules():
        if f"{name}.weight_scale" in tensors:
            for key, source in (("weight", "weight"), ("weight_scale_inv", "weight_scale"),
                                ("activation_scale", "input_scale")):  # fmt: skip
                tensor = tensors[f"{name}.{source}"]
                setattr(module, key, torch.nn.Parameter(tensor.reshape(tensor.shape if key == "weight" else ()),
                                                        requires_grad=False))  # fmt: skip
    same = qcompiler.compile(model, scheme="fp8_tensor_static", example_inputs=(IDS,), dynamic_shapes=None)
    assert torch.equal(same(IDS).logits, compiled(IDS).logits)
    same.save_checkpoint(tmp_path / "out", "compressed-tensors", reader=None)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == tensors.keys()
    assert all(torch.equal(ours[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in tensors)
    model.model.layers[0].mlp.up_proj.activation_scale.data.fill_(0)
    with pytest.raises(CaptureError, match=r"beside '.*up_proj\.weight' is not a valid scale: got 0\.0"):
        qcompiler.compile(model, scheme="fp8_tensor_static", example_inputs=(IDS,))


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (torch.tensor([0.0]), "got 0.0; need a positive finite number"),
        (torch.tensor([float("nan")]), "got nan"),
        (torch.tensor([0.5, 0.5]), "got [2]; need one number"),
        (torch.tensor([3]), "got int64"),
    ],
)
def test_what_is_no_activation_scale(tmp_path: Path, float_model: Path, scale: torch.Tensor, words: str) -> None:
    tensors = {**quantized(float_model), f"{LAYER}mlp.up_proj.input_scale": scale}
    folder = written(tmp_path / "wrong", float_model, tensors, compressed(FP8, FP8))
    with pytest.raises(QCompilerError) as error:
        read(folder)
    assert words in str(error.value) and f"{LAYER}mlp.up_proj.input_scale" in str(error.value)


def test_a_dynamic_scheme_says_that_it_does_not_use_them(llm_compressor: tuple[Path, CompiledModel]) -> None:
    compiled = compile_static(llm_compressor[0], "fp8_tensor")
    assert len(compiled.report.quantized) == 7 and not compiled.graph.ops("kernel.quantize_static")
    assert all(
        row.remark.startswith("uses the model's own codes and scales; the model's static activation scale is not used")
        for row in compiled.report.quantized
    )


def test_an_exported_program_keeps_the_scales(llm_compressor: tuple[Path, CompiledModel]) -> None:
    folder, compiled = llm_compressor
    program = torch.export.export(load_model(folder), (IDS,), {"use_cache": False})
    with pytest.raises(PassError, match=r"no scale for lm_head\.weight"):  # a program does not say what it is
        qcompiler.compile(program, scheme="fp8_tensor_static")
    same = qcompiler.compile(program, scheme="fp8_tensor_static", overrides={"lm_head": None})
    assert torch.equal(same(IDS, use_cache=False).logits, compiled(IDS).logits)


def test_the_command_line_needs_no_calibration_either(
    tmp_path: Path,
    llm_compressor: tuple[Path, CompiledModel],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, compiled = llm_compressor
    opened: list[Path] = []

    def open_files(path: Path) -> TensorFiles:
        opened.append(path)
        return TensorFiles(path)

    monkeypatch.setattr(reading, "TensorFiles", open_files)
    call = ["compile", str(folder), "-s", "fp8_tensor_static", "-o", str(tmp_path / "out"), "--fixed-sizes"]
    assert main([*call, "--input", "input_ids=i64[2,9]", "--quiet"]) == 0
    assert compiled.report.summary() in capsys.readouterr().out
    assert opened == [folder]  # headers are read once
    loaded = qcompiler.load(tmp_path / "out")
    assert torch.equal(loaded(IDS).logits, compiled(IDS).logits)


def test_what_lacks_a_scale_is_named(tmp_path: Path, float_model: Path) -> None:
    tensors = quantized(float_model)
    del tensors[f"{LAYER}self_attn.o_proj.input_scale"]
    folder = written(tmp_path / "some", float_model, tensors, compressed(FP8, FP8))
    with pytest.raises(PassError, match=rf"no scale for {LAYER}self_attn\.o_proj\.weight \(.*calibration=batches"):
        compile_static(folder)
    with pytest.raises(PassError, match=r'already quantized: compile it with scheme="fp8_tensor_static"'):
        compile_static(folder, "int8_row")
    some = compile_static(folder, overrides={"*.o_proj": None})
    assert len(some.report.quantized) == 6
    with_data = compile_static(folder, calibration=[IDS])
    stored = {float(tensor) for name, tensor in tensors.items() if name.endswith("input_scale")}
    assert stored < {*map(float, x_scales(with_data))} and len(with_data.report.quantized) == 7


@pytest.mark.parametrize("said", [AUTO_FP8, compressed(FP8, FP8), MODELOPT], ids=lambda said: str(said["quant_method"]))
def test_static_scales_that_the_files_lack_are_noted(tmp_path: Path, float_model: Path, said: dict[str, Any]) -> None:
    tensors = quantized(float_model)
    lost = [name for name in tensors if name.endswith(("q_proj.input_scale", "up_proj.input_scale"))]
    for name in lost:
        del tensors[name]
    found = read(written(tmp_path / "lacks", float_model, tensors, said))
    assert found.notes == (
        "the checkpoint declares static activation scales, but has none for 2 weights, such as "
        f"'{LAYER}mlp.up_proj.weight': the scales of their activations come from calibration, or are computed in each "
        "call",
    )
    lacking = [name for name, how in found.stored.items() if how.x_scale is None]
    assert sorted(lacking) == sorted(name.replace("input_scale", "weight") for name in lost)
    assert not read(written(tmp_path / "whole", float_model, quantized(float_model), said)).notes
