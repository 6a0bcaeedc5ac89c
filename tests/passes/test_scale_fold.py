"""Folding a scale into weights: equal bits for powers of two, and the resulting graph."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.analyses.channel_scale import ScaleRegion, solve
from passes.cleanup.canonicalize import Canonicalize
from passes.cleanup.fold_constants import FoldConstants
from passes.smoothing.scale_fold import fold
from qcompiler.capture import capture
from qcompiler.errors import PassError
from qcompiler.interpreter import interpret
from qcompiler.ir import DType, Graph, Value
from qcompiler.ir.formats import FP8_BLOCK
from qcompiler.testing import assert_text, difference, random_graph, random_inputs

transformers = pytest.importorskip("transformers")
# transformers compiles some losses with torch.jit.script on import, which is deprecated on newer Pythons.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")

SIZE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IDS = torch.tensor([[5, 9, 90, 17, 3, 44, 8], [71, 6, 6, 23, 50, 12, 31]])

FOLDS = {"q": True, "o": True, "gate": True, "down": True, "head": True}
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, bool]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, FOLDS),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED, FOLDS),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        {**SIZE, "ffn_dim": 96, "word_embed_proj_dim": 64},
        {"q": True, "out": True, "fc1": True, "fc2": True, "head": True},
    ),
    "mixtral": (
        "MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"q": True, "o": True, "gate": False, "head": True},
    ),
    "neox": (
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZE, "use_parallel_residual": True},
        {"query": True, "dense": True, "dense_h": True, "dense_4h": False, "head": True},
    ),
    "bert": (
        "BertModel", "BertConfig", SIZE,
        {"query": False, "attention.output": True, "intermediate": False, "output": False, "pooler": False},
    ),
}  # fmt: skip
"""Model and configuration, and whether the input of each group of linears can be scaled, in order.

For Llama: q/k/v, o (through attention with grouped heads), gate/up, down (through the multiplication), and the head.
"""


@cache
def captured(name: str, dtype: torch.dtype) -> Graph:
    model, config, options, _ = MODELS[name]
    torch.manual_seed(0)
    module = getattr(transformers, model)(getattr(transformers, config)(**options)).eval().to(dtype)
    graph = capture(module, kwargs={"input_ids": IDS}, check=False).graph
    Canonicalize().run(graph)
    return graph


def linear_inputs(graph: Graph) -> list[Value]:
    return list(dict.fromkeys(op["input"] for op in graph.ops("aten.linear")))


def scale(region: ScaleRegion, seed: int, *, exact: bool) -> torch.Tensor:
    """One random factor per class: a power of two, or any number from 1/4 to 4."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(max(region.classes) + 1, generator=generator) * 4 - 2
    return torch.exp2(exponents.round() if exact else exponents)[torch.tensor(region.classes)]


def fold_all(graph: Graph, *, exact: bool, seed: int = 0) -> list[bool]:
    """Scales the input of each linear where that is valid; returns which inputs."""
    types = {value.name: str(value.type) for op in graph for value in op.results}
    legal = []
    for at, value in enumerate(linear_inputs(graph)):
        region = solve(graph, value)
        legal.append(isinstance(region, ScaleRegion))
        if isinstance(region, ScaleRegion):
            fold(graph, region, scale(region, seed + at, exact=exact), "smooth", value.name)
            graph.verify("smooth")
    after = {value.name: str(value.type) for op in graph for value in op.results}
    assert types.items() <= after.items()
    return legal


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in MODELS] + [(name, torch.bfloat16) for name in ("llama", "opt")],
)
def test_powers_of_two_leave_every_bit_of_a_model(name: str, dtype: torch.dtype) -> None:
    graph = captured(name, dtype).clone()
    want = interpret(graph, [IDS])
    assert fold_all(graph, exact=True) == list(MODELS[name][3].values())
    got = interpret(graph, [IDS])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    longer = IDS.repeat(2, 2)
    pairs = zip(interpret(graph, [longer]), interpret(captured(name, dtype), [longer]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_any_scale_changes_a_model_only_by_rounding(name: str) -> None:
    graph = captured(name, torch.float32).clone()
    want = interpret(graph, [IDS])
    fold_all(graph, exact=False)
    for a, b in zip(interpret(graph, [IDS]), want, strict=True):
        assert 0 < float((a - b).norm() / b.norm()) < 2e-5


def test_which_linears_of_llama_share_a_region() -> None:
    graph = captured("llama", torch.float32)
    regions = [solve(graph, value) for value in linear_inputs(graph)]
    counts = [(len(set(r.classes)), len(r.classes), len(r.linears)) for r in regions if isinstance(r, ScaleRegion)]
    assert counts == [(64, 64, 3), (32, 64, 1), (64, 64, 2), (96, 96, 1), (64, 64, 1)]


HEAD = """
func @m(%x: f32[s0, 4], %ids: i64[s0]) -> (f32[s0, 3]) where s0 in 1.. {
  %g = core.param() {name = "norm"} : bf16[4]
  %w = core.param() {name = "w"} : bf16[3, 4]
  %h = aten._to_copy(%x) {dtype = bf16} : bf16[s0, 4]
"""


def small(expression: str, name: str = "n", store: bool = True) -> tuple[Graph, ScaleRegion, torch.Tensor]:
    graph = Graph.parse(HEAD + expression + "\n}")
    inputs, weights = random_inputs(graph, 0, {"s0": 5})
    graph.weights = weights if store else {}
    region = solve(graph, graph[name])
    assert isinstance(region, ScaleRegion), str(region)
    return graph, region, inputs[0]


NORM = """
  %n = aten.mul.Tensor(%g, %h) : bf16[s0, 4]
  %y = aten.linear(%n, %w) : bf16[s0, 3] loc("m.py":7 in "fc")
  %out = aten._to_copy(%y) {dtype = f32} : f32[s0, 3]
  return %out
"""


def test_the_resulting_graph() -> None:
    graph, region, _ = small(NORM)
    fold(graph, region, torch.tensor([1.0, 2.0, 4.0, 0.5]), "smooth", "norm.smooth")
    assert_text(
        graph,
        """
        func @m(%x: f32[s0, 4], %ids: i64[s0]) -> (f32[s0, 3]) where s0 in 1.. {
          %g = core.param() {name = "norm"} : bf16[4]
          %w = core.param() {name = "w"} : bf16[3, 4]
          %h = aten._to_copy(%x) {dtype = bf16} : bf16[s0, 4]
          %norm.smooth_inverse = core.param() {name = "norm.smooth_inverse"} : f32[4] loc(by "smooth")
          %g_scaled_f32 = aten.mul.Tensor(%g, %norm.smooth_inverse) : f32[4] loc(by "smooth")
          %g_scaled = aten._to_copy(%g_scaled_f32) {dtype = bf16} : bf16[4] loc(by "smooth")
          %n = aten.mul.Tensor(%g_scaled, %h) : bf16[s0, 4]
          %norm.smooth = core.param() {name = "norm.smooth"} : f32[4] loc("m.py":7 in "fc" by "smooth")
          %w_scaled_f32 = aten.mul.Tensor(%w, %norm.smooth) : f32[3, 4] loc("m.py":7 in "fc" by "smooth")
          %w_scaled = aten._to_copy(%w_scaled_f32) {dtype = bf16} : bf16[3, 4] loc("m.py":7 in "fc" by "smooth")
          %y = aten.linear(%n, %w_scaled) : bf16[s0, 3] loc("m.py":7 in "fc")
          %out = aten._to_copy(%y) {dtype = f32} : f32[s0, 3]
          return %out
        }
        """,
        locations=True,
    )
    assert graph.weights["norm.smooth_inverse"].tolist() == [1.0, 0.5, 0.25, 2.0]
    assert graph.weights["norm.smooth"].tolist() == [1.0, 2.0, 4.0, 0.5]
    graph.verify()


def test_the_first_result_of_native_layer_norm() -> None:
    expression = "%n, %a, %b = aten.native_layer_norm(%h, [4], %g, %g, 1e-05) : bf16[s0, 4], f32[s0, 1], f32[s0, 1]"
    graph, region, x = small(NORM.replace("%n = aten.mul.Tensor(%g, %h) : bf16[s0, 4]", expression))
    (want,) = interpret(graph, [x, None])
    fold(graph, region, torch.tensor([1.0, 2.0, 4.0, 0.5]), "smooth", "norm.smooth")
    graph.verify()
    assert torch.equal(interpret(graph, [x, None])[0], want)
    assert len(graph.ops("core.param")) == 4


def test_weights_with_other_users_do_not_change() -> None:
    expression = """
  %e = aten.embedding(%w, %ids) : bf16[s0, 4]
  %n = aten.mul.Tensor(%g, %h) : bf16[s0, 4]
  %y = aten.linear(%n, %w) : bf16[s0, 3]
  %z = aten.linear(%e, %w) : bf16[s0, 3]
  %v = aten.mul.Tensor(%g, %e) : bf16[s0, 4]
  %t = aten.linear(%v, %w) : bf16[s0, 3]
  %a = aten.add.Tensor(%y, %z) : bf16[s0, 3]
  %b = aten.add.Tensor(%a, %t) : bf16[s0, 3]
  %out = aten._to_copy(%b) {dtype = f32} : f32[s0, 3]
  return %out
"""
    graph, region, x = small(expression)
    ids = torch.tensor([0, 2, 1, 1, 0])
    stored = {name: tensor.clone() for name, tensor in graph.weights.items()}
    want = interpret(graph, [x, ids])
    fold(graph, region, torch.tensor([8.0, 2.0, 4.0, 0.5]), "smooth", "norm.smooth")
    assert all(torch.equal(a, b) for a, b in zip(interpret(graph, [x, ids]), want, strict=True))
    assert all(torch.equal(graph.weights[name], tensor) for name, tensor in stored.items())
    assert graph["z"].op["weight"] is graph["w"] and graph["y"].op["weight"] is not graph["w"]


RESIDUAL = """
  %s = core.param() {name = "s"} : bf16[4, 4]
  %b = core.param() {name = "b"} : bf16[4]
  %n = aten.mul.Tensor(%g, %h) : bf16[s0, 4]
  %q = aten.linear(%n, %s, %b) : bf16[s0, 4]
  %k = aten.linear(%n, %s) {bias = %b} : bf16[s0, 4]
  %r = aten.add.Tensor(%n, %q) : bf16[s0, 4]
  %t = aten.add.Tensor(%r, %k) : bf16[s0, 4]
  %y = aten.linear(%t, %w) : bf16[s0, 3]
  %out = aten._to_copy(%y) {dtype = f32} : f32[s0, 3]
  return %out
"""


def test_rows_and_columns_of_one_weight() -> None:
    graph, region, x = small(RESIDUAL)
    (want,) = interpret(graph, [x, None])
    fold(graph, region, torch.tensor([1.0, 2.0, 4.0, 0.5]), "smooth", "norm.smooth")
    graph.verify()
    assert torch.equal(interpret(graph, [x, None])[0], want)
    added = [name for name in graph.weights if "smooth" in name]
    assert added == ["norm.smooth_inverse", "norm.smooth"]  # one vector for all divisions, one for all multiplications


def test_a_second_scale_after_the_first() -> None:
    graph, region, x = small(NORM)
    (want,) = interpret(graph, [x, None])
    for factor in (2.0, 0.25):
        fold(graph, region, torch.full((4,), factor), "smooth", "norm.smooth")
        graph.verify()
    assert torch.equal(interpret(graph, [x, None])[0], want)
    assert [name for name in graph.weights if "smooth" in name] == [
        "norm.smooth_inverse", "norm.smooth", "norm.smooth_inverse_1", "norm.smooth_1",
    ]  # fmt: skip


def test_value_and_weight_names_that_are_already_used() -> None:
    graph, region, _ = small(NORM)
    graph.rename(graph["y"], "norm.smooth")
    graph.weights["norm.smooth"] = torch.ones(1)
    fold(graph, region, torch.ones(4), "smooth", "norm.smooth")
    graph.verify()
    assert graph.weights["norm.smooth"].shape == (1,) and graph["norm.smooth"].op.name == "aten.linear"


def test_a_graph_without_weight_data_is_rewritten_too() -> None:
    graph, region, _ = small(NORM, store=False)
    fold(graph, region, torch.full((4,), 2.0), "smooth", "norm.smooth")
    graph.verify()
    assert not graph.weights and len(graph.ops("core.param")) == 4


@pytest.mark.parametrize(
    ("s", "message"),
    [
        (torch.ones(3), "the scale of %n has the wrong type or shape: got torch.float32 of shape [3]; need f32[4]"),
        (torch.ones(4, dtype=torch.float64), "the scale of %n has the wrong type or shape: got torch.float64"),
        (torch.tensor([1.0, 0.0, 1.0, 1.0]), "the scale of %n has invalid entries: got 0.0"),
        (torch.tensor([1.0, 1.0, -2.0, 1.0]), "the scale of %n has invalid entries: got -2.0"),
        (torch.tensor([1.0, torch.inf, 1.0, 1.0]), "the scale of %n has invalid entries: got inf"),
        (torch.tensor([torch.nan, 1.0, 1.0, 1.0]), "the scale of %n has invalid entries: got nan"),
        (torch.tensor([1.0, 1.0, 1.0, 1e-40]), "the scale of %n has invalid entries: got 9.9"),
    ],
)
def test_invalid_scales(s: torch.Tensor, message: str) -> None:
    graph, region, _ = small(NORM)
    before = str(graph)
    with pytest.raises(PassError) as error:
        fold(graph, region, s, "smooth", "norm.smooth")
    assert str(error.value).startswith(message) and "pass 'smooth'" in str(error.value)
    assert str(graph) == before


def test_tied_channels_need_equal_factors() -> None:
    expression = NORM.replace("%n =", "%m =").replace(
        "%y =", "%f = aten.flip(%m, [1]) : bf16[s0, 4]\n%n = aten.add.Tensor(%m, %f) : bf16[s0, 4]\n%y ="
    )
    graph, region, x = small(expression)
    assert region.classes == (0, 1, 1, 0)
    with pytest.raises(PassError) as error:
        fold(graph, region, torch.tensor([1.0, 2.0, 2.0, 4.0]), "smooth", "norm.smooth")
    assert str(error.value).startswith("channels 0 and 3 of %n must have the same scale: got 1.0 and 4.0; need equal")
    (want,) = interpret(graph, [x, None])
    fold(graph, region, torch.tensor([4.0, 2.0, 2.0, 4.0]), "smooth", "norm.smooth")
    assert torch.equal(interpret(graph, [x, None])[0], want)


def test_a_region_of_another_graph() -> None:
    graph, region, _ = small(NORM)
    with pytest.raises(PassError) as error:
        fold(graph.clone(), region, torch.ones(4), "smooth", "norm.smooth")
    assert "left the graph" in str(error.value) and "Solve the scale region again" in str(error.value)


def test_scaled_weights_are_folded_when_they_are_quantized() -> None:
    graph, region, _ = small(NORM)
    fold(graph, region, torch.full((4,), 2.0), "smooth", "norm.smooth")
    assert graph.is_constant(graph["w_scaled"])
    weight = graph["y"].op["weight"]
    attrs: dict[str, Any] = {"format": FP8_BLOCK}
    op = graph.insert(graph["y"].op, "quant.quantize", weight, attrs=attrs)
    back = graph.insert(
        graph["y"].op, "quant.dequantize", *op.results, attrs={"format": FP8_BLOCK, "out_dtype": DType.bf16}
    )
    graph.replace_in(graph["y"].op, weight, back.result)
    assert FoldConstants().run(graph)
    graph.verify()
    assert "norm.smooth" not in graph.weights and "w" not in graph.weights


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_every_valid_scale_in_a_random_graph_keeps_the_numbers(seed: int) -> None:
    graph = random_graph(seed, runnable=True, size=20)
    inputs, weights = random_inputs(graph, seed)
    graph.weights = weights
    want = interpret(graph, inputs)
    fold_all(graph, exact=True, seed=seed)
    for got, old in zip(interpret(graph, inputs), want, strict=True):
        assert difference(got, old) <= (1e-6 if old.dtype is torch.float16 else 0)
