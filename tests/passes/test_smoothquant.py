"""The pass smoothquant on whole models: equal outputs, correct reports, and repair of damage from outliers."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qcompiler
from passes.cleanup.canonicalize import Canonicalize
from passes.quantizing.calibrate import Calibrate
from passes.smoothing.smoothquant import SmoothQuant
from qcompiler import numerics
from qcompiler.calibration import Calibration
from qcompiler.capture import capture
from qcompiler.diagnostics.error_report import sqnr
from qcompiler.errors import PassError
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.ir.formats import INT8_TENSOR
from qcompiler.pass_manager.instruments import Validate, relative_error
from qcompiler.pass_manager.pipeline import Effect, Pass, Pipeline
from qcompiler.pass_manager.runner import run_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")

SIZE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96,
}  # fmt: skip
GROUPED: dict[str, Any] = {
    **SIZE, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
O1 = "smoothquant_o1"
TENSOR: dict[str, Any] = {"x_format": INT8_TENSOR, "w_format": INT8_TENSOR}


def make(model: str, config: str, **options: Any) -> Any:
    torch.manual_seed(0)
    made = getattr(hf, model)(getattr(hf, config)(**options)).eval()
    with torch.no_grad():  # gains like those of trained models: not all one
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1 and "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return made


class Experts(nn.Module):
    """A norm, a router, a shared expert, and four experts, one per token."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(width), nn.Linear(width, 4)
        self.shared = nn.Linear(width, width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        chosen = self.router(h).topk(1).indices
        y: Tensor = self.shared(h)
        for index, expert in enumerate(self.experts):
            y = y + expert(h) * (chosen == index)
        return x + y


def ids(_: Any) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(5))}


MODELS: dict[str, tuple[Callable[[], Any], int, int]] = {
    # model, groups with a folded scale, groups with a prescale
    "llama": (lambda: make("LlamaForCausalLM", "LlamaConfig", **{**GROUPED, "num_hidden_layers": 2}), 8, 0),
    "gemma": (lambda: make("Gemma2ForCausalLM", "Gemma2Config", **GROUPED), 4, 0),
    "opt": (
        lambda: make(
            "OPTForCausalLM", "OPTConfig", hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=1,
            num_attention_heads=4, vocab_size=96, max_position_embeddings=16,
        ), 4, 0,
    ),
    "gpt2": (
        lambda: make(
            "GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=16,
            bos_token_id=1, eos_token_id=2,
        ), 3, 1,  # gelu is between the two linears of an MLP
    ),
    "falcon": (  # attention and MLP use the same norm
        lambda: make(
            "FalconForCausalLM", "FalconConfig", hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
            vocab_size=96, parallel_attn=True, bias=False, bos_token_id=1, eos_token_id=2,
        ), 2, 1,  # gelu is between the two linears of an MLP
    ),
    "qwen2_moe": (  # a router, a shared expert and experts in one operation use the same norm
        lambda: make(
            "Qwen2MoeForCausalLM", "Qwen2MoeConfig", **GROUPED, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=32, shared_expert_intermediate_size=48, decoder_sparse_step=1,
        ), 3, 1,
    ),
    "bert": (lambda: make("BertModel", "BertConfig", **SIZE, max_position_embeddings=16), 1, 4),
}  # fmt: skip


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return MODELS[name][0]().to(dtype)


@cache
def captured(name: str, dtype: torch.dtype) -> tuple[Graph, list[Any]]:
    model = model_of(name, dtype)
    found = capture(model, (), ids(model))
    return found.graph, list(found.signature.flatten((), ids(model)))


def prepared(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Graph, list[Any]]:
    """The captured, canonical graph with its calibration."""
    graph, flat = captured(name, dtype)
    graph = graph.clone()
    Canonicalize().run(graph)
    graph.calibration = Calibration([flat])
    Calibrate(**options).run(graph)
    return graph, flat


def outcomes(graph: Graph) -> dict[str, int]:
    """The number of groups with a folded scale, with a prescale, or skipped."""
    seen = {(graph[name].op["input"].name, text) for name, text in graph.remarks.items()}
    words = {"folded": "is folded into", "in front": "multiplied separately", "alone": "not smoothed"}
    return {key: sum(word in text for _, text in seen) for key, word in words.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_powers_of_two_change_no_bit(name: str, dtype: torch.dtype) -> None:
    _, folded, in_front = MODELS[name]
    graph, flat = prepared(name, dtype)
    before = interpret(graph, flat)
    assert SmoothQuant(**TENSOR, pow2=True).run(graph)
    graph.verify(after="smoothquant")
    for old, new in zip(before, interpret(graph, flat), strict=True):
        assert torch.equal(old, new)
    found = outcomes(graph)
    assert (found["folded"], found["in front"], found["alone"]) == (folded, in_front, 0), graph.remarks


@pytest.mark.parametrize("name", MODELS)
def test_any_scale_changes_only_the_rounding(name: str) -> None:
    check = Validate()
    pipeline = Pipeline.parse("canonicalize; dead-code; calibrate").append(SmoothQuant(**TENSOR, alpha=0.8))
    graph, flat = captured(name, torch.float32)
    graph = graph.clone()
    graph.calibration = Calibration([flat])
    run_pipeline(pipeline, graph, instruments=[check], inputs=flat)
    assert 0 < check.errors["smoothquant"] < 2e-5


def test_it_declares_exact_only_for_powers_of_two() -> None:
    assert SmoothQuant().effect is Effect.REORDERS
    assert SmoothQuant(pow2=True).effect is Effect.EXACT
    parsed = Pass.parse("smoothquant{pow2=true}")
    assert parsed.effect is Effect.EXACT and str(parsed) == "smoothquant{pow2=true}"
    assert SmoothQuant.effect is Effect.REORDERS


@pytest.mark.parametrize("scheme", ["smoothquant_o1{pow2=true}", "smoothquant_o2", "smoothquant_o3", "smoothquant_fp8"])
def test_validate_checks_the_declared_effect_of_every_pass(scheme: str) -> None:
    graph, flat = captured("llama", torch.bfloat16)
    check = Validate()
    fast = qcompiler.compile(graph, scheme=scheme, calibration=[flat], instruments=[check], example_inputs=flat)
    assert {"smoothquant", "quantize", "fuse-prescale", "fold-constants"} <= set(check.errors)
    assert check.errors["smoothquant"] == 0 if "pow2" in scheme else check.errors["smoothquant"] < 0.03
    assert relative_error(interpret(graph, flat)[0], fast(*flat)[0]) < 0.2


def test_experts_and_their_router_are_compensated() -> None:
    torch.manual_seed(1)
    model = Experts().eval()
    x = torch.randn(2, 9, 64) * torch.where(torch.arange(64) == 5, 30.0, 1.0)
    found = capture(model, (x,), {})
    graph, flat = found.graph, list(found.signature.flatten((x,), {}))
    graph.calibration = Calibration([flat])
    check = Validate()
    done = run_pipeline(Pipeline((Calibrate(), SmoothQuant(**TENSOR))), graph, instruments=[check], inputs=flat)
    assert 0 < check.errors["smoothquant"] < 2e-6
    router = next(op for op in graph.ops("aten.linear") if op.loc.module == "router")
    assert router["weight"].op.name == "aten.mul.Tensor"
    assert router.result.name not in done.remarks  # it is not quantized, only compensated
    assert len(done.remarks) == 5 and all("is folded into %layer_norm" in text for text in done.remarks.values())


def test_an_excluded_layer_is_compensated_too() -> None:
    graph, flat = prepared("llama")
    before = interpret(graph, flat)[0]
    SmoothQuant(**TENSOR, layers=("*", "!*.k_proj")).run(graph)
    assert relative_error(before, interpret(graph, flat)[0]) < 2e-5
    keys = [op for op in graph.ops("aten.linear") if op.loc.module.endswith("k_proj")]
    assert all(op["weight"].op.name == "aten.mul.Tensor" and op.result.name not in graph.remarks for op in keys)
    assert "excludes it" in SmoothQuant(layers=("*", "!*.k_proj")).explain(graph)[keys[0].result.name]


def test_the_users_model_does_not_change() -> None:
    model = model_of("gemma")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qcompiler.compile(model, scheme="smoothquant_o3", calibration=[ids(model)])
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_gemmas_gain_is_folded_in_its_effective_form() -> None:
    """(1 + w) / s, rounded once; w' = (1 + w) / s - 1 would lose small gains when 1 is added again."""
    graph, _ = prepared("gemma")
    norm = next(op for op in graph.ops("aten.linear") if op.loc.module.endswith("layers.0.self_attn.q_proj"))
    gain = next(arg for arg in norm["input"].op.args if isinstance(arg, qcompiler.Value) and graph.is_constant(arg))
    assert gain.op.name.startswith("aten.add")  # 1 + w
    x = norm["input"]
    SmoothQuant(**TENSOR).run(graph)
    scaled = next(arg for arg in graph[x.name].op.args if isinstance(arg, qcompiler.Value) and graph.is_constant(arg))
    assert scaled.op.name == "aten.mul.Tensor" and gain in [arg for arg in scaled.op.args]
    s = graph.weights[next(name for name in graph.weights if name.startswith(f"{x.name}.smooth"))]
    qcompiler.Pass.parse("fold-constants").run(graph)
    folded = next(arg for arg in graph[x.name].op.args if isinstance(arg, qcompiler.Value) and graph.is_constant(arg))
    w = dict(model_of("gemma").named_parameters())["model.layers.0.input_layernorm.weight"]
    assert folded.op.name == "core.param" and s.shape == w.shape
    got = graph.weights[str(folded.op.attrs["name"])]
    assert torch.equal(got, (1 + w) * s) or torch.equal(got, (1 + w) * (1 / s))


@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_calibration_has_statistics_of_smoothed_values(alpha: Any) -> None:
    """They equal the statistics from observing the smoothed graph."""
    graph, flat = prepared("gpt2", rows=32)
    original = graph.calibration
    SmoothQuant(**TENSOR, alpha=alpha).run(graph)
    known, again = graph.calibration, Calibration([flat])
    assert known is not original
    values = {op["input"].name for op in graph.ops("aten.linear") if op.result.name in graph.remarks}
    again.observe(graph, values)
    for name in values:
        torch.testing.assert_close(known.statistics[name].absmax, again.statistics[name].absmax, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_outliers_ruin_int8_and_smoothing_repairs_it() -> None:
    torch.manual_seed(2)
    norm, first = nn.LayerNorm(128), nn.Linear(128, 128)
    norm.weight[[5, 77]] *= 60  # outlier channels, as in large language models
    first.weight[:, [5, 77]] /= 60
    model = nn.Sequential(norm, first, nn.ReLU(), nn.Linear(128, 64)).eval()
    batches = [torch.randn(16, 128) for _ in range(4)]
    x = torch.randn(64, 128)
    errors = {
        scheme: relative_error(model(x), qcompiler.compile(model, scheme=scheme, calibration=batches)(x))
        for scheme in ("int8_tensor", "smoothquant_o2", "smoothquant_o2{alpha=search}", "smoothquant_o2{alpha=learn}")
    }
    assert errors["int8_tensor"] > 0.2
    assert max(error for scheme, error in errors.items() if scheme != "int8_tensor") < 0.04


@torch.no_grad()
def test_tiles_are_smoothed_only_if_the_error_decreases_enough() -> None:
    torch.manual_seed(3)
    norm, linear = nn.LayerNorm(256), nn.Linear(256, 128)
    model = nn.Sequential(norm, linear).eval()
    batches = [torch.randn(32, 256) for _ in range(4)]
    plain = qcompiler.compile(model, scheme="fp8_tile_smooth", calibration=batches)
    (row,) = plain.report.quantized
    assert "not smoothed: it would not reduce the error enough (error 0.0" in row.remark
    assert torch.equal(plain(batches[0]), qcompiler.compile(model, example_inputs=(batches[0],))(batches[0]))
    linear.weight[:, ::128] *= 2.0**18  # one weight channel, much larger than its neighbors, spoils their blocks
    norm.weight[::128] /= 2.0**18
    norm.bias.zero_()
    helped = qcompiler.compile(model, scheme="fp8_tile_smooth", calibration=batches)
    (row,) = helped.report.quantized
    assert row.remark.startswith("smoothed, alpha by search, error 0.")
    x = torch.randn(64, 256)
    tile = qcompiler.compile(model, scheme="fp8_tile", example_inputs=(x,))
    assert relative_error(model(x), helped(x)) < 0.9 * relative_error(model(x), tile(x))


def test_a_scale_that_cannot_be_folded_becomes_a_prescale() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval()
    x = torch.randn(8, 64)
    fast = qcompiler.compile(model, scheme="smoothquant_o1", calibration=[x])
    first, second = fast.report.quantized
    assert first.remark == (
        "smoothed, alpha 0.5: 1/s is multiplied separately, since a graph input cannot absorb a scale (%input)"
    )
    assert second.remark == (
        "smoothed, alpha 0.5: 1/s is multiplied separately, since aten.gelu does not commute with a scale (%gelu)"
    )
    assert [len(op.args) for op in fast.stages["to-kernels"].ops("kernel.quantize")] == [2, 2]  # a prescale
    assert not fast.graph.ops("aten.mul.Tensor")
    pipeline = qcompiler.pipeline("smoothquant_o1").replace("smoothquant", "smoothquant{prescale=false}")
    plain = qcompiler.compile(model, pipeline=pipeline, calibration=[x])
    assert "not smoothed: aten.gelu does not commute with a scale (%gelu); prescale is off" in str(
        plain.report.quantized[1].remark
    )


@torch.no_grad()
def test_a_weight_with_one_scale_that_smoothing_makes_uneven_is_remarked() -> None:
    """A channel that is 1000 times the others becomes a column of the weight that is 32 times the others."""
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(256), nn.Linear(256, 128)
    model = nn.Sequential(norm, linear).eval()
    norm.weight[7] *= 1000
    x = torch.randn(64, 256)

    def remark(scheme: str) -> str:
        (row,) = qcompiler.compile(model, scheme=scheme, calibration=[x]).report.quantized
        return row.remark

    found = re.search(r"; its weight has one scale and loses (\d+) dB: use w=channel, or alpha=search$", remark(O1))
    smoothed = linear.weight.clone()
    smoothed[:, 7] *= 1000**0.5
    plain, uneven = (
        sqnr(w, numerics.dequantize(*numerics.quantize(w, INT8_TENSOR), format=INT8_TENSOR))
        for w in (linear.weight, smoothed)
    )
    assert found is not None and float(found[1]) == pytest.approx(plain - uneven, abs=2)
    assert "loses" not in remark(O1 + "{w=channel}") and "loses" not in remark("smoothquant_fp8")
    norm.weight[7] /= 1000
    assert "loses" not in remark(O1)


@torch.no_grad()
def test_an_expert_without_tokens_keeps_a_neutral_scale() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.first, self.second = nn.Linear(16, 2), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            chosen = self.router(x).topk(1).indices
            y: Tensor = self.first(x * (chosen == 0)) + self.second(x * (chosen == 1))
            return y

    model = Gated().eval()
    with torch.no_grad():
        model.router.weight.zero_()
        model.router.bias.copy_(torch.tensor([1.0, -1.0]))  # all tokens go to the first expert
    batch = torch.randn(4, 16)
    fast = qcompiler.compile(model, scheme="smoothquant_o3", calibration=[batch])
    remarks = {row.module: row.remark for row in fast.report.quantized}
    assert remarks["second"] == "not smoothed: calibration saw no token, so its scale is neutral"
    assert remarks["first"].startswith("smoothed, ")
    assert [row.unseen for row in fast.calibration.coverage.rows] == [True, False]  # type: ignore[union-attr]
    assert [op.name for op in fast.graph.ops() if op.loc.module == "second" and "quantize" in op.name] == [
        "kernel.quantize"  # a dynamic scale, because no static one is known
    ]
    assert relative_error(model(batch), fast(batch)) < 0.05


@pytest.mark.parametrize(("options", "message"), [
    ({"alpha": 1.5}, "option 'alpha' of pass 'smoothquant' is out of range: got 1.5; need 0 to 1"),
    ({"alpha": "best"}, "option 'alpha' of pass 'smoothquant' has a wrong value: got 'best'"),
    ({"static": True}, "a static scale must cover the whole tensor"),
])  # fmt: skip
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError) as error:
        SmoothQuant(**options)
    assert str(error.value).startswith(message)


def test_without_calibration_the_message_says_how_to_give_it() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    with pytest.raises(PassError) as error:
        qcompiler.compile(model, scheme="smoothquant_o3", example_inputs=(torch.ones(2, 8),))
    assert str(error.value) == (
        "the scheme 'smoothquant_o3' needs calibration data, and there is none. "
        "Give some: compile(..., calibration=batches), a list of real calls of the model."
    )
