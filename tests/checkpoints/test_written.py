"""Compiled models written as checkpoints: what transformers and compressed-tensors make of them, bit for bit."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import qcompiler
from qcompiler import CompiledModel, QCompilerError, checkpoints, numerics

"""Sizes that blocks do not divide are what these tests are about; `test_readers.py` has the warnings."""

AUTO: Any = AutoModelForCausalLM  # without types

write = partial(checkpoints.write, reader=None)  # sizes that other tools cannot read: see test_readers.py
IDS = torch.arange(18).reshape(2, 9)


class Block(torch.nn.Module):
    """Two linears of one input, which are merged, followed by a third."""

    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.Linear(256, 256)
        self.k = torch.nn.Linear(256, 128)
        self.out = torch.nn.Linear(384, 200, bias=False)
        self.register_buffer("unread", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.q(x).relu(), self.k(x)], -1))  # type: ignore[no-any-return]


def block(**options: Any) -> tuple[Block, CompiledModel]:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(4, 256)
    if "static" in options.get("scheme", ""):
        options["calibration"] = [x, 2 * x]
    return model, qcompiler.compile(model, example_inputs=(x,), **options)


def quantized_by_hand(weight: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return numerics.dequantize(
        *numerics.quantize(weight.detach(), numerics.format_of(block, dtype)), format=numerics.format_of(block, dtype)
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, CompiledModel, Path]:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AUTO.from_config(config, dtype=torch.bfloat16).eval()
    folder = tmp_path_factory.mktemp("llama") / "fp8"
    compiled = qcompiler.compile(model, example_inputs=(IDS,))
    compiled.save_checkpoint(folder, "fp8")
    return model, compiled, folder


def test_transformers_loads_block_fp8_bit_for_bit(llama: tuple[torch.nn.Module, CompiledModel, Path]) -> None:
    model, _, folder = llama
    loaded = AUTO.from_pretrained(folder)  # without a GPU it dequantizes, to the model's bfloat16
    for name, weight in model.named_parameters():
        want: torch.Tensor = weight
        if "proj" in name:
            want = quantized_by_hand(weight, (128, 128), torch.float8_e4m3fn).to(torch.bfloat16)
        assert torch.equal(loaded.get_parameter(name), want), name


def test_names_and_configuration_are_those_that_engines_read(
    llama: tuple[torch.nn.Module, CompiledModel, Path],
) -> None:
    model, compiled, folder = llama
    tensors = load_file(folder / "model.safetensors")
    linears = [name for name, _ in model.named_parameters() if "proj" in name]
    assert {*tensors} == {name for name, _ in model.named_parameters()} | {f"{name}_scale_inv" for name in linears}
    assert all(tensors[name].dtype is torch.float8_e4m3fn for name in linears)
    up = "model.layers.0.mlp.up_proj.weight"
    assert tensors[f"{up}_scale_inv"].dtype is torch.float32 and tensors[f"{up}_scale_inv"].shape == (3, 2)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert any("merged" in str(op.attrs["name"]) for op in compiled.graph.ops("core.param"))  # cut apart again


@pytest.mark.parametrize(
    ("scheme", "w_block", "dtype", "shapes", "weights", "activations"),
    [
        ("fp8_tile", (128, 128), torch.float8_e4m3fn, [(2, 2), (1, 2), (2, 3)],
         {"strategy": "block", "block_structure": [128, 128]}, {"strategy": "group", "group_size": 128}),
        ("fp8_row", (1, -1), torch.float8_e4m3fn, [(256, 1), (128, 1), (200, 1)],
         {"strategy": "channel"}, {"strategy": "token"}),
        ("fp8_tensor_static", (-1, -1), torch.float8_e4m3fn, [(1,), (1,), (1,)],
         {"strategy": "tensor"}, {"strategy": "tensor"}),
        ("int8_row", (1, -1), torch.int8, [(256, 1), (128, 1), (200, 1)],
         {"strategy": "channel"}, {"strategy": "token"}),
        ("int8_tensor_static{w=channel}", (1, -1), torch.int8, [(256, 1), (128, 1), (200, 1)],
         {"strategy": "channel"}, {"strategy": "tensor"}),
    ],
)  # fmt: skip
def test_compressed_tensors_decompresses_bit_for_bit(
    tmp_path: Path, scheme: str, w_block: tuple[int, int], dtype: torch.dtype, shapes: list[tuple[int, ...]],
    weights: dict[str, Any], activations: dict[str, Any],
) -> None:  # fmt: skip
    model, compiled = block(scheme=scheme)
    compiled.save_checkpoint(tmp_path / "out", "compressed-tensors", reader=None)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(said)
    group = parsed.config_groups["group_0"]
    assert not isinstance(group, list) and group.targets == ["Linear"] and parsed.ignore == []
    assert weights.items() <= group.weights.model_dump().items()
    assert activations.items() <= group.input_activations.model_dump().items()
    static = "static" in scheme
    assert group.input_activations.dynamic is not static
    library = BaseCompressor.get_value_from_registry(group.format)
    for name, shape in zip(("q", "k", "out"), shapes, strict=True):
        mine = {"weight": tensors[f"{name}.weight"], "weight_scale": tensors[f"{name}.weight_scale"]}
        assert mine["weight"].dtype is dtype and mine["weight_scale"].shape == shape
        got = library.decompress(mine, group)["weight"]
        assert torch.equal(got, quantized_by_hand(model.get_parameter(f"{name}.weight"), w_block, dtype)), name
        assert (f"{name}.input_scale" in tensors) is static
    assert torch.equal(tensors["q.bias"], model.q.bias) and torch.equal(tensors["unread"], torch.ones(3))


def test_layers_of_several_schemes_are_groups(tmp_path: Path) -> None:
    _model, compiled = block(scheme="fp8_tile", overrides={"out": "int8_row", "k": None})
    write(compiled, tmp_path / "out", "compressed-tensors")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(said)
    targets = {name: (group.targets, group.format) for name, group in parsed.config_groups.items()}
    assert targets == {"group_0": (["q"], "float-quantized"), "group_1": (["out"], "int-quantized")}
    assert parsed.format == "mixed-precision" and parsed.ignore == ["k"]


@pytest.mark.parametrize(
    ("options", "format", "words"),
    [
        ({"scheme": "int8_row"}, "fp8", ["3 of the weights", "q.weight: its codes are int8", "out.weight"]),
        ({"scheme": "fp8_row"}, "fp8", ["its scales are for [1, -1], not for blocks", "compressed-tensors"]),
        ({"scheme": "fp8_tile{dtype=f8e5m2}"}, "compressed-tensors", ["float8_e5m2"]),
        ({"scheme": "int8_channel_reference"}, "compressed-tensors", ["a scale for each channel"]),
        ({"scheme": "int8_tensor"}, "compressed-tensors", ["one scale for all tokens, computed in each call"]),
        ({"scheme": "fp8_tile"}, "float", ["k.weight: it is quantized", "smoothing"]),
        ({"scheme": "fp8_tile"}, "gguf", ["no such checkpoint format", "compressed-tensors"]),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_all_layers(
    tmp_path: Path, options: dict[str, Any], format: str, words: list[str]
) -> None:
    _model, compiled = block(**options)
    with pytest.raises(QCompilerError) as error:
        write(compiled, tmp_path / "out", format)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pipeline", ["canonicalize; fp8-tile", "canonicalize; merge-linears; fp8-tile; fuse-linear"])
def test_weights_that_no_pass_has_stored_are_computed_now(tmp_path: Path, pipeline: str) -> None:
    model, compiled = block(pipeline=pipeline)
    write(compiled, tmp_path / "out", "fp8")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("q", "k", "out"):
        codes, scale = numerics.quantize(model.get_parameter(f"{name}.weight").detach(), numerics.format_of((128, 128)))
        assert torch.equal(tensors[f"{name}.weight"].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(tensors[f"{name}.weight_scale_inv"], scale)


def test_a_transposed_weight_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=128, n_layer=1, n_head=2, vocab_size=64)
    model = AUTO.from_config(config).eval()
    compiled = qcompiler.compile(model, example_inputs=(IDS,))
    with pytest.raises(QCompilerError, match=r"(?s)c_attn\.weight: the model stores it transposed.*Skip these"):
        write(compiled, tmp_path / "out", "fp8")


def test_the_current_folder_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _model, compiled = block()
    monkeypatch.chdir(tmp_path)
    write(compiled, ".", "fp8")
    assert (tmp_path / "model.safetensors").is_file()


def test_a_deleted_model_must_be_given_again(tmp_path: Path) -> None:
    model, compiled = block()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del model
    with pytest.raises(QCompilerError, match="the original model no longer exists"):
        write(compiled, tmp_path / "out", "fp8")
    other = Block()
    other.load_state_dict(state)
    write(compiled, tmp_path / "out", "fp8", model=other)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["q.bias"], state["q.bias"])
    with pytest.raises(QCompilerError, match="not the model that was compiled"):
        write(compiled, tmp_path / "out", "fp8", model=torch.nn.Linear(2, 2))
    with torch.no_grad():
        other.out.weight.add_(1)  # this weight is quantized, so its change is not seen
        other.q.bias.add_(1)
    with pytest.raises(QCompilerError, match=r"other numbers in 'q\.bias'"):
        write(compiled, tmp_path / "out", "fp8", model=other)


class Tied(torch.nn.Module):
    """Two linears with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(128, 128, bias=False), torch.nn.Linear(128, 128, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())  # type: ignore[no-any-return]


def test_a_weight_of_two_names_is_written_under_both(tmp_path: Path) -> None:
    model = Tied().eval()
    compiled = qcompiler.compile(model, example_inputs=(torch.randn(4, 128),))
    write(compiled, tmp_path / "out", "fp8")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {*tensors} == {"a.weight", "a.weight_scale_inv", "b.weight", "b.weight_scale_inv"}
    assert torch.equal(tensors["a.weight"].float(), tensors["b.weight"].float())


def test_shards_have_an_index(tmp_path: Path) -> None:
    _model, compiled = block()
    write(compiled, tmp_path / "one", "fp8")
    write(compiled, tmp_path / "many", "fp8", shard_bytes=70_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole, files = load_file(tmp_path / "one" / "model.safetensors"), sorted({*index["weight_map"].values()})
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name].float(), whole[name].float())
    assert index["weight_map"].keys() == whole.keys()


def test_only_a_checkpoint_is_written_over(tmp_path: Path) -> None:
    _model, compiled = block()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(QCompilerError, match=r"'thesis\.tex'"):
        write(compiled, tmp_path / "mine", "fp8")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    write(compiled, tmp_path / "out", "fp8", shard_bytes=70_000)
    write(compiled, tmp_path / "out", "fp8")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]  # nothing is left beside it


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _model, compiled = block()

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("qcompiler.checkpoints.folders.write_tensors", full)
    with pytest.raises(QCompilerError, match=r"the checkpoint cannot be written: got no space left on device .*out"):
        write(compiled, tmp_path / "out", "fp8")
    assert not [*tmp_path.iterdir()]
