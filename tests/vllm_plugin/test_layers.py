"""vLLM's layers over qcompiler's kernels, bit for bit, on one and on several simulated GPUs."""

from typing import Any

import pytest
import torch
from exact_sums import integers, powers_of_two
from vllm_files import DEPTH, HEAD, HEADS, KV_HEADS, PARTS, files, load, reference

from qcompiler import QCompilerError
from qcompiler.numerics import torch_dtype
from qcompiler.schemes.named import spec_of

WHY = "needs vLLM: make engine"
linear: Any = pytest.importorskip("vllm.model_executor.layers.linear", reason=WHY)
parameter: Any = pytest.importorskip("vllm.model_executor.parameter", reason=WHY)
QCompilerConfig: Any = pytest.importorskip("qcompiler.vllm.config", reason=WHY).QCompilerConfig


pytestmark = pytest.mark.usefixtures("engine")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends to be one of several processes."""

    def be(rank: int, world: int) -> None:
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: world)

    return be


def configured(scheme: str, overrides: dict[str, Any] | None = None, prescaled: tuple[str, ...] = ()) -> Any:
    said = {"quant_method": "qcompiler", "version": 1, "scheme": scheme, "overrides": overrides or {}}
    said["prescaled"] = [*prescaled]
    config = QCompilerConfig.from_config(said)
    config.packed_modules_mapping = {"qkv_proj": [*PARTS], "gate_up_proj": ["gate_proj", "up_proj"]}
    return config


def made(kind: Any, *sizes: Any, scheme: str, prefix: str, prescaled: tuple[str, ...] = (), **options: Any) -> Any:
    with torch.device("cpu"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            config = configured(scheme, None, prescaled)
            return kind(*sizes, quant_config=config, prefix=prefix, return_bias=False, **options)
        finally:
            torch.set_default_dtype(default)


SCHEMES = (
    "fp8_tile", "fp8_tile{k_block=64, numerics=vllm}", "fp8_row", "int8_row", "int8_row{w=tensor}", "fp8_tensor",
    "fp8_tensor_static", "int8_tensor_static{w=channel}",
)  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_merged_q_k_v_has_the_bits_of_its_parts(scheme: str) -> None:
    layer = made(linear.QKVParallelLinear, DEPTH, HEAD, HEADS, KV_HEADS, scheme=scheme, prefix="a.qkv_proj")
    tensors = files(scheme, (192, 64, 64))
    for shard, part in zip("qkv", tensors, strict=True):
        load(layer, part, shard)
    layer.quant_method.process_weights_after_loading(layer)
    x = integers(5, DEPTH, 9).bfloat16()
    assert torch.equal(layer(x), torch.cat([reference(scheme, x, part) for part in tensors], -1))
    assert layer.weight.dtype is torch_dtype(spec_of(scheme).w.element)


@pytest.mark.parametrize(
    ("scheme", "world"), [("fp8_row", 2), ("int8_row", 2), ("fp8_tensor_static", 2), ("fp8_row", 3)]
)
def test_q_k_v_on_several_gpus(scheme: str, world: int, gpus: Any) -> None:
    heads, kv_heads = (6, 2) if world == 2 else (6, 1)  # on 3 GPUs, each holds the same keys and values
    tensors = files(scheme, (heads * HEAD, kv_heads * HEAD, kv_heads * HEAD))
    x = integers(5, DEPTH, 9).bfloat16()
    whole = [reference(scheme, x, part) for part in tensors]
    for rank in range(world):
        gpus(rank, world)
        layer = made(linear.QKVParallelLinear, DEPTH, HEAD, heads, kv_heads, scheme=scheme, prefix="a.qkv_proj")
        for shard, part in zip("qkv", tensors, strict=True):
            load(layer, part, shard)
        layer.quant_method.process_weights_after_loading(layer)
        shares = [y.chunk(world if at == 0 or kv_heads > 1 else 1, -1) for at, y in enumerate(whole)]
        want = torch.cat([each[rank if len(each) > 1 else 0] for each in shares], -1)
        assert torch.equal(layer(x), want), rank


def test_gate_and_up_on_two_gpus_are_cut_at_blocks(gpus: Any) -> None:
    tensors, x = files("fp8_tile", (512, 512)), integers(3, DEPTH, 9).bfloat16()
    whole = [reference("fp8_tile", x, part) for part in tensors]
    for rank in range(2):
        gpus(rank, 2)
        layer = made(linear.MergedColumnParallelLinear, DEPTH, [512, 512], scheme="fp8_tile", prefix="a.gate_up_proj")
        for shard, part in enumerate(tensors):
            load(layer, part, shard)
        layer.quant_method.process_weights_after_loading(layer)
        assert torch.equal(layer(x), torch.cat([each.chunk(2, -1)[rank] for each in whole], -1))


@pytest.mark.parametrize("scheme", ["fp8_tile", "int8_row", "int8_tensor_static"])
def test_a_row_parallel_layer_quantizes_its_share_of_the_input(scheme: str, gpus: Any) -> None:
    ((tensors),) = files(scheme, (96,), 512)
    del tensors["bias"]
    x = integers(3, 512, 9).bfloat16()
    for rank in range(2):
        gpus(rank, 2)
        layer = made(linear.RowParallelLinear, 512, 96, scheme=scheme, prefix="a.down_proj", bias=False,
                     reduce_results=False)  # fmt: skip
        load(layer, tensors)
        layer.quant_method.process_weights_after_loading(layer)
        columns = tensors["weight_scale"].shape[1]
        share = {**tensors, "weight": tensors["weight"].chunk(2, 1)[rank].contiguous()}
        share["weight_scale"] = tensors["weight_scale"].chunk(2 if columns > 1 else 1, 1)[rank if columns > 1 else 0]
        mine = x.chunk(2, 1)[rank]
        assert torch.equal(layer(mine), reference(scheme, mine, share)), rank


@pytest.mark.parametrize("scheme", ["fp8_tile", "int8_row{w=tensor}", "int8_tensor_static"])
@pytest.mark.parametrize(("seeds", "groups"), [((1, 1, 1), 1), ((1, 2, 2), 2)])
def test_factors_of_input_channels(scheme: str, seeds: tuple[int, ...], groups: int) -> None:
    names = tuple(f"a.{part}" for part in PARTS)
    layer = made(linear.QKVParallelLinear, DEPTH, HEAD, HEADS, KV_HEADS, scheme=scheme, prefix="a.qkv_proj",
                 prescaled=names)  # fmt: skip
    tensors = files(scheme, (192, 64, 64))
    for shard, part, seed in zip("qkv", tensors, seeds, strict=True):
        part["input_prescale"] = powers_of_two(DEPTH, seed)
        if "input_scale" in part:
            part["input_scale"] = torch.tensor([1 / 64])
        load(layer, part, shard)
    layer.quant_method.process_weights_after_loading(layer)
    x = integers(5, DEPTH, 9).bfloat16()
    assert torch.equal(layer(x), torch.cat([reference(scheme, x, part) for part in tensors], -1))
    assert len(layer.quantized_groups) == groups, "parts with equal factors are one GEMM"


def test_factors_are_cut_as_the_input_is(gpus: Any) -> None:
    (tensors,) = files("int8_row", (96,), 512)
    tensors = {**tensors, "input_prescale": powers_of_two(512, 1)}
    del tensors["bias"]
    x = integers(3, 512, 9).bfloat16()
    for rank in range(2):
        gpus(rank, 2)
        layer = made(linear.RowParallelLinear, 512, 96, scheme="int8_row", prefix="a.down_proj", bias=False,
                     reduce_results=False, prescaled=("a.down_proj",))  # fmt: skip
        load(layer, tensors)
        layer.quant_method.process_weights_after_loading(layer)
        share = {**tensors, "weight": tensors["weight"].chunk(2, 1)[rank].contiguous()}
        share["input_prescale"] = tensors["input_prescale"].chunk(2)[rank]
        mine = x.chunk(2, 1)[rank]
        assert torch.equal(layer(mine), reference("int8_row", mine, share)), rank


def test_factors_for_a_part_of_a_merged_layer_are_refused() -> None:
    config = configured("int8_row", None, ("a.q_proj", "a.k_proj"))
    layer = made(linear.RowParallelLinear, 128, 128, scheme="int8_row", prefix="a.o_proj")
    with pytest.raises(
        QCompilerError, match=r"only a part has factors of the input channels: got none for 'a\.v_proj'"
    ):
        config.get_quant_method(layer, "a.qkv_proj")


def test_a_cut_inside_a_block_is_refused_before_weights_load(gpus: Any) -> None:
    gpus(0, 2)
    with pytest.raises(QCompilerError, match=r"would cut 'a\.gate_up_proj' inside a block: got 160 of 320 output"):
        made(linear.MergedColumnParallelLinear, DEPTH, [320, 320], scheme="fp8_tile", prefix="a.gate_up_proj")
    with pytest.raises(QCompilerError, match=r"would cut 'a\.down_proj' inside a block: got 160 of 320 input"):
        made(linear.RowParallelLinear, 320, 128, scheme="fp8_tile", prefix="a.down_proj")


def test_parts_with_different_schemes_are_refused() -> None:
    config = configured("fp8_tile", {"a.k_proj": "fp8_row", "a.v_proj": None})
    layer = made(linear.RowParallelLinear, 128, 128, scheme="fp8_tile", prefix="a.o_proj")
    with pytest.raises(QCompilerError, match=r"vLLM merges q_proj, k_proj, v_proj .*fp8_row in 'a\.k_proj', float in"):
        config.get_quant_method(layer, "a.qkv_proj")
    assert isinstance(configured("fp8_tile", {"a.o_proj": None}).get_quant_method(layer, "a.o_proj"),
                      linear.UnquantizedLinearMethod)  # fmt: skip
    with pytest.raises(QCompilerError, match="the checkpoint was written by a newer qcompiler"):
        QCompilerConfig.from_config({"version": 99})


def test_scales_of_an_fp8_cache_are_loaded() -> None:
    attention: Any = pytest.importorskip("vllm.model_executor.layers.attention")
    caches: Any = pytest.importorskip("vllm.model_executor.layers.quantization.kv_cache")
    said = {"version": 1, "scheme": "fp8_tile", "kv_cache_scheme": {"type": "float", "num_bits": 8}}
    layer = attention.Attention.__new__(attention.Attention)  # its class decides
    assert isinstance(QCompilerConfig.from_config(said).get_quant_method(layer, "a.attn"), caches.BaseKVCacheMethod)
    assert configured("fp8_tile").get_quant_method(layer, "a.attn") is None


def test_a_scale_that_the_files_lack_is_an_error() -> None:
    layer = made(linear.RowParallelLinear, 256, 96, scheme="fp8_tile", prefix="a.o_proj", bias=False)
    with pytest.raises(QCompilerError, match=r"the files lack a scale, .*: got 'a\.o_proj\.weight_scale'"):
        layer.quant_method.process_weights_after_loading(layer)
