"""Whole models with merged linears: which are merged, equal outputs, and one report row for each layer."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qcompiler
from qcompiler import CompiledModel
from qcompiler.capture import capture
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.runtime.weights import named_tensors
from qcompiler.testing import difference

# transformers compiles some losses with torch.jit.script on import, which is deprecated on newer Pythons.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")

TINY: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 96,
    "max_position_embeddings": 40, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts": 4, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256}
MODEL = {"GPT2": "GPT2LMHeadModel"}


def decoder(name: str, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, MODEL.get(name, f"{name}ForCausalLM"))(
        getattr(hf, f"{name}Config")(**{**TINY, **changes})
    )


QKV, GATE_UP = "q_proj k_proj v_proj", "gate_proj up_proj"
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (decoder("Llama"), [QKV, GATE_UP]),
    "llama, few heads": (decoder("Llama", num_attention_heads=4), [GATE_UP]),  # k and v have 64 columns
    "llama, odd heads": (decoder("Llama", head_dim=96), [GATE_UP]),
    "qwen2": (decoder("Qwen2"), [QKV, GATE_UP]),
    "gemma2": (decoder("Gemma2", head_dim=128, sliding_window=6), [QKV, GATE_UP]),
    "qwen2-moe": (decoder("Qwen2Moe", **MOE), [QKV, GATE_UP]),
    "opt": (decoder("OPT", ffn_dim=384, word_embed_proj_dim=256), [QKV]),
    "falcon": (decoder("Falcon"), []),
    "gpt2": (decoder("GPT2", n_embd=256, n_head=2, n_layer=1, n_positions=40), []),
    "bert": (lambda: hf.BertModel(hf.BertConfig(**TINY)), ["query key value"]),
}


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(rows))


def tokens(rows: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": ids(rows, length)}


def built(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().to(dtype).eval()


@cache
def captured(name: str, dtype: torch.dtype = torch.float32) -> Graph:
    """A captured model, with its weights; `compile` does not change it."""
    return capture(built(name, dtype), (), tokens(2, 7)).graph


def compiled(model: nn.Module | Graph, merge: bool, scheme: str = "fp8_tile", **options: Any) -> CompiledModel:
    pipeline = qcompiler.pipeline(scheme)
    return qcompiler.compile(model, pipeline=pipeline if merge else pipeline.without("merge-linears"), **options)


def groups(fast: CompiledModel) -> list[str]:
    """The last part of each merged module's name, one string per group."""
    found: dict[str, list[str]] = {}
    for op in fast.stages["merge-linears"].ops("aten.slice.Tensor"):
        if op.loc.made_by == "merge-linears":
            found.setdefault(op["x"].name, []).append(op.loc.module.rpartition(".")[2])
    return [" ".join(names) for names in found.values()]


def floats(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def assert_same(merged: CompiledModel, apart: CompiledModel, tolerance: float) -> None:
    for rows, length in ((2, 7), (1, 1), (3, 20), (1, 5), (4, 1)):
        x = ids(rows, length)
        for got, want in zip(floats(merged(x)), floats(apart(x)), strict=True):
            assert difference(got, want) <= tolerance


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    model = built(name)
    merged = compiled(model, True, example_kwargs=tokens(2, 7))
    assert groups(merged) == MODELS[name][1]
    graph = merged.stages["merge-linears"]
    weights = {**merged.graph.weights, **named_tensors(model)}
    for rows, length in ((2, 7), (1, 1), (3, 20), (4, 1)):
        call: dict[str, Any] = tokens(rows, length)
        plain = interpret(merged.stages["dead-code"], merged.flatten((), call), weights)
        joined = interpret(graph, merged.flatten((), call), weights)
        assert all(difference(*pair) < 1e-10 for pair in zip(joined, plain, strict=True) if pair[0].is_floating_point())
        (first, *_) = floats(merged(**call))
        assert difference(first, floats(model(**call))[0]) < 0.01  # the quantization error


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_compiled_models_and_their_reports_do_not_change(name: str) -> None:
    graph = captured(name)
    merged, apart = compiled(graph, True), compiled(graph, False)
    assert_same(merged, apart, 1e-7)  # FP32 sums in a different order; a later code may differ by one step
    rows = {row.name: row for row in merged.report.rows}
    assert rows == {row.name: row for row in apart.report.rows}, "one row for each layer of the model"
    assert merged.report.bytes_after == apart.report.bytes_after
    assert merged.report.bytes_quantized == apart.report.bytes_quantized


def test_in_bf16_and_other_schemes() -> None:
    graph = captured("qwen2", torch.bfloat16)
    for scheme in ("fp8_tile", "int8_row"):
        merged, apart = compiled(graph, True, scheme), compiled(graph, False, scheme)
        assert groups(merged) == MODELS["qwen2"][1]
        assert_same(merged, apart, 1e-5)


def test_channel_scales_have_no_blocks() -> None:
    graph = captured("llama, odd heads")
    fast = compiled(graph, True, "fp8_row{numerics=vllm}")
    assert groups(fast) == [GATE_UP]  # k and v have 96 columns, fewer than 128
    twice = qcompiler.pipeline("fp8_row").replace("merge-linears", "merge-linears{w_format=#fp8_row, min_columns=96}")
    assert groups(qcompiler.compile(graph, pipeline=twice)) == [QKV, GATE_UP]


@cache
def with_outlier() -> Graph:
    """A captured Llama with large weights and an outlier channel."""
    model = built("llama")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5)
        model.get_parameter("model.layers.0.input_layernorm.weight")[3] = 80.0
    return capture(model, (), tokens(2, 7)).graph


@pytest.mark.parametrize("scheme", ["fp8_tile_smooth", "fp8_tensor_static{w=channel}"])
def test_smoothing_and_static_scales_do_not_change(scheme: str) -> None:
    calibration = [(ids(2, 7),), (ids(3, 9),)]
    merged, apart = (compiled(with_outlier(), merge, scheme, calibration=calibration) for merge in (True, False))
    assert groups(merged) == MODELS["llama"][1]
    assert_same(merged, apart, 1e-7)
    names = {row.name: row.remark for row in apart.report.rows if row.is_matmul}
    assert {row.name: row.remark for row in merged.report.rows if row.is_matmul} == names
    scales = {name for name in apart.graph.weights if name.endswith(".scale")}
    assert all(torch.equal(merged.graph.weights[name], apart.graph.weights[name]) for name in scales)
    assert bool(scales) == ("static" in scheme) and any(names.values()) == ("smooth" in scheme)


def test_layers_of_two_schemes_are_not_merged() -> None:
    fast = qcompiler.compile(captured("llama"), overrides={"*.k_proj": "int8_row", "*.up_proj": None})
    assert groups(fast) == ["q_proj v_proj"]
    assert {row.module.rpartition(".")[2] for row in fast.report.skipped} == {"up_proj", "lm_head"}


def test_errors_are_attributed_to_each_layer_separately() -> None:
    graph, call = captured("llama"), (ids(2, 7),)
    rows, want = (
        {row.name: row for row in qcompiler.attribute_error(compiled(graph, merge), call, graph, outputs=True).rows}
        for merge in (True, False)
    )
    assert rows.keys() == want.keys() and len(rows) == 7
    for name, row in rows.items():
        assert row.module == want[name].module
        assert row.own == pytest.approx(want[name].own, abs=0.01)
        assert row.outputs == pytest.approx(want[name].outputs, abs=0.01)
        assert row.inherited == pytest.approx(want[name].inherited, abs=0.05) or min(row.inherited, 120) == 120
