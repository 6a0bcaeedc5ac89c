"""qcompiler's kernels for folders of vLLM's own methods: each linear has the bits of the reference."""

from typing import Any

import pytest
import torch
from exact_sums import integers
from torch import Tensor
from vllm_files import DEPTH, HEAD, HEADS, KV_HEADS, PARTS, as_spec, files, load, reference

from qcompiler.ir.formats import FP8_ROW, FP8_TENSOR
from qcompiler.numerics import torch_dtype
from qcompiler.schemes.pipelines import QuantizationSpec

WHY = "needs vLLM: make engine"
linear: Any = pytest.importorskip("vllm.model_executor.layers.linear", reason=WHY)
existing: Any = pytest.importorskip("qcompiler.vllm.existing", reason=WHY)
QCompilerConfig: Any = pytest.importorskip("qcompiler.vllm.config", reason=WHY).QCompilerConfig
QCompilerLinearMethod: Any = pytest.importorskip("qcompiler.vllm.linear", reason=WHY).QCompilerLinearMethod

pytestmark = pytest.mark.usefixtures("engine")

BLOCKS = {"weight_block_size": [128, 128]}


def fp8(**keys: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]} | keys


def compressed(kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    both = {"type": kind, "num_bits": 8, "symmetric": True}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": both | {"dynamic": False} | weights}
    group["input_activations"] = None if inputs is None else both | {"dynamic": True} | inputs
    return {"quant_method": "compressed-tensors", "format": f"{kind}-quantized",
            "ignore": ["lm_head"], "config_groups": {"group_0": group}}  # fmt: skip


CHANNEL, TENSOR, TOKEN = {"strategy": "channel"}, {"strategy": "tensor"}, {"strategy": "token"}
TILES = {"strategy": "block", "block_structure": [128, 128]}, {"strategy": "group", "group_size": 128}
STATIC = TENSOR | {"dynamic": False}
INT4, PACKED = CHANNEL | {"num_bits": 4}, {"format": "pack-quantized"}

W_TENSOR = QuantizationSpec(FP8_ROW, FP8_TENSOR)

CASES = [
    ("fp8_tile", fp8(**BLOCKS)),
    (W_TENSOR, fp8()),
    ("fp8_tensor_static", fp8(activation_scheme="static")),
    ("fp8_tile", compressed("float", *TILES)),
    ("fp8_row", compressed("float", CHANNEL, TOKEN)),
    (W_TENSOR, compressed("float", TENSOR, TOKEN)),
    ("fp8_tensor", compressed("float", TENSOR, TENSOR)),
    ("fp8_tensor_static", compressed("float", TENSOR, STATIC)),
    ("int8_row", compressed("int", CHANNEL, TOKEN)),
    ("int8_row{w=tensor}", compressed("int", TENSOR, TOKEN)),
    ("int8_tensor_static{w=channel}", compressed("int", CHANNEL, STATIC)),
]


def made(said: dict[str, Any]) -> Any:
    config = QCompilerConfig.from_config(said)
    config.packed_modules_mapping = {"qkv_proj": [*PARTS]}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return linear.QKVParallelLinear(DEPTH, HEAD, HEADS, KV_HEADS, quant_config=config, prefix="a.qkv_proj",
                                        return_bias=False)  # fmt: skip
    finally:
        torch.set_default_dtype(default)


def as_stored(part: dict[str, Tensor], said: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors under the names of the format; a single scale is a vector there."""
    scale = part["weight_scale"].reshape(-1) if part["weight_scale"].numel() == 1 else part["weight_scale"]
    name = "weight_scale_inv" if "weight_block_size" in said else "weight_scale"
    return {key: tensor for key, tensor in part.items() if key != "weight_scale"} | {name: scale}


@pytest.mark.parametrize(("scheme", "said"), CASES)
def test_merged_parts_of_ragged_widths(scheme: str | QuantizationSpec, said: dict[str, Any]) -> None:
    layer, tensors = made(said), files(scheme, (192, 64, 64))
    assert isinstance(layer.quant_method, QCompilerLinearMethod)
    assert layer.quant_method.spec == as_spec(scheme)
    for shard, part in zip("qkv", tensors, strict=True):
        load(layer, as_stored(part, said), shard)
    layer.quant_method.process_weights_after_loading(layer)
    x = integers(5, DEPTH, 9).bfloat16()
    assert torch.equal(layer(x), torch.cat([reference(scheme, x, part) for part in tensors], -1))
    assert layer.weight.dtype is torch_dtype(as_spec(scheme).w.element)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (compressed("float", CHANNEL, None), "its activations are not quantized"),
        (compressed("int", CHANNEL, TOKEN | {"symmetric": False}), "its codes are asymmetric"),
        (compressed("float", CHANNEL, TOKEN) | PACKED, "its weights are stored as 'pack-quantized'"),
        (compressed("int", INT4, TOKEN), "its weights and activations are not both FP8 or both INT8"),
        (compressed("int", {"strategy": "group", "group_size": 32}, TOKEN), "its weights have scales per group"),
    ],
)  # fmt: skip
def test_linears_without_a_kernel_keep_the_method_of_vllm(said: dict[str, Any], why: str) -> None:
    config = QCompilerConfig.from_config(said)
    layer = linear.RowParallelLinear(128, 128)
    assert config._found(layer, "a.o_proj") == why
    assert config._found(layer, "lm_head") is None


def test_a_format_without_a_gpu_kernel_keeps_the_method_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        is_cuda = staticmethod(lambda: True)

    monkeypatch.setattr(existing, "current_platform", Gpu)
    monkeypatch.setattr(existing.Fp8Config, "get_quant_method", lambda *_: None)  # it needs a model
    layer = linear.RowParallelLinear(128, 128)
    for size, ours in (([128, 128], True), ([128, 48], False)):
        method = QCompilerConfig.from_config(fp8(weight_block_size=size)).get_quant_method(layer, "a.o_proj")
        assert isinstance(method, QCompilerLinearMethod) is ours, size


def test_only_a_user_who_asks_gets_the_kernels() -> None:
    override = QCompilerConfig.override_quantization_method
    assert override({"quant_method": "fp8"}, "qcompiler") == "qcompiler"
    assert override({"quant_method": "compressed-tensors"}, "qcompiler") == "qcompiler"
    assert override({"quant_method": "fp8"}, None) is None
    assert override({"quant_method": "awq"}, "qcompiler") is None
