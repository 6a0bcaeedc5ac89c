"""The region affected by a scale: producers and users of scaled values, tied channels, and refusals."""

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.analyses import channel_scale
from passes.analyses.channel_labels import UNSCALED
from passes.analyses.channel_scale import ScaleRegion, solve
from passes.smoothing.scale_fold import fold
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Missed
from qcompiler.testing import difference, random_inputs

HEAD = """
func @m(%x: f32[s0, 8], %z: f32[s0, 8], %ids: i64[s0], %free: f32[8, s0], %u: f32[4, 8], %n8: i64[8])
    -> (f32[]) where s0 in 2.. {
  %g = core.param() {name = "g"} : f32[8]
  %w = core.param() {name = "w"} : f32[8, 8]
  %w2 = core.param() {name = "w2"} : f32[8, 8]
  %half = core.param() {name = "half"} : f32[8, 4]
  %big = core.param() {name = "big"} : f32[24, 8]
  %one = core.param() {name = "one"} : f32[]
  %state = core.buffer() {name = "state"} : f32[s0, 8]
"""
NORM = "%n = aten.rms_norm(%x, [8], %g) : f32[s0, 8]\n"
Q = "%q = aten.linear(%n, %w) : f32[s0, 8]\n"


def graph_of(expression: str, result: str = "%x") -> Graph:
    graph = Graph.parse(HEAD + expression + f"\n  %end = aten.sum({result}) : f32[]\n  return %end\n}}")
    graph.verify()
    return graph


def solved(expression: str, name: str, result: str = "%x") -> ScaleRegion:
    graph = graph_of(expression, result)
    before = str(graph)
    region = solve(graph, graph[name])
    assert isinstance(region, ScaleRegion), str(region)
    assert str(graph) == before
    return region


REFUSED = {
    "a residual stream that another norm reads": (
        NORM + Q + "%r = aten.add.Tensor(%n, %q) : f32[s0, 8]\n%n2 = aten.rms_norm(%r, [8], %g) : f32[s0, 8]",
        "aten.rms_norm does not commute with a scale, reached through %r (%n2)",
    ),
    "a residual stream that begins in an input": (
        "%n = aten.linear(%x, %w) : f32[s0, 8]\n%r = aten.add.Tensor(%x, %n) : f32[s0, 8]",
        "a graph input cannot absorb a scale, reached through %r (%x)",
    ),
    "an embedding": (
        "%n = aten.embedding(%w, %ids) : f32[s0, 8]", "aten.embedding does not commute with a scale (%n)",
    ),
    "hardtanh after it": (
        NORM + "%h = aten.hardtanh(%n) : f32[s0, 8]", "aten.hardtanh does not commute with a scale (%h)",
    ),
    "hardtanh before it": (
        "%q = aten.linear(%x, %w) : f32[s0, 8]\n%n = aten.hardtanh(%q) : f32[s0, 8]",
        "aten.hardtanh does not commute with a scale (%n)",
    ),
    "an output of the graph": (NORM + "return %n", "an output of the graph must not be scaled (%n)"),
    "a buffer's new value": (
        NORM + "core.update(%state, %n)", "a value that core.update stores must not be scaled (%n)"
    ),
    "a buffer": (
        "%n = aten.relu(%state) : f32[s0, 8]", "a buffer cannot absorb a scale, reached through %n (%state)",
    ),
    "a square": (
        NORM + "%h = aten.mul.Tensor(%n, %n) : f32[s0, 8]",
        "both operands of aten.mul.Tensor would be scaled, so its result would be scaled twice (%h)",
    ),
    "a product of two scaled values": (
        NORM + "%a = aten.neg(%n) : f32[s0, 8]\n%h = aten.mul.Tensor(%a, %n) : f32[s0, 8]", "both operands",
    ),
    "the weight of a linear": (
        "%n = aten.linear(%u, %w) : f32[4, 8]\n%h = aten.linear(%x, %n) : f32[s0, 4]",
        "aten.linear reads it, but not as its input (%n)",
    ),
    "the bias of a linear": (
        '%v = core.param() {name = "v"} : f32[8, 8]\n%s = aten.sum.dim_IntList(%x, [0], true) : f32[1, 8]\n'
        "%m = aten.linear(%s, %v) : f32[1, 8]\n%n = aten.squeeze.dim(%m, 0) : f32[8]\n"
        "%h = aten.linear(%x, %w, %n) : f32[s0, 8]",
        "aten.linear reads it, but not as its input (%n)",
    ),
    "a weight that is computed": (
        NORM + "%h = aten.linear(%n, %u) : f32[s0, 4]",
        "aten.linear (%h) reads it with a weight that is not a constant matrix (%n)",
    ),
    "a linear with a computed weight": (
        "%n = aten.linear(%x, %u) : f32[s0, 4]",
        "aten.linear cannot absorb a scale: %u is computed from the inputs",
    ),
    "a linear with a computed bias": (
        "%s = aten.sum.dim_IntList(%x, [0]) : f32[8]\n%n = aten.linear(%x, %w, %s) : f32[s0, 8]",
        "aten.linear cannot absorb a scale: %s is computed from the inputs",
    ),
    "a norm with a computed gain": (
        "%s = aten.sum.dim_IntList(%x, [0]) : f32[8]\n%n = aten.rms_norm(%x, [8], %s) : f32[s0, 8]",
        "aten.rms_norm cannot absorb a scale: %s is computed from the inputs",
    ),
    "a norm over two axes": (
        "%gg = aten.expand(%g, [4, 8]) : f32[4, 8]\n  %n = aten.layer_norm(%u, [4, 8], %gg) : f32[4, 8]",
        "can absorb a scale only along the last axis of its result",
    ),
    "a norm without a gain": (
        "%n = aten.rms_norm(%x, [8]) : f32[s0, 8]", "aten.rms_norm has no gain that could absorb the scale (%n)",
    ),
    "the mean that a norm gives": (
        "%a, %n, %c = aten.native_layer_norm(%u, [8], %g, None, 1e-05) : f32[4, 8], f32[4, 1], f32[4, 1]",
        "can absorb a scale only along the last axis of its result",
    ),
    "an addend that nothing scales": (
        NORM + "%h = aten.add.Tensor(%n, %z) : f32[s0, 8]",
        "a graph input cannot absorb a scale, reached through %h (%z)",
    ),
    "a part of a value that is also used whole": (
        "%q = aten.linear(%x, %big) : f32[s0, 24]\n%n = aten.slice.Tensor(%q, 1, 8, 16) : f32[s0, 8]\n"
        "%h = aten.gelu(%q) : f32[s0, 24]",
        "aten.gelu does not commute with a scale, reached through %n (%h)",
    ),
    "parts that overlap with unscalable values": (
        "%q = aten.linear(%x, %big) : f32[s0, 24]\n%n = aten.slice.Tensor(%q, 1, 8, 16) : f32[s0, 8]\n"
        "%m = aten.slice.Tensor(%q, 1, 12, 24) : f32[s0, 12]\n%h = aten.silu(%m) : f32[s0, 12]",
        "aten.silu does not commute with a scale",
    ),
    "integers in a product": (
        "%i = aten._to_copy(%g) {dtype = i64} : i64[8]\n%n = aten.mul.Tensor(%i, %x) : f32[s0, 8]",
        "a graph input cannot absorb a scale",
    ),
    "a constant": ("%n = aten.neg(%w) : f32[8, 8]", "it is constant (%n)"),
    "integers": ("%n = aten.neg(%n8) : i64[8]", "it is not a floating-point tensor (%n)"),
    "a symbolic number of channels": ("%n = aten.relu(%free) : f32[8, s0]", "its last axis has no fixed size (%n)"),
    "rows": (
        NORM + "%t = aten.t(%n) : f32[8, s0]\n%h = aten.reshape(%t, [-1]) : f32[8*s0]",
        "aten.reshape mixes the channels with an axis of symbolic size s0, reached through %t (%h)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    expression, reason = REFUSED[name]
    if expression.endswith("return %n"):
        graph = graph_of(expression.removesuffix("return %n"))
        graph.set_outputs([graph["n"]])
    else:
        graph = graph_of(expression)
    missed = solve(graph, graph["n"])
    assert isinstance(missed, Missed), missed
    assert reason in str(missed)


def test_a_norm_with_two_users() -> None:
    expression = NORM + Q + "%up = aten.linear(%n, %big) : f32[s0, 24]\n%route = aten.linear(%n, %w2) : f32[s0, 8]\n"
    region = solved(expression + "%top, %at = aten.topk(%route, 2) : f32[s0, 2], i64[s0, 2]", "n")
    assert [(absorber.op.name, absorber.kind, absorber.path) for absorber in region.absorbers] == [
        ("aten.rms_norm", "norm", ())
    ]
    assert [linear.op.result.name for linear in region.linears] == ["q", "up", "route"]
    assert {linear.labels for linear in region.linears} == {tuple(range(8))}
    assert region.classes == tuple(range(8))
    assert [value.name for value in region.scaled] == ["n"]


def test_a_multiplied_gain_is_an_absorber() -> None:
    region = solved("%e = aten.add.Tensor(%g, 1.0) : f32[8]\n%n = aten.mul.Tensor(%x, %e) : f32[s0, 8]\n" + Q, "n")
    (absorber,) = region.absorbers
    assert (absorber.kind, absorber.path, absorber.labels.tolist()) == ("constant", (1,), list(range(8)))


def test_a_number_does_not_tie_all_channels_if_something_else_can_carry_them() -> None:
    region = solved("%p = aten.linear(%x, %w2) : f32[s0, 8]\n%n = aten.mul.Tensor(%p, %one) : f32[s0, 8]\n" + Q, "n")
    assert region.classes == tuple(range(8))
    tied = solved("%n = aten.mul.Tensor(%x, %one) : f32[s0, 8]\n" + Q, "n")
    assert tied.classes == (0,) * 8 and tied.absorbers[0].labels.shape == ()


def test_sliced_and_concatenated_reads() -> None:
    expression = (
        NORM + "%a = aten.slice.Tensor(%n, 1, 4, 8) : f32[s0, 4]\n%b = aten.slice.Tensor(%n, 1, 2, 6) : f32[s0, 4]\n"
    )
    expression += "%ha = aten.linear(%a, %half) : f32[s0, 8]\n%c = aten.cat([%b, %a], 1) : f32[s0, 8]\n"
    region = solved(expression + "%hc = aten.linear(%c, %w) : f32[s0, 8]", "n")
    labels = {linear.op.result.name: linear.labels for linear in region.linears}
    assert labels == {"ha": (4, 5, 6, 7), "hc": (2, 3, 4, 5, 4, 5, 6, 7)}
    assert region.classes == tuple(range(8))


def test_a_concatenation_with_unscaled_values() -> None:
    expression = NORM + "%c = aten.cat([%z, %n, %z], 1) : f32[s0, 24]\n%t = aten.t(%big) : f32[8, 24]\n"
    region = solved(expression + "%h = aten.linear(%c, %t) : f32[s0, 8]", "n")
    assert region.linears[0].labels == (UNSCALED,) * 8 + tuple(range(8)) + (UNSCALED,) * 8


ATTENTION = """
  %v = aten.linear(%x, %kv) : f32[s0, 4]
  %v4 = aten.view(%v, [1, -1, 2, 2]) : f32[1, s0, 2, 2]
  %vt = aten.transpose.int(%v4, 1, 2) : f32[1, 2, s0, 2]
  %q4 = aten.view(%z, [1, -1, 4, 2]) : f32[1, s0, 4, 2]
  %qt = aten.transpose.int(%q4, 1, 2) : f32[1, 4, s0, 2]
"""
REPEATED = """
  %v5 = aten.unsqueeze(%vt, 2) : f32[1, 2, 1, s0, 2]
  %ve = aten.expand(%v5, [-1, -1, 2, -1, -1]) : f32[1, 2, 2, s0, 2]
  %vr = aten.reshape(%ve, [1, 4, -1, 2]) : f32[1, 4, s0, 2]
  %o = aten.scaled_dot_product_attention(%qt, %qt, %vr) : f32[1, 4, s0, 2]
"""
GROUPED = """
  %kt = aten.slice.Tensor(%qt, 1, 0, 2) : f32[1, 2, s0, 2]
  %o = aten.scaled_dot_product_attention(%qt, %kt, %vt) {enable_gqa = true} : f32[1, 4, s0, 2]
"""
MERGED = """
  %ot = aten.transpose.int(%o, 1, 2) : f32[1, s0, 4, 2]
  %n = aten.reshape(%ot, [-1, 8]) : f32[s0, 8]
"""


@pytest.mark.parametrize("attention", [REPEATED, GROUPED])
def test_query_heads_that_share_a_value_head_are_tied(attention: str) -> None:
    kv = '%kv = core.param() {name = "kv"} : f32[4, 8]\n'
    region = solved(kv + ATTENTION + attention + MERGED + Q, "n")
    assert region.classes == (0, 1, 0, 1, 2, 3, 2, 3)
    (absorber,) = region.absorbers
    assert absorber.kind == "linear" and absorber.op.result.name == "v"
    assert np.take(region.classes, absorber.labels).tolist() == [[0, 1, 2, 3]]


def test_a_whole_sequence_is_scaled_for_its_last_token() -> None:
    expression = "%a = aten.rms_norm(%u, [8], %g) : f32[4, 8]\n%n = aten.slice.Tensor(%a, 0, 3, 4) : f32[1, 8]\n"
    region = solved(expression + "%h = aten.linear(%n, %w) : f32[1, 8]", "n")
    assert [labels.shape for labels in region.scaled.values()] == [(1, 8), (1, 8)]


def test_one_of_three_fused_projections_is_scaled() -> None:
    expression = "%p = aten.linear(%x, %big) : f32[s0, 24]\n%p3 = aten.view(%p, [-1, 3, 8]) : f32[s0, 3, 8]\n"
    expression += "%a, %b, %n = aten.unbind.int(%p3, 1) : f32[s0, 8], f32[s0, 8], f32[s0, 8]\n"
    expression += "%s = aten.softmax.int(%a, -1) : f32[s0, 8]\n%t = aten.silu(%b) : f32[s0, 8]\n" + Q
    region = solved(expression, "n")
    (absorber,) = region.absorbers
    assert absorber.labels.tolist() == [[UNSCALED] * 16 + list(range(8))]


def test_a_value_reached_twice_with_different_labels() -> None:
    expression = NORM + "%f = aten.flip(%n, [1]) : f32[s0, 8]\n%h = aten.add.Tensor(%n, %f) : f32[s0, 8]\n"
    region = solved(expression + "%y = aten.linear(%h, %w) : f32[s0, 8]", "n")
    assert region.classes == (0, 1, 2, 3, 3, 2, 1, 0)


def test_a_linear_that_absorbs_and_uses_a_scale() -> None:
    expression = NORM + Q + "%r = aten.relu(%q) : f32[s0, 8]\n%h = aten.add.Tensor(%n, %r) : f32[s0, 8]\n"
    region = solved(expression + "%y = aten.linear(%h, %w2) : f32[s0, 8]", "n")
    assert [absorber.op.results[0].name for absorber in region.absorbers] == ["n", "q"]
    assert [linear.op.result.name for linear in region.linears] == ["q", "y"]


def test_the_second_factor_is_tried_and_the_last_refusal_reported() -> None:
    gate = "%s = aten.silu(%x) : f32[s0, 8]\n"
    region = solved(
        gate + "%a = aten.linear(%x, %w2) : f32[s0, 8]\n%n = aten.mul.Tensor(%s, %a) : f32[s0, 8]\n" + Q, "n"
    )
    assert [absorber.op.result.name for absorber in region.absorbers] == ["a"]
    expression = gate + "%a = aten.relu(%x) : f32[s0, 8]\n%n = aten.mul.Tensor(%s, %a) : f32[s0, 8]\n"
    graph = graph_of(expression)
    assert str(solve(graph, graph["n"])) == "a graph input cannot absorb a scale, reached through %n (%x)"


def test_an_endless_search_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    expression = "%m0 = aten.mul.Tensor(%x, %z) : f32[s0, 8]\n"
    for at in range(12):
        expression += f"%m{at + 1} = aten.mul.Tensor(%m{at}, %m{at}) : f32[s0, 8]\n"
        expression += f"%k{at + 1} = aten.mul.Tensor(%m{at + 1}, %z) : f32[s0, 8]\n"
    graph = graph_of(expression)
    assert isinstance(solve(graph, graph["m12"]), Missed)
    monkeypatch.setattr(channel_scale, "TRIES", 1)
    graph = graph_of("%a = aten.mul.Tensor(%x, %z) : f32[s0, 8]\n%n = aten.mul.Tensor(%a, %z) : f32[s0, 8]")
    assert "the search for operands that carry the scale stopped after 1 tries" in str(solve(graph, graph["n"]))


def test_equal_graphs_give_equal_regions() -> None:
    expression = NORM + Q + "%a = aten.relu(%n) : f32[s0, 8]\n%y = aten.linear(%a, %w2) : f32[s0, 8]"
    first, second = solved(expression, "n"), solved(expression, "n")
    assert [str(value) for value in first.scaled] == [str(value) for value in second.scaled] == ["%n", "%a"]
    assert [str(linear.op.result) for linear in first.linears] == [str(r.op.result) for r in second.linears]
    assert first.classes == second.classes


def test_shape_only_operations_may_use_a_scaled_value() -> None:
    expression = NORM + "%size = aten.sym_size.int(%n, 0) : int(s0)\n%mask = aten.ones_like(%n) : f32[s0, 8]\n"
    region = solved(
        expression + "%h = aten.mul.Tensor(%n, %mask) : f32[s0, 8]\n%y = aten.linear(%h, %w) : f32[s0, 8]", "n"
    )
    assert [str(value) for value in region.scaled] == ["%n", "%h"]


STEPS = (
    "%{o} = aten.relu(%{i}) : f32[s0, 8]",
    "%{o} = aten.abs(%{i}) : f32[s0, 8]",
    "%{o} = aten.mul.Tensor(%{i}, %gate) : f32[s0, 8]",
    "%{o} = aten.mul.Tensor(%gain, %{i}) : f32[s0, 8]",
    "%{o} = aten.add.Tensor(%{i}, %gain) : f32[s0, 8]",
    "%{o} = aten.flip(%{i}, [1]) : f32[s0, 8]",
    "%{o}a = aten.neg(%{i}) : f32[s0, 8]\n%{o} = aten.add.Tensor(%{i}, %{o}a) {{alpha = 0.5}} : f32[s0, 8]",
    "%{o}a = aten.roll(%{i}, [2], [1]) : f32[s0, 8]\n%{o} = aten.where.self(%mask, %{i}, %{o}a) : f32[s0, 8]",
    "%{o}a, %{o}b = aten.chunk(%{i}, 2, 1) : f32[s0, 4], f32[s0, 4]\n%{o} = aten.cat([%{o}b, %{o}a], 1) : f32[s0, 8]",
    "%{o}a = aten.slice.Tensor(%{i}, 1, 2, 6) : f32[s0, 4]\n%{o} = aten.repeat(%{o}a, [1, 2]) : f32[s0, 8]",
    "%{o}a = aten.view(%{i}, [-1, 2, 4]) : f32[s0, 2, 4]\n%{o}b = aten.transpose.int(%{o}a, 1, 2) : f32[s0, 4, 2]\n"
    "%{o} = aten.reshape(%{o}b, [-1, 8]) : f32[s0, 8]",
    "%{o}a = aten.slice.Tensor(%{i}, 1, 0, 4) : f32[s0, 4]\n%{o}b = aten.slice.Tensor(%{i}, 1, 4, 8) : f32[s0, 4]\n"
    "%{o}c = aten.sigmoid(%{o}b) : f32[s0, 4]\n%{o}d = aten.mul.Tensor(%{o}c, %{o}a) : f32[s0, 4]\n"
    "%{o} = aten.cat([%{o}d, %{o}d], 1) : f32[s0, 8]",
    "%{o} = aten.matmul(%rows, %{i}) : f32[s0, 8]",
    "%{o} = aten.linear(%{i}, %square, %gain) : f32[s0, 8]",
)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_random_chains_of_commuting_operations(seed: int) -> None:
    rng = Random(seed)
    text = """
func @m(%x: f32[s0, 8], %gate: f32[s0, 8], %mask: b8[s0, 8], %rows: f32[s0, s0]) -> (f32[s0, 5]) where s0 in 2.. {
  %gain = core.param() {name = "gain"} : f32[8]
  %square = core.param() {name = "square"} : f32[8, 8]
  %last = core.param() {name = "last"} : f32[5, 8]
  %v0 = aten.layer_norm(%x, [8], %gain, %gain) : f32[s0, 8]
"""
    count = rng.randint(1, 8)
    for at in range(count):
        read = rng.choice((at, at, at, max(0, at - 1)))
        text += rng.choice(STEPS).format(i=f"v{read}", o=f"v{at + 1}") + "\n"
    graph = Graph.parse(text + f"  %y = aten.linear(%v{count}, %last) : f32[s0, 5]\n  return %y\n}}")
    inputs, graph.weights = random_inputs(graph, seed, {"s0": 3})
    (want,) = interpret(graph, inputs)
    value = rng.choice(graph.ops("aten.linear"))["input"]
    region = solve(graph, value)
    if isinstance(region, Missed):
        assert " with a scale" in str(region) or "would be scaled" in str(region)
        return
    for exact, most in ((True, 0.0), (False, 1e-11)):
        folded = graph.clone()
        again = solve(folded, folded[value.name])
        assert isinstance(again, ScaleRegion) and again.classes == region.classes
        exponents = torch.tensor([rng.uniform(-2, 2) for _ in range(8)])[torch.tensor(region.classes)]
        fold(folded, again, torch.exp2(exponents.round() if exact else exponents), "smooth", value.name)
        folded.verify()
        assert difference(interpret(folded, inputs)[0], want) <= most
