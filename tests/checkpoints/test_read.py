"""Checkpoints read: codes and scales go into the kernels as they are, and come out again bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.utils.quantization_config import FineGrainedFP8Config

import qcompiler
from qcompiler import CaptureError, PassError, QCompilerError, numerics
from qcompiler.capture.stored_weights import Stored, hold
from qcompiler.checkpoints import load_model, read, write
from qcompiler.ir.formats import FP8_BLOCK

"""Sizes that blocks do not divide are what these tests are about; `test_readers.py` has the warnings."""

AUTO: Any = AutoModelForCausalLM  # without types
IDS = torch.arange(18).reshape(2, 9)
UE8M0 = torch.float8_e8m0fnu


def deepseek(
    folder: Path, *, dense: int = 0, scale_dtype: torch.dtype = torch.float32, profile: str = "deepseek"
) -> Path:
    """A folder such as DeepSeek publishes: each linear in blocks of 128, some of them ragged; experts one by one.

    It has one layer: a mixture of experts, or no experts if `dense` is 1.
    """
    config = DeepseekV3Config(
        hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=1, vocab_size=300,
        first_k_dense_replace=dense, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=128, kv_lora_rank=128,
        qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, n_shared_experts=1,
    )  # fmt: skip
    torch.manual_seed(0)
    AUTO.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in list(tensors.items()):
        if "_proj" in name and weight.dim() == 2:
            tensors[name], scale = numerics.quantize(weight, numerics.format_of((128, 128), profile=profile))
            tensors[f"{name}_scale_inv"] = scale.to(scale_dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    edit(folder / "config.json", lambda config: config.update(quantization_config=said))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def assert_same_bytes(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype is theirs[name].dtype and tensor.shape == theirs[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def test_from_deepseek_to_compressed_tensors_and_back_every_byte_is_equal(tmp_path: Path) -> None:
    first = deepseek(tmp_path / "deepseek")
    compiled = qcompiler.compile(str(first), example_inputs=(IDS,))
    assert all(row.remark == "uses the model's own codes and scales" for row in compiled.report.quantized)
    graph = compiled.stages["fp8-tile"]
    assert not any(graph.is_constant(op["x"]) for op in graph.ops("quant.quantize"))  # activations only
    compiled.save_checkpoint(tmp_path / "compressed", "compressed-tensors", reader=None)
    again = qcompiler.compile(tmp_path / "compressed", example_inputs=(IDS,))
    assert torch.equal(again(IDS).logits, compiled(IDS).logits)
    again.save_checkpoint(tmp_path / "back", "fp8", reader=None)
    assert_same_bytes(first, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    names = {*load_file(first / "model.safetensors")}
    assert "model.layers.0.mlp.experts.3.up_proj.weight_scale_inv" in names


def test_power_of_two_scales_keep_their_one_byte(tmp_path: Path) -> None:
    first = deepseek(tmp_path / "deepseek", dense=1, scale_dtype=UE8M0, profile="ue8m0")
    compiled = qcompiler.compile(first, example_inputs=(IDS,), scheme="fp8_tile{scale=ue8m0}")
    write(compiled, tmp_path / "back", "fp8", reader=None)
    assert_same_bytes(first, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"
    tensors = load_file(first / "model.safetensors")  # some write the same bytes as plain numbers
    save_file({name: t.view(torch.uint8) if t.dtype is UE8M0 else t for name, t in tensors.items()},
              first / "model.safetensors", {"format": "pt"})  # fmt: skip
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(read(first).quantized(up).scale, tensors[f"{up}_scale_inv"].to(torch.float32))
    layer: Any = load_model(first).get_submodule(up.removesuffix(".weight"))
    assert torch.equal(layer.weight, read(tmp_path / "back").quantized(up).dequantized(torch.bfloat16))


def small(scale: str = "weight_scale_inv") -> torch.nn.Sequential:
    """A model whose linears hold codes and scales."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128)).eval()
    layers: list[Any] = [model[0], model[2]]
    for layer in layers:
        codes, scales = numerics.quantize(layer.weight.detach(), numerics.format_of((128, 128)))
        layer._parameters["weight"] = torch.nn.Parameter(codes, requires_grad=False)
        layer.register_parameter(scale, torch.nn.Parameter(scales, requires_grad=False))
    return model


def held() -> torch.nn.Sequential:
    model = small()
    for layer in (model[0], model[2]):
        hold(layer, {"weight": Stored("weight_scale_inv", FP8_BLOCK, torch.float32)})
    return model


def test_codes_and_scales_are_taken_as_they_are() -> None:
    model, x = held(), torch.randn(4, 256)
    compiled = qcompiler.compile(model, example_inputs=(x,))
    mine = dict(model.named_parameters())
    assert compiled.graph.weights["0.weight"].data_ptr() == mine["0.weight"].data_ptr()
    assert {row.remark for row in compiled.report.rows} == {"uses the model's own codes and scales"}
    assert compiled.report.bytes_quantized == (256 + 128) * 256
    want = x
    for name, activation in (("0", torch.nn.functional.relu), ("2", torch.nn.Identity())):
        codes, scale = numerics.quantize(want)
        want = activation(numerics.scaled_linear(
            codes, scale, mine[f"{name}.weight"], mine[f"{name}.weight_scale_inv"], mine[f"{name}.bias"],
            out_dtype=torch.float32,
        ))  # fmt: skip
    assert torch.equal(compiled(x), want)
    copied = model.state_dict()
    assert {*copied} == {"0.weight", "0.bias", "0.weight_scale_inv", "2.weight", "2.bias", "2.weight_scale_inv"}


def test_another_granularity_is_refused_with_the_reason() -> None:
    with pytest.raises(PassError, match="stored as #fp8_block, and this scheme has #fp8_row"):
        qcompiler.compile(held(), scheme="fp8_row", example_inputs=(torch.randn(4, 256),))
    left = qcompiler.compile(held(), scheme="fp8_row", example_inputs=(torch.randn(4, 256),), strict=False)
    assert not left.report.quantized
    x = torch.randn(4, 256)
    assert torch.allclose(left(x), held()(x), atol=1e-5)  # dequantized in each call


def test_a_stored_weight_is_not_smoothed() -> None:
    x = torch.randn(4, 256)
    compiled = qcompiler.compile(held(), scheme="fp8_tile_smooth", calibration=[x])
    assert len(compiled.report.quantized) == 2 and not compiled.stages["smoothquant"].ops("aten.mul.Tensor")


def test_modules_of_transformers_with_fp8_weights_can_be_compiled(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model = AUTO.from_config(config, dtype=torch.bfloat16).eval()
    plain = {name: weight.detach() for name, weight in model.named_parameters()}
    said = FineGrainedFP8Config(modules_to_not_convert=["lm_head"])
    model = replace_with_fp8_linear(model, ["lm_head"], said, pre_quantized=True)
    for name, module in model.named_modules():
        if type(module).__name__ == "FP8Linear":
            codes, scales = numerics.quantize(plain[f"{name}.weight"], numerics.format_of((128, 128)))
            module.weight = torch.nn.Parameter(codes, requires_grad=False)
            module.weight_scale_inv = torch.nn.Parameter(scales, requires_grad=False)
    compiled = qcompiler.compile(model.eval(), example_inputs=(IDS,))
    assert len(compiled.report.quantized) == 7
    assert all(type(module).__module__.startswith(("transformers", "torch")) for module in model.modules())
    assert model.model.layers[0].mlp.up_proj.weight.dtype is torch.float8_e4m3fn  # as it was
    write(compiled, tmp_path / "out", "fp8")
    loaded = load_model(tmp_path / "out")
    up = "model.layers.0.mlp.up_proj"
    codes, scales = numerics.quantize(plain[f"{up}.weight"], numerics.format_of((128, 128)))
    want = numerics.dequantize(
        codes, scales, format=numerics.format_of((128, 128), codes.dtype), out_dtype=torch.bfloat16
    )
    layer: Any = loaded.get_submodule(up)
    assert torch.equal(layer.weight, want)


def test_an_fp8_weight_without_a_scale_is_an_error() -> None:
    with pytest.raises(CaptureError, match=r"the FP8 weight '0\.weight' has no scale"):
        qcompiler.compile(small("scale_of_another_name"), example_inputs=(torch.randn(4, 256),))
    with pytest.raises(CaptureError, match="does not say which elements share a scale"):
        qcompiler.compile(small(), example_inputs=(torch.randn(4, 256),))


def test_a_plain_folder_is_loaded_too(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model = AUTO.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "plain")
    loaded = load_model(tmp_path / "plain")
    assert not loaded.training and torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert read(tmp_path / "plain").method is None
    edit(tmp_path / "plain" / "config.json", lambda config: config.update(architectures=["UnknownArchitecture"]))
    with pytest.raises(QCompilerError, match="does not know the architecture"):
        load_model(tmp_path / "plain")


def test_two_weights_that_differ_in_the_files_are_not_tied(tmp_path: Path) -> None:
    """The configuration ties two weights that the files store separately: transformers loads the files' values."""
    folder = deepseek(tmp_path / "one")
    edit(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    tensors = load_file(folder / "model.safetensors")
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    apart: Any = load_model(folder)
    assert torch.equal(apart.lm_head.weight, tensors["lm_head.weight"])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tied: Any = load_model(folder)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_int8_weights_come_back_from_compressed_tensors(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model = AUTO.from_config(config, dtype=torch.bfloat16).eval()
    compiled = qcompiler.compile(model, scheme="int8_row", example_inputs=(IDS,))
    write(compiled, tmp_path / "one", "compressed-tensors")
    again = qcompiler.compile(tmp_path / "one", scheme="int8_row", example_inputs=(IDS,))
    assert torch.equal(again(IDS).logits, compiled(IDS).logits)
    write(again, tmp_path / "two", "compressed-tensors")
    assert_same_bytes(tmp_path / "one", tmp_path / "two")
    with pytest.raises(QCompilerError, match="read from this very folder"):
        write(again, tmp_path / "one", "compressed-tensors")
