"""Biases that are linear in the key's position: forms that the pass `attention` proves, with numbers, and others."""

import pytest
import torch
from torch import Tensor

from passes.attention.attention import Attention
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import Run, run_pipeline

HEAD = """
func @m(%q: f32[2, 4, s0, 8], %k: f32[2, 4, s0, 8], %v: f32[2, 4, s0, 8], %x: f32[4], %pad: i64[2, s0]) -> (f32[2, 4, s0, 8]) where s0 in 1.. {
  %slopes = core.param() {name = "slopes"} : f32[4]
  %many = core.param() {name = "many"} : f32[8]
  %one = core.param() {name = "one"} : f32[1]
  %n = aten.sym_size.int(%q, 2) : int(s0)
  %key = aten.arange(%n) : i64[s0]
  %query = aten.unsqueeze(%key, 1) : i64[s0, 1]
  %d = aten.sub.Tensor(%key, %query) : i64[s0, s0]
  %future = aten.gt.Tensor(%key, %query) : b8[s0, s0]
  %h = aten.view(%slopes, [4, 1, 1]) : f32[4, 1, 1]
"""  # noqa: E501
TAIL = """
  %m = aten.masked_fill.Scalar(%r, %future, -inf) : f32[4, s0, s0]
  %o = aten.scaled_dot_product_attention(%q, %k, %v, %m) : f32[2, 4, s0, 8]
  return %o
}"""
R = "f32[4, s0, s0]"
LINEAR = {
    "slope * key": "%a = aten.mul.Tensor(%h, %key) : f32[4, 1, s0]\n%n0 = aten.sym_size.int(%k, 2) : int(s0)\n"
    f"%r = aten.expand(%a, [4, %n0, %n0]) : {R}",
    "slope * distance": f"%r = aten.mul.Tensor(%h, %d) : {R}",
    "-slope * |distance|": f"%a = aten.abs(%d) : i64[s0, s0]\n%b = aten.neg(%h) : f32[4, 1, 1]\n"
    f"%r = aten.mul.Tensor(%b, %a) : {R}",
    "positions in floating point": "%a = aten.arange(%n) {dtype = f32} : f32[s0]\n"
    "%b = aten._to_copy(%query) {dtype = f32} : f32[s0, 1]\n%c = aten.sub.Tensor(%a, %b) : f32[s0, s0]\n"
    f"%e = aten.div.Scalar(%c, 2.0) : f32[s0, s0]\n%r = aten.mul.Tensor(%e, %h) : {R}",
    "a function of the query beside it": "%a = aten.mul.Tensor(%query, %query) : i64[s0, 1]\n"
    f"%b = aten.add.Tensor(%key, %a) : i64[s0, s0]\n%r = aten.mul.Tensor(%h, %b) : {R}",
    "rounded slopes": "%a = aten._to_copy(%h) {dtype = bf16} : bf16[4, 1, 1]\n"
    f"%b = aten._to_copy(%a) {{dtype = f32}} : f32[4, 1, 1]\n%r = aten.mul.Tensor(%b, %d) : {R}",
    "positions as sums of ones in floating point": "%a = aten.ones([%n]) : f32[s0]\n%b = aten.cumsum(%a, 0) : f32[s0]\n"
    "%c = aten.sub.Tensor(%b, 1) : f32[s0]\n%e = aten.mul.Tensor(%h, %c) : f32[4, 1, s0]\n"
    f"%n0 = aten.sym_size.int(%k, 2) : int(s0)\n%r = aten.expand(%e, [4, %n0, %n0]) : {R}",
    "every second of many": "%a = aten.slice.Tensor(%many, 0, 1, 8, 2) : f32[4]\n"
    f"%b = aten.view(%a, [4, 1, 1]) : f32[4, 1, 1]\n%r = aten.mul.Tensor(%b, %d) : {R}",
    "one slope for all heads": "%a = aten.mul.Tensor(%one, %d) : f32[s0, s0]\n"
    "%n0 = aten.sym_size.int(%k, 2) : int(s0)\n"
    f"%r = aten.expand(%a, [4, %n0, %n0]) : {R}",
    "a literal slope": "%a = aten.mul.Scalar(%d, 0.25) : f32[s0, s0]\n%n0 = aten.sym_size.int(%k, 2) : int(s0)\n"
    f"%r = aten.expand(%a, [4, %n0, %n0]) : {R}",
    "a sum of biases": f"%a = aten.mul.Tensor(%h, %d) : {R}\n%b = aten.mul.Tensor(%one, %key) : f32[s0]\n"
    f"%r = aten.add.Tensor(%a, %b) {{alpha = 2}} : {R}",
    "concatenated slopes": "%a = aten.slice.Tensor(%slopes, 0, 0, 2) : f32[2]\n"
    "%b = aten.slice.Tensor(%many, 0, 6) : f32[2]\n%c = aten.cat([%a, %b]) : f32[4]\n"
    f"%e = aten.view(%c, [4, 1, 1]) : f32[4, 1, 1]\n%r = aten.mul.Tensor(%e, %d) : {R}",
    "a product of slopes": f"%a = aten.mul.Tensor(%h, %d) : {R}\n%r = aten.mul.Tensor(%a, %one) : {R}",
}
OTHERS = {
    "a square": (
        f"%a = aten.mul.Tensor(%d, %d) : i64[s0, s0]\n%r = aten.mul.Tensor(%h, %a) : {R}",
        "its bias is not linear in the key's position",
    ),
    "rounded positions": (
        f"%a = aten.floor_divide(%key, 2) : i64[s0]\n%b = aten.mul.Tensor(%h, %a) : f32[4, 1, s0]\n"
        f"%n0 = aten.sym_size.int(%k, 2) : int(s0)\n%r = aten.expand(%b, [4, %n0, %n0]) : {R}",
        "its bias is not linear in the key's position",
    ),
    "positions of a padded row": (
        "%a = aten.cumsum(%pad, 1) : i64[2, s0]\n%b = aten.select.int(%a, 0, 0) : i64[s0]\n"
        f"%c = aten.mul.Tensor(%h, %b) : f32[4, 1, s0]\n%n0 = aten.sym_size.int(%k, 2) : int(s0)\n"
        f"%r = aten.expand(%c, [4, %n0, %n0]) : {R}",
        "its bias is not linear in the key's position",
    ),
    "sums of floating-point numbers": (
        f"%a = aten.cumsum(%slopes, 0) : f32[4]\n%b = aten.view(%a, [4, 1, 1]) : f32[4, 1, 1]\n"
        f"%c = aten.mul.Tensor(%b, %d) : {R}\n%r = aten.cumsum(%c, 2) : {R}",
        "it sums floating-point numbers that vary",
    ),
    "a slope that varies with the query": (
        f"%a = aten.mul.Tensor(%d, %query) : i64[s0, s0]\n%r = aten.mul.Tensor(%h, %a) : {R}",
        "the slope of its bias is not a constant for each head",
    ),
    "a slope from an input": (
        f"%a = aten.view(%x, [4, 1, 1]) : f32[4, 1, 1]\n%r = aten.mul.Tensor(%a, %d) : {R}",
        "this value has floating-point numbers (%x)",
    ),
    "two forms": (
        f"%a = aten.mul.Tensor(%h, %d) : {R}\n%b = aten.lt.Scalar(%key, 3) : b8[s0]\n"
        f"%r = aten.masked_fill.Scalar(%a, %b, 0.0) : {R}",
        "its bias has a different form for different keys",
    ),
    "heads in reverse": (
        "%a = aten.flip(%slopes, [0]) : f32[4]\n%b = aten.view(%a, [4, 1, 1]) : f32[4, 1, 1]\n"
        f"%r = aten.mul.Tensor(%b, %d) : {R}",
        "the slopes of its bias are not one number for each of 4 heads",
    ),
    "integers in between": (
        f"%a = aten.mul.Tensor(%h, %d) : {R}\n%b = aten._to_copy(%a) {{dtype = i64}} : i64[4, s0, s0]\n"
        f"%r = aten._to_copy(%b) {{dtype = f32}} : {R}",
        "it converts a floating-point number that varies to an integer",
    ),
    "a magnitude of floating-point numbers": (
        f"%a = aten.mul.Tensor(%h, %d) : {R}\n%r = aten.abs(%a) : {R}",
        "it takes the magnitude of a floating-point number that varies",
    ),
    "a quotient": (
        f"%a = aten.mul.Tensor(%h, %d) : {R}\n%r = aten.div.Tensor(%a, %h) : {R}",
        "it does not divide by a constant",
    ),
    "a comparison": (
        f"%a = aten.mul.Tensor(%h, %d) : {R}\n%b = aten.gt.Scalar(%a, -3) : b8[4, s0, s0]\n"
        f"%r = aten.masked_fill.Scalar(%a, %b, 0.0) : {R}",
        "it compares a number that varies with floating point",
    ),
}


def graph_of(body: str) -> Graph:
    graph = Graph.parse(HEAD + body + TAIL)
    graph.weights = {
        "slopes": torch.tensor([0.5, 0.3, 0.1, 0.01]), "many": torch.rand(8), "one": torch.tensor([0.7])
    }  # fmt: skip
    return graph


def inputs(length: int) -> list[Tensor]:
    torch.manual_seed(length)
    return [*torch.randn(3, 2, 4, length, 8), torch.randn(4), torch.ones(2, length, dtype=torch.int64)]


def rewritten(graph: Graph) -> Run:
    return run_pipeline(Pipeline.parse("attention; dead-code"), graph)


@pytest.mark.parametrize("what", LINEAR)
def test_a_linear_bias_becomes_slopes(what: str) -> None:
    before, after = graph_of(LINEAR[what]), graph_of(LINEAR[what])
    after.weights = dict(before.weights)
    run = rewritten(after)
    (causal,) = after.ops("attention.causal")
    assert causal["slopes"].tensor.shape == (4,) and after.is_constant(causal["slopes"])
    assert not run.remarks
    for length in (1, 2, 33):
        (want,), (got,) = interpret(before, inputs(length)), interpret(after, inputs(length))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", OTHERS)
def test_another_bias_is_refused_with_the_reason(what: str) -> None:
    body, why = OTHERS[what]
    (reason,) = Attention().explain(graph_of(body)).values()
    assert why in reason, reason


def test_the_model_rounds_its_bias_and_the_report_says_so() -> None:
    body = f"%a = aten.mul.Tensor(%h, %d) : {R}\n%b = aten._to_copy(%a) {{dtype = bf16}} : bf16[4, s0, s0]\n"
    graph = graph_of(body + f"%r = aten._to_copy(%b) {{dtype = f32}} : {R}")
    (remark,) = rewritten(graph).remarks.values()
    assert "its bias is computed in FP32, but the model rounds it to bf16" in remark


@pytest.mark.parametrize(("bias", "legal"), [("%d", True), ("%key", False)])
def test_a_bias_beside_sinks_must_not_move_all_keys(bias: str, legal: bool) -> None:
    """A softmax ignores what is added to all its scores, but sinks do not get it."""
    text = (
        HEAD
        + f"""
  %r = aten.mul.Tensor(%h, {bias}) : f32[4, {"s0" if legal else "1"}, s0]
  %t = aten.transpose.int(%k, 2, 3) : f32[2, 4, 8, s0]
  %scores = aten.matmul(%q, %t) : f32[2, 4, s0, s0]
  %sum = aten.add.Tensor(%scores, %r) : f32[2, 4, s0, s0]
  %m = aten.masked_fill.Scalar(%sum, %future, -inf) : f32[2, 4, s0, s0]
  %view = aten.view(%slopes, [1, 4, 1, 1]) : f32[1, 4, 1, 1]
  %sinks = aten.expand(%view, [2, 4, %n, 1]) : f32[2, 4, s0, 1]
  %all = aten.cat([%m, %sinks], -1) : f32[2, 4, s0, s0 + 1]
  %p = aten.softmax.int(%all, -1) : f32[2, 4, s0, s0 + 1]
  %cut = aten.slice.Tensor(%p, 3, 0, -1) : f32[2, 4, s0, s0]
  %o = aten.matmul(%cut, %v) : f32[2, 4, s0, 8]
  return %o
}}"""
    )
    before, after = Graph.parse(text), Graph.parse(text)
    before.weights = graph_of(LINEAR["slope * distance"]).weights
    after.weights = dict(before.weights)
    run = rewritten(after)
    if not legal:
        assert run.skipped["attention"]["o"].startswith("its bias moves the scores of the keys against its sinks")
        return
    (want,), (got,) = interpret(before, inputs(9)), interpret(after, inputs(9))
    assert len(after.ops("attention.causal")) == 1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_slopes_from_literals_are_stored_once_for_all_layers() -> None:
    two = TAIL.replace(
        "return %o", "%p = aten.scaled_dot_product_attention(%o, %k, %v, %m) : f32[2, 4, s0, 8]\n  return %p"
    )
    text = HEAD + LINEAR["a literal slope"] + two
    graph = Graph.parse(text)
    graph.weights = graph_of(LINEAR["a literal slope"]).weights
    rewritten(graph)
    one, other = graph.ops("attention.causal")
    assert one["slopes"] is other["slopes"]
    (name,) = graph.weights
    assert name.endswith("_folded") and graph.derivations.keys() == {name}
    assert torch.equal(graph.weights[name], torch.full((4,), 0.25))


def test_a_stored_vector_of_slopes_comes_before_all_that_reads_it() -> None:
    """The model's own bias reads it too, before the attention."""
    vector = (
        "%quarter = aten.full([], 0.25) {dtype = f32} : f32[]\n"
        "%powers = aten.arange.start(1, 5) {dtype = i32} : i32[4]\n"
        "%vector = aten.pow.Tensor_Tensor(%quarter, %powers) : f32[4]\n"
        "%c = aten.view(%vector, [4, 1, 1]) : f32[4, 1, 1]\n"
        f"%r = aten.mul.Tensor(%c, %d) : {R}"
    )
    graph, before = graph_of(vector), graph_of(vector)
    (want,) = interpret(before, inputs(9))
    assert Attention().run(graph)
    graph.verify()
    (causal,) = graph.ops("attention.causal")
    assert causal["slopes"].op.name == "core.param" and graph.users(causal["slopes"])[0].name == "aten.view"
    (got,) = interpret(graph, inputs(9))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_learned_slopes_stay_the_weights_of_the_model() -> None:
    graph = graph_of(LINEAR["slope * distance"])
    rewritten(graph)
    (causal,) = graph.ops("attention.causal")
    assert causal["slopes"].name == "slopes" and graph.weights.keys() == {"slopes"}
