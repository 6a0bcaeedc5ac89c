"""quantize: numbers equal to `numerics` for every granularity, static scales from calibration, and layer selection."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from passes.quantizing.quantize import Quantize
from qcompiler import numerics
from qcompiler.calibration import Calibration
from qcompiler.errors import PassError, QCompilerError
from qcompiler.interpreter import interpret
from qcompiler.ir import DType, Format, Graph
from qcompiler.ir.formats import FP8_ROW, FP8_TENSOR, INT8_TENSOR
from qcompiler.numerics import ALL
from qcompiler.numerics.dtypes import torch_dtype
from qcompiler.pass_manager.instruments import CheckChanged, Validate
from qcompiler.pass_manager.pipeline import Pass, Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.testing import random_inputs

ONE = """
func @m(%x: {x}[3, 5, 40]) -> ({x}[3, 5, 24]) {{
  %w = core.param() {{name = "w"}} : {x}[24, 40]
  %b = core.param() {{name = "b"}} : {x}[24]
  %y = aten.linear(%x, %w, %b) : {x}[3, 5, 24] loc("m.py":3 in "fc")
  return %y
}}
"""
BLOCKS = [
    ((1, ALL), (1, ALL)),
    ((ALL, ALL), (ALL, ALL)),
    ((ALL, 1), (1, ALL)),
    ((1, 16), (8, 16)),
    ((ALL, 8), (4, ALL)),
]


def one(dtype: str = "f32") -> tuple[Graph, list[Tensor]]:
    graph = Graph.parse(ONE.format(x=dtype))
    inputs, graph.weights = random_inputs(graph, 5)
    return graph, inputs


@pytest.mark.parametrize(("x_block", "w_block"), BLOCKS)
@pytest.mark.parametrize("dtype", [DType.f8e4m3fn, DType.f8e5m2, DType.i8])
@pytest.mark.parametrize("profile", ["deepseek", "ue8m0"])
def test_the_numbers_match_numerics(
    x_block: tuple[int, int], w_block: tuple[int, int], dtype: DType, profile: str
) -> None:
    for kind in ("f32", "bf16"):
        graph, (x,) = one(kind)
        (plain,) = interpret(graph, [x])
        step = Quantize(Format(dtype, x_block, profile=profile), Format(dtype, w_block, profile=profile))
        assert step.run(graph)
        graph.verify(after="quantize")
        code = torch_dtype(dtype)
        x_dq = numerics.dequantize(
            *numerics.quantize(x, numerics.format_of(x_block, code, profile)),
            format=numerics.format_of(x_block, code, profile),
        )
        w_dq = numerics.dequantize(
            *numerics.quantize(graph.weights["w"], numerics.format_of(w_block, code, profile)),
            format=numerics.format_of(w_block, code, profile),
        )
        want = functional.linear(x_dq, w_dq, graph.weights["b"].float()).to(plain.dtype)
        assert torch.equal(interpret(graph, [x])[0], want)
        assert 1e-4 < float((want - plain).double().norm() / plain.double().norm()) < 0.25
        assert not step.run(graph) and step.explain(graph) == {}


def calibrated(graph: Graph, batches: list[list[Tensor]], names: list[str], **keywords: Any) -> Graph:
    graph.calibration = Calibration(batches)
    graph.calibration.observe(graph, names, **keywords)
    return graph


@pytest.mark.parametrize("dtype", [DType.f8e4m3fn, DType.i8])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"observer": "minmax"}, {"observer": "moving_average"}, {"observer": "percentile", "percentile": 90.0},
        {"observer": "percentile", "percentile": 50.0}, {"observer": "mse"},
    ],
)  # fmt: skip
def test_a_static_scale_is_the_observers_result_on_calibration_data(dtype: DType, options: dict[str, Any]) -> None:
    graph, (x,) = one()
    batches = [[torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(i)) * (i + 1)] for i in range(3)]
    calibrated(graph, batches, ["x"], histogram=True)
    step = Quantize(Format(dtype, (ALL, ALL)), Format(dtype, (ALL, ALL)), static=True, **options)
    assert step.run(graph)
    graph.verify(after="quantize")
    code = torch_dtype(dtype)
    observer, percent = options.get("observer", "absmax"), options.get("percentile", 99.99)
    amax = graph.calibration.statistics["x"].amax(observer, "tensor", percentile=percent, format=step.x_format)
    scale = graph.weights["x.scale"]
    assert scale.shape == (1, 1) and scale.item() == numerics.scale_of(amax, numerics.format_of((1, 1), code)).item()
    everything = torch.cat([batch[0] for batch in batches]).abs()
    if observer == "absmax":
        assert scale.item() == (everything.max() / numerics.FORMAT_MAX[code]).item()
    if observer == "percentile":
        want = torch.quantile(everything.flatten(), percent / 100).item() / numerics.FORMAT_MAX[code]
        assert scale.item() == pytest.approx(want, rel=0.05)
    codes = numerics.quantize_static(x, scale, numerics.format_of((ALL, ALL), code))
    w = numerics.dequantize(
        *numerics.quantize(graph.weights["w"], numerics.format_of((ALL, ALL), code)),
        format=numerics.format_of((ALL, ALL), code),
    )
    want_y = functional.linear(
        numerics.dequantize(codes, scale, format=numerics.format_of((ALL, ALL), codes.dtype)), w, graph.weights["b"]
    )
    assert torch.equal(interpret(graph, [x])[0], want_y)
    assert '  %x_s = core.param() {name = "x.scale"} : f32[1, 1]\n' in graph.text(locations=False)


QKV = """
func @m(%x: f32[s0, 16]) -> (f32[s0, 16], f32[s0, 16], f32[s0, 16]) where s0 in 0.. {
  %wq = core.param() {name = "layers.0.q_proj.weight"} : f32[16, 16]
  %wk = core.param() {name = "layers.0.k_proj.weight"} : f32[16, 16]
  %wo = core.param() {name = "layers.0.o_proj.weight"} : f32[16, 16]
  %q = aten.linear(%x, %wq) : f32[s0, 16]
  %k = aten.linear(%x, %wk) : f32[s0, 16]
  %a = aten.relu(%q) : f32[s0, 16]
  %o = aten.linear(%a, %wo) : f32[s0, 16]
  return %q, %k, %o
}
"""
STATIC: dict[str, Any] = {"x_format": FP8_TENSOR, "w_format": FP8_TENSOR, "static": True}


def qkv(*, zeros: bool = False) -> Graph:
    graph = Graph.parse(QKV)
    rng = torch.Generator().manual_seed(0)
    graph.weights = {
        str(op.attrs["name"]): torch.randn([int(str(n)) for n in op.result.tensor.shape], generator=rng)
        for op in graph.ops("core.param")
    }
    batches = [[torch.zeros(4, 16) if zeros else torch.randn(4, 16, generator=rng)] for _ in range(2)]
    return calibrated(graph, batches, ["x", "a"], histogram=True)


def test_users_of_one_value_share_one_static_scale() -> None:
    graph = qkv()
    run_pipeline(
        Pipeline((Quantize(**STATIC),)), graph, instruments=[Validate(), CheckChanged()], inputs=[torch.randn(4, 16)]
    )
    assert [op["scale"].name for op in graph.ops("quant.quantize_static")] == ["x_s", "x_s", "a_s"]
    assert sorted(name for name in graph.weights if "scale" in name) == ["a.scale", "x.scale"]
    Pass.parse("share-quantize").run(graph)
    graph.verify()
    assert len(graph.ops("quant.quantize_static")) == 2


@pytest.mark.parametrize("first", ["*q_proj", "*k_proj"])
def test_two_passes_share_a_scale_in_either_order(first: str) -> None:
    graph = qkv()
    for step in (Quantize(**STATIC, layers=(first,)), Quantize(**{**STATIC, "w_format": FP8_ROW})):
        assert step.run(graph)
        graph.verify()
    assert [op["scale"].name for op in graph.ops("quant.quantize_static")] == ["x_s", "x_s", "a_s"]
    assert sorted(str(graph[f"{w}_s"].type) for w in ("wq", "wk")) == ["f32[1, 1]", "f32[16, 1]"]


@pytest.mark.parametrize("first", ["*q_proj", "*k_proj"])
def test_users_with_different_observers_get_different_scales(first: str) -> None:
    graph = qkv()
    options = {**STATIC, "observer": "percentile", "percentile": 80.0}
    for step in (Quantize(**options, layers=(first,)), Quantize(**STATIC)):
        step.run(graph)
        graph.verify()
    clipped, whole = (float(graph.weights[name]) for name in ("x.scale", "x.scale_1"))
    assert clipped < 0.7 * whole
    scales = {op["x"].name: op["scale"].op.attrs["name"] for op in graph.ops("quant.quantize_static")}
    assert scales == {"x": "x.scale_1" if first == "*q_proj" else "x.scale", "a": "a.scale"}


def test_values_without_calibration_data_have_a_dynamic_scale() -> None:
    graph = qkv(zeros=True)
    assert Quantize(**STATIC).run(graph)
    graph.verify()
    assert not graph.ops("quant.quantize_static") and len(graph.ops("quant.quantize")) == 6
    x, weight = torch.randn(4, 16), graph.weights["layers.0.k_proj.weight"]
    operands = (
        numerics.dequantize(
            *numerics.quantize(each, numerics.format_of((ALL, ALL))), format=numerics.format_of((ALL, ALL))
        )
        for each in (x, weight)
    )
    assert torch.equal(interpret(graph, [x])[1], functional.linear(*operands))


def test_a_static_scale_without_calibration() -> None:
    graph = qkv()
    del graph.calibration.statistics["x"]
    with pytest.raises(PassError, match=r"a value was not observed in calibration: got %x\. Put the pass 'cal"):
        Quantize(**STATIC).run(graph)
    graph.calibration = None
    with pytest.raises(PassError, match="there is no calibration data, and this pipeline needs some"):
        Quantize(**STATIC).run(graph)


def test_layers() -> None:
    def quantized(*layers: str) -> str:
        graph = qkv()
        Quantize(layers=layers).run(graph)
        return "".join(name for name in "qko" if graph[f"w{name}"] in [op["x"] for op in graph.ops("quant.quantize")])

    assert quantized("*") == "qko"
    assert quantized("*.q_proj.weight", "*o_proj") == "qo"
    assert quantized("*", "!*.q_proj") == "ko"
    assert quantized("*", "!*", "layers.0.k_proj") == "k"
    assert quantized("!*.q_proj", "*") == "qko"
    assert quantized("!*.q_proj") == ""


def test_reasons() -> None:
    graph = qkv()
    step = Quantize(layers=("*_proj", "!*.q_proj"))
    run = run_pipeline(Pipeline((step,)), graph)
    assert run.reasons == {"q": "the pattern '!*.q_proj' excludes it"}
    assert Quantize(layers=("*o_proj", "*k_proj")).explain(qkv()) == {"q": "no pattern selects it: *o_proj, *k_proj"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_format": Format(DType.i8, (1, 7))}, "a block of pass 'quantize' has an unsupported size: got [1, 7]"),
        ({"static": True}, "a static scale must cover the whole tensor: got #fp8_row; need a format with"),
        ({"x_format": "#fp8_row"}, "option 'x_format' of pass 'quantize' has a wrong value: got '#fp8_row'; need"),
        ({"percentile": 0.0}, "a percentile must be above 0 and at most 100: got 0.0"),
        ({"percentile": 101}, "a percentile must be above 0 and at most 100: got 101.0"),
        ({"observer": "median"}, "option 'observer' of pass 'quantize' has a wrong value: got 'median'; need one of a"),
        ({"static": 1}, "option 'static' of pass 'quantize' has a wrong value: got 1; need true or false"),
        ({"layers": "lm_head"}, "option 'layers' of pass 'quantize' has a wrong value: got 'lm_head'; need [a word or"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QCompilerError) as error:
        Quantize(**options)
    assert str(error.value).startswith(message)


def test_the_text_of_options_parses_back() -> None:
    step = Quantize(
        INT8_TENSOR, INT8_TENSOR, static=True, observer="percentile", percentile=99, layers=("*", "!a.b", "x[0-9]")
    )
    text = (
        "quantize{x_format=#int8_tensor, w_format=#int8_tensor, static=true, observer=percentile, percentile=99.0, "
        'layers=["*", "!a.b", "x[0-9]"]}'
    )
    assert str(step) == text and Pass.parse(text) == step
