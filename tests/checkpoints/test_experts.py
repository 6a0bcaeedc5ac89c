"""FP8 experts, separate or stacked in the files, of any size, against transformers with the dequantized weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    Llama4TextConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

import qcompiler
from qcompiler import QCompilerError, numerics
from qcompiler.checkpoints import load_model, read
from qcompiler.checkpoints.quantized_weight import QuantizedWeight
from qcompiler.checkpoints.stacking import coarsened, unstacked
from qcompiler.ir.formats import FP8_BLOCK

AUTO: Any = AutoModelForCausalLM  # without types
IDS = torch.arange(18).reshape(2, 9)
E4M3 = torch.float8_e4m3fn
BLOCKED = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 64, "pad_token_id": 0,
}  # fmt: skip


def qwen3(size: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **COMMON, intermediate_size=128, moe_intermediate_size=size, num_experts=3, num_experts_per_tok=2,
        decoder_sparse_step=1,
    )  # fmt: skip


def in_blocks(weight: torch.Tensor, block: int = 128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and numbers of a matrix in blocks, those at the edge smaller; block by block."""
    codes, numbers = torch.zeros_like(weight, dtype=E4M3), torch.zeros_like(weight)
    scales = torch.zeros(-(-weight.shape[0] // block), -(-weight.shape[1] // block))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scales[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scales[i, j]).to(E4M3)
            numbers[at] = codes[at].float() * scales[i, j]
    return codes, scales, numbers


def whole(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(E4M3)
    return codes, scale, codes.float() * scale


def by_channel(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(E4M3)
    return codes, scale, codes.float() * scale


def apart(folder: Path, config: PretrainedConfig, how: Any, said: dict[str, Any], suffix: str) -> Any:
    """A folder with one tensor per expert, and transformers' model of the numbers that it represents."""
    torch.manual_seed(0)
    AUTO.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    numbers = dict(tensors)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name], tensors[name + suffix], numbers[name] = how(tensors[name])
    save_file(numbers, folder / "model.safetensors", {"format": "pt"})
    model = AUTO.from_pretrained(folder, dtype=torch.float32).eval()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "quantization_config": said}))
    return model


def group(strategy: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


@pytest.mark.parametrize(
    ("size", "how", "said", "suffix", "block"),
    [
        (128, in_blocks, BLOCKED, "_scale_inv", (128, 128)),
        (192, in_blocks, BLOCKED, "_scale_inv", (64, 128)),
        (96, in_blocks, BLOCKED, "_scale_inv", (32, 128)),  # twice 96 has as many blocks as 96 and 96
        (96, whole, group("tensor"), "_scale", (96, -1)),
        (128, whole, group("tensor"), "_scale", (128, 128)),
        (96, by_channel, group("channel"), "_scale", (1, -1)),
    ],
)
def test_experts_of_any_size(tmp_path: Path, size: int, how: Any, said: Any, suffix: str, block: Any) -> None:
    model = apart(tmp_path / "apart", qwen3(size), how, said, suffix)
    loaded: Any = load_model(tmp_path / "apart")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.model.layers[0].mlp.experts.stored_weights["gate_up_proj"].format.block == block


def test_blocks_at_the_edge_are_written_as_they_were_read(tmp_path: Path) -> None:
    apart(tmp_path / "apart", qwen3(96), in_blocks, BLOCKED, "_scale_inv")
    compiled = qcompiler.compile(tmp_path / "apart", example_inputs=(IDS,), dynamic_shapes=None)
    (reason,) = (row.reason for row in compiled.report.skipped if row.weights[0].endswith("gate_up_proj"))
    assert reason.startswith("its weights are stored as #format<f8e4m3fn, block = [32, 128]>")
    compiled.save_checkpoint(tmp_path / "back", "fp8", reader=None)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("apart", "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)


def test_a_stack_that_shares_blocks_is_not_cut(tmp_path: Path) -> None:
    """Twice 96 rows have two blocks; neither is the block of one half."""
    model = AUTO.from_config(qwen3(96), dtype=torch.float32).eval()
    compiled = qcompiler.compile(model, example_inputs=(IDS,), dynamic_shapes=None)
    with pytest.raises(QCompilerError, match=r"up_proj\.weight' begins inside a block; need whole blocks"):
        compiled.save_checkpoint(tmp_path / "out", "fp8")


STACKS: dict[str, Any] = {
    "qwen3": qwen3(128),
    "llama4": Llama4TextConfig(
        **COMMON, intermediate_size=96, intermediate_size_mlp=128, num_local_experts=3, num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    ),
    "gpt-oss": GptOssConfig(**COMMON, intermediate_size=96, num_local_experts=3, num_experts_per_tok=2),
    "qwen3-vl": Qwen3VLMoeConfig(
        text_config={**COMMON, "intermediate_size": 128, "moe_intermediate_size": 96, "num_experts": 3,
                     "num_experts_per_tok": 2, "decoder_sparse_step": 1,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 1e4}},
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
                       "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
}  # fmt: skip


def stack(folder: Path, kind: str, how: Any, said: dict[str, Any], suffix: str) -> Any:
    """A folder with FP8 stacks under the names of transformers' modules, and the model of their numbers."""
    config, torch_model = STACKS[kind], Qwen3VLMoeForConditionalGeneration if kind == "qwen3-vl" else AUTO
    make = getattr(torch_model, "_from_config" if kind == "qwen3-vl" else "from_config")
    torch.manual_seed(0)
    model = make(config, dtype=torch.float32).eval()
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    numbers = dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        parts = [how(expert) for expert in torch.randn_like(tensors[name]) * 0.05]
        codes, scales, values = (torch.stack([part[index] for part in parts]) for index in range(3))
        turned = kind == "qwen3-vl"  # whose files have [E, K, N]
        tensors[name] = codes.transpose(1, 2).contiguous() if turned else codes
        tensors[name + suffix] = scales.transpose(1, 2).contiguous() if turned and scales.dim() == 3 else scales
        numbers[name] = values
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.architectures = [type(model).__name__]
    document = {**json.loads(config.to_json_string()), "quantization_config": said}
    (folder / "config.json").write_text(json.dumps(document))
    model.load_state_dict(numbers)
    return model


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize(
    ("how", "said", "suffix"),
    [
        (in_blocks, BLOCKED, "_scale_inv"),
        (whole, {"quant_method": "modelopt", "quant_algo": "FP8"}, "_weight_scale"),
    ],
    ids=["blocks", "tensor"],
)
def test_stacked_experts(tmp_path: Path, kind: str, how: Any, said: Any, suffix: str) -> None:
    model = stack(tmp_path / "stack", kind, how, said, suffix)
    loaded: Any = load_model(tmp_path / "stack")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_stack_by_output_channel_of_a_model_that_has_k_before_n(tmp_path: Path) -> None:
    """As Llama-4 has it: one scale for each last index, [E, 1, N]."""

    def by_last(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes, scale, numbers = by_channel(weight.t())
        return codes.t().contiguous(), scale.t().contiguous(), numbers.t().contiguous()

    model = stack(tmp_path / "stack", "llama4", by_last, group("channel"), "_scale")
    loaded: Any = load_model(tmp_path / "stack")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_stack_runs_in_the_grouped_kernel_and_is_written_expert_by_expert(tmp_path: Path) -> None:
    stack(tmp_path / "stack", "qwen3", in_blocks, BLOCKED, "_scale_inv")
    compiled = qcompiler.compile(tmp_path / "stack", example_inputs=(IDS,), dynamic_shapes=None)
    assert len(compiled.graph.ops("kernel.grouped_linear")) == 2
    compiled.save_checkpoint(tmp_path / "back", "fp8", reader=None)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("stack", "back"))
    name = "model.layers.0.mlp.experts"
    for expert in range(3):
        for key, rows in (("gate_proj", slice(0, 128)), ("up_proj", slice(128, 256))):
            codes = second[f"{name}.{expert}.{key}.weight"]
            assert torch.equal(codes.float(), first[f"{name}.gate_up_proj"][expert, rows].float())
    up = second[f"{name}.2.up_proj.weight_scale_inv"]
    assert torch.equal(up, first[f"{name}.gate_up_proj_scale_inv"][2, 1:])


def test_experts_with_one_scale_each_run_in_the_grouped_kernel(tmp_path: Path) -> None:
    """As Mixtral's published FP8 folders have them; the same numbers as in blocks with equal scales."""
    apart(tmp_path / "apart", qwen3(128), whole, group("tensor"), "_scale")
    compiled = qcompiler.compile(
        tmp_path / "apart", scheme="fp8_tensor", overrides={"*.experts.*": "fp8_tile"}, example_inputs=(IDS,),
        dynamic_shapes=None,
    )  # fmt: skip
    assert len(compiled.graph.ops("kernel.grouped_linear")) == 2 and len(compiled.report.quantized) == 6
    compiled.save_checkpoint(tmp_path / "back", "compressed-tensors", reader=None)
    first, second = (read(tmp_path / name) for name in ("apart", "back"))
    assert {*first.stored} == {*second.stored}
    for name in first.stored:
        one, other = first.quantized(name), second.quantized(name)
        assert torch.equal(one.codes.float(), other.codes.float()) and torch.equal(one.scale, other.scale), name


def test_one_scale_for_an_expert_is_that_of_both_halves(tmp_path: Path) -> None:
    said = {"quant_method": "modelopt", "quant_algo": "FP8"}
    stack(tmp_path / "stack", "qwen3", whole, said, "_weight_scale")
    part = read(tmp_path / "stack").quantized("model.layers.0.mlp.experts.gate_up_proj")
    model: Any = load_model(tmp_path / "stack")
    held = model.model.layers[0].mlp.experts
    weight = QuantizedWeight(held._parameters["gate_up_proj"], held.gate_up_proj_scale, FP8_BLOCK)
    files = unstacked(model, "model.layers.0.mlp.experts.gate_up_proj", weight, whole=True)
    for expert in range(3):
        for key, rows in (("gate_proj", slice(0, 128)), ("up_proj", slice(128, 256))):
            one = files[f"model.layers.0.mlp.experts.{expert}.{key}.weight"]
            assert one.block == (-1, -1) and torch.equal(one.scale, part.scale[expert])
            assert torch.equal(one.dequantized(), part.dequantized()[expert, rows])


def test_smaller_blocks_that_share_scales_become_the_usual_ones() -> None:
    codes = torch.zeros(192, 128).to(E4M3)
    scale = torch.tensor([[1.0], [1.0], [2.0]])
    usual = coarsened(QuantizedWeight(codes, scale, FP8_BLOCK.with_block((64, 128))))
    assert usual.block == (128, 128) and torch.equal(usual.scale, scale[[0, 2]])
    assert numerics.scale_shape(codes.shape, usual.block) == [2, 1]
    unequal = QuantizedWeight(codes, scale.flip(0), FP8_BLOCK.with_block((64, 128)))
    assert coarsened(unequal) is unequal
    tensor = coarsened(QuantizedWeight(codes, torch.ones(3, 1), FP8_BLOCK.with_block((64, -1))))
    assert tensor.block == (-1, -1) and torch.equal(tensor.scale, torch.ones(1, 1))
