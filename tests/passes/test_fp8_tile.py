"""fp8-tile: the quantized model's numbers equal those of `numerics`, and each skipped layer has a reason."""

import pytest
import torch
from torch.nn import functional

from passes.quantizing.fp8_tile import Fp8Tile
from qcompiler import numerics
from qcompiler.errors import PassError
from qcompiler.interpreter import interpret
from qcompiler.ir import DType, Format, Graph
from qcompiler.testing import random_inputs

LINEAR = """
func @m(%x: {x}[{rows}{k}]) -> ({x}[{rows}{n}]) {{
  %w = core.param() {{name = "w"}} : {w}[{n}, {k}]
  %b = core.param() {{name = "b"}} : {b}[{n}]
  %y = aten.linear(%x, %w{bias}) : {x}[{rows}{n}] loc("m.py":3 in "fc")
  return %y
}}
"""


def linear(
    x: str = "bf16", w: str = "", b: str = "", rows: str = "5, ", k: int = 256, n: int = 200, bias: bool = True
) -> Graph:
    text = LINEAR.format(x=x, w=w or x, b=b or x, rows=rows, k=k, n=n, bias=", %b" if bias else "")
    return Graph.parse(text)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("rows", ["", "0, ", "1, ", "2, 3, "])
@pytest.mark.parametrize(("k", "n"), [(256, 128), (200, 130), (17, 16)])
def test_the_numbers_match_numerics(dtype: str, rows: str, k: int, n: int) -> None:
    graph = linear(dtype, rows=rows, k=k, n=n)
    inputs, weights = random_inputs(graph, 3)
    (plain,) = interpret(graph, inputs, weights)
    assert Fp8Tile().run(graph)
    graph.verify(after="fp8-tile")
    (got,) = interpret(graph, inputs, weights)
    x = numerics.dequantize(
        *numerics.quantize(inputs[0], numerics.format_of((1, 128))), format=numerics.format_of((1, 128))
    )
    w = numerics.dequantize(
        *numerics.quantize(weights["w"], numerics.format_of((128, 128))), format=numerics.format_of((128, 128))
    )
    want = functional.linear(x, w, weights["b"].float()).to(plain.dtype)
    assert torch.equal(got, want)
    if plain.numel() > 100:
        assert 1e-3 < float((got - plain).double().norm() / plain.double().norm()) < 0.06
    assert not Fp8Tile().run(graph)
    assert Fp8Tile().explain(graph) == {}


def test_options_reach_the_graph() -> None:
    graph = linear(k=128)
    tile, block = (Format(DType.f8e5m2, block, profile="ue8m0") for block in ((1, 64), (64, 64)))
    Fp8Tile(tile, block).run(graph)
    graph.verify()
    assert graph["x_q"].op.attrs == {"format": tile}
    assert str(graph["w_s"].type) == "f32[4, 2]"


def test_locations_and_the_name_are_inherited() -> None:
    graph = linear()
    Fp8Tile().run(graph)
    assert {str(op.loc) for op in graph.ops() if op.name != "core.param"} == {'loc("m.py":3 in "fc" by "fp8-tile")'}
    assert graph.outputs == (graph["y"],)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (linear("f64"), "its operands are f64 and f64, not f32, f16 or bf16"),
        (linear(k=0), "its weight has no elements (%w)"),
        (linear(n=0), "its weight has no elements (%w)"),
    ],
)
def test_refused_types_and_shapes(graph: Graph, reason: str) -> None:
    assert Fp8Tile().explain(graph) == {"y": reason}
    assert not Fp8Tile().run(graph)


HEAD = "func @m(%x: f32[4, 128], %ids: i64[4], %free: f32[4, s0]) -> (f32[4, 64]) where s0 in 0.. {\n"
W = '  %w = core.param() {name = "w"} : f32[64, 128]\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            W + "  %d = aten._to_copy(%w) {dtype = bf16} : bf16[64, 128]\n"
            "  %c = aten._to_copy(%d) {dtype = f32} : f32[64, 128]\n  %e = aten.embedding(%w, %ids) : f32[4, 128]\n"
            "  %y = aten.linear(%e, %c) : f32[4, 64]\n",
            "it is the vocabulary projection: an embedding has the same weight (%c)",
        ),
        (
            W + "  %e = aten.index.Tensor(%w, [%ids]) : f32[4, 128]\n  %y = aten.linear(%e, %w) : f32[4, 64]\n",
            "it is the vocabulary projection: an embedding has the same weight (%w)",
        ),
        (
            W.replace('"}', '", role = "output_embeddings"}') + "  %y = aten.linear(%x, %w) : f32[4, 64]\n",
            "it is the vocabulary projection: the model names its weight as its output embeddings (%w)",
        ),
        (
            W + "  %y = aten.linear(%x, %w) : f32[4, 64]\n  %s = aten.sigmoid(%y) : f32[4, 64]\n"
            "  %v = aten.view(%s, [4, 8, 8]) : f32[4, 8, 8]\n  %t, %i = aten.topk(%v, 2) : f32[4, 8, 2], i64[4, 8, 2]",
            "it is a router: a top-k selects from its output",
        ),
        (
            W + "  %y = aten.linear(%x, %w) : f32[4, 64]\n  %i = aten.argmax(%y, -1) : i64[4]\n"
            "  %hot = aten.one_hot(%i, 64) : i64[4, 64]\n",
            "it is a router: a top-k selects from its output",
        ),
        (
            W + "  %y = aten.linear(%x, %w) : f32[4, 64]\n  %v, %i = aten.max.dim(%y, -1) : f32[4], i64[4]\n"
            "  %hot = aten.one_hot(%i, 64) : i64[4, 64]\n",
            "it is a router: a top-k selects from its output",
        ),
        (
            W + "  %y = aten.linear(%x, %w) : f32[4, 64]\n  %v, %i = aten.kthvalue(%y, 3) : f32[4], i64[4]\n",
            "it is a router: a top-k selects from its output",
        ),
        (
            W + "  %y = aten.linear(%x, %w) : f32[4, 64]\n  %turns = aten.mul.Tensor(%y, 6.28) : f32[4, 64]\n"
            "  %s = aten.cos(%turns) : f32[4, 64]\n",
            "it computes an angle: cos reads its output",
        ),
        (W + "  %y = aten.mm(%w, %w) : f32[64, 128]\n", "all of its operands are constant (%w)"),
        (
            W + "  %y = aten.linear(%x, %w) : f32[4, 64]\n".replace("%x", "%free"),
            "the size of its reduction dimension is not fixed (s0) (%free)",
        ),
        (
            W + "  %k = aten.relu(%x) : f32[4, 128]\n  %t = aten.t(%k) : f32[128, 4]\n"
            "  %y = aten.mm(%w, %t) : f32[64, 4]\n",
            "it does not multiply an activation by a constant matrix (%w)",
        ),
        (
            W + "  %b = aten.sum.dim_IntList(%x, [1], true) : f32[4, 1]\n  %y = aten.linear(%x, %w, %b) : f32[4, 64]\n",
            "its bias is not one number per column (%b)",
        ),
        (
            W + "  %y = aten.linear(%w, %w) : f32[64, 64]\n",
            "both of its operands are constant (%w)",
        ),
        (
            '  %w = core.param() {name = "w"} : f32[4, 8, 128]\n'
            '  %y = aten.einsum("bk,enk->ben", [%x, %w]) : f32[4, 4, 8]\n',
            "it multiplies by a batch of matrices (a weight of 3 dimensions) (%w)",
        ),
        (
            W + '  %x_q, %x_s = quant.quantize(%x) {format = #fp8_tile<profile = "vllm">} : '
            "f8e4m3fn[4, 128], f32[4, 1]\n  %d = quant.dequantize(%x_q, %x_s) {format = #fp8_tile, out_dtype = f32} : "
            "f32[4, 128]\n  %y = aten.linear(%d, %w) : f32[4, 64]\n",
            "one of its operands is already quantized (%d)",
        ),
        (
            '  %w = core.param() {name = "w"} : f32[128]\n  %y = aten.rms_norm(%x, [128], %w) : f32[4, 128]\n',
            "the gain and bias of a norm are applied elementwise",
        ),
        ("  %y = aten.rms_norm(%x, [128]) : f32[4, 128]\n", None),
    ],
)
def test_reasons(text: str, reason: str | None) -> None:
    graph = Graph.parse(HEAD + text + "\n  %out = aten.slice.Tensor(%x, 1, 0, 64) : f32[4, 64]\n  return %out\n}")
    before = str(graph)
    assert not Fp8Tile().run(graph)
    assert str(graph) == before
    assert Fp8Tile().explain(graph).get("y") == reason


def test_a_classifier_that_returns_its_argmax_is_not_a_router() -> None:
    graph = Graph.parse(
        HEAD + W + "  %y = aten.linear(%x, %w) : f32[4, 64]\n  %i = aten.argmax(%y, -1) : i64[4]\n"
        "  %out = aten.slice.Tensor(%x, 1, 0, 64) : f32[4, 64]\n  return %out\n}"
    )
    assert Fp8Tile().run(graph)
    assert Fp8Tile().explain(graph) == {}


def test_an_ordinary_last_linear_is_quantized_also_after_views_of_weights() -> None:
    graph = Graph.parse(
        HEAD + '  %a = core.param() {name = "a"} : f32[32, 128]\n  %b = core.param() {name = "b"} : f32[96, 128]\n'
        "  %cat = aten.cat([%a, %b]) : f32[128, 128]\n  %w = aten.slice.Tensor(%cat, 0, 0, 64) : f32[64, 128]\n"
        "  %bias = aten.sum.dim_IntList(%x, [0]) : f32[128]\n  %half = aten.slice.Tensor(%bias, 0, 0, 64) : f32[64]\n"
        "  %y = aten.linear(%x, %w, %half) : f32[4, 64]\n  return %y\n}"
    )
    inputs, weights = random_inputs(graph, 0)
    (before,) = interpret(graph, inputs, weights)
    assert Fp8Tile().run(graph)
    (after,) = interpret(graph, inputs, weights)
    assert 0 < float((after - before).norm() / before.norm()) < 0.05


def test_a_bias_given_by_name_is_not_lost() -> None:
    graph = linear(bias=False)
    op = graph["y"].op
    graph.set_args(op, op.args, {"bias": graph["b"]})
    inputs, weights = random_inputs(graph, 0)
    weights["b"] += 1000
    Fp8Tile().run(graph)
    assert float(interpret(graph, inputs, weights)[0].float().mean()) > 900


def test_weights_with_a_different_type_than_the_activation() -> None:
    graph = linear("bf16", w="f32", b="f32")
    inputs, weights = random_inputs(graph, 0)
    assert Fp8Tile().run(graph)
    graph.verify()
    assert interpret(graph, inputs, weights)[0].dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"x_format": "deepsek"},
            "option 'x_format' of pass 'fp8-tile' has a wrong value: got 'deepsek'; need a format",
        ),
        (
            {"w_format": Format(DType.f8e4m3fn, (1, 12))},
            "a block of pass 'fp8-tile' has an unsupported size: got [1, 12]",
        ),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(PassError) as error:
        Fp8Tile(**options)  # type: ignore[arg-type]  # deliberately wrong
    assert str(error.value).startswith(message)


def test_lists_are_accepted_as_tuples() -> None:
    assert Fp8Tile(layers=["a", "b"]) == Fp8Tile(layers=("a", "b"))  # type: ignore[arg-type]  # users may write lists
