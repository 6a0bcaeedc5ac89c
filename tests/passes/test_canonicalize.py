"""canonicalize: one form for matmuls, no-ops are removed, and no new aliasing."""

import pytest
import torch

from passes.analyses.memory import is_view, origin
from passes.cleanup.axis_ranges import IndexToSlice
from passes.cleanup.canonicalize import Canonicalize
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Missed
from qcompiler.testing import difference, random_inputs

SPELLINGS = {
    "mm": ("x: f32[3, 8]", "f32[8, 5]", "aten.mm(%x, %w)", "f32[3, 5]"),
    "matmul": ("x: f32[2, 3, 8]", "f32[8, 5]", "aten.matmul(%x, %w)", "f32[2, 3, 5]"),
    "vector times matrix": ("x: f32[8]", "f32[8, 5]", "aten.matmul(%x, %w)", "f32[5]"),
    "addmm": ("x: f32[3, 8]", "f32[8, 5]", "aten.addmm(%b, %x, %w)", "f32[3, 5]"),
    "bmm": ("x: f32[1, 3, 8]", "f32[1, 8, 5]", "aten.bmm(%x, %w)", "f32[1, 3, 5]"),
    "matmul with a batch of one": ("x: f32[4, 3, 8]", "f32[1, 8, 5]", "aten.matmul(%x, %w)", "f32[4, 3, 5]"),
    "inner": ("x: f32[3, 8]", "f32[5, 8]", "aten.inner(%x, %w)", "f32[3, 5]"),
}


def graph_of(x: str, w: str, call: str, y: str) -> Graph:
    bias = '  %b = core.param() {name = "b"} : f32[5]\n' if "%b" in call and "b: " not in x else ""
    weight = f'  %w = core.param() {{name = "w"}} : {w}\n'
    return Graph.parse(f"func @m(%{x}) -> ({y}) {{\n{weight}{bias}  %y = {call} : {y}\n  return %y\n}}")


def body(text: str) -> Graph:
    """A graph with f32[2, 4] inputs x and y, a weight w and a buffer; it runs `text` and returns its result."""
    outputs = ", ".join("f32[2, 4]" for _ in text.rpartition("return ")[2].split(","))
    return Graph.parse(
        f"func @m(%x: f32[2, 4], %y: f32[2, 4]) -> ({outputs}) {{\n"
        '  %w = core.param() {name = "w"} : f32[2, 4]\n  %s = core.buffer() {name = "s"} : f32[2, 4]\n'
        f"  {text}\n}}"
    )


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_each_form_becomes_a_linear_of_equal_value(spelling: tuple[str, str, str, str]) -> None:
    graph = graph_of(*spelling)
    inputs, weights = random_inputs(graph, 1)
    (before,) = interpret(graph, inputs, weights)
    assert Canonicalize().run(graph)
    graph.verify()
    assert [op.name for op in graph.ops() if "linear" in op.name] == ["aten.linear"]
    assert graph["y"].op.name == "aten.linear"
    (after,) = interpret(graph, inputs, weights)
    assert difference(after, before) < 1e-12
    assert not Canonicalize().run(graph)


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        (
            ("x: f32[3, 8]", "f32[8]", "aten.matmul(%x, %w)", "f32[3]"),
            "its right operand is a vector, not a matrix (%w)",
        ),
        (
            ("x: f32[2, 3, 8]", "f32[2, 8, 5]", "aten.bmm(%x, %w)", "f32[2, 3, 5]"),
            "its right operand has 3 dimensions, not 2 (%w)",
        ),
        (
            ("x: f32[3, 8]", "f32[1, 8, 5]", "aten.matmul(%x, %w)", "f32[1, 3, 5]"),
            "its right operand has 3 dimensions, not 2 (%w)",
        ),
        (
            ("x: f32[8, 5]", "f32[3, 8]", "aten.mm(%w, %x)", "f32[3, 5]"),
            "its right operand is computed from the inputs (%x)",
        ),
        (("x: f32[3]", "f32[5, 5]", "aten.mm(%w, %w)", "f32[5, 5]"), "both of its operands are constant (%w)"),
        (
            ("x: f32[3, 8]", "f32[8, 5]", "aten.addmm(%b, %x, %w) {alpha = 2}", "f32[3, 5]"),
            "it scales its operands: alpha is given",
        ),
        (
            ("b: f32[3, 5], %x: f32[3, 8]", "f32[8, 5]", "aten.addmm(%b, %x, %w)", "f32[3, 5]"),
            "its addend is not a bias of one number per column (%b)",
        ),
    ],
)
def test_refusals(spelling: tuple[str, str, str, str], reason: str) -> None:
    graph = graph_of(*spelling)
    before = str(graph)
    assert not Canonicalize().run(graph)
    assert str(graph) == before
    assert Canonicalize().explain(graph) == {"y": reason}


@pytest.mark.parametrize("swap", ["aten.t(%{})", "aten.transpose.int(%{}, -2, -1)", "aten.permute(%{}, [1, 0])"])
def test_two_transpositions_cancel(swap: str) -> None:
    graph = body(
        f"%a = {swap.format('x')} : f32[4, 2]\n  %b = aten.transpose.int(%a, 1, 0) : f32[2, 4]\n"
        "  %r = aten.relu(%b) : f32[2, 4]\n  return %r"
    )
    assert Canonicalize().run(graph)
    assert graph["r"].op.args == (graph["x"],)
    assert "%a" not in str(graph)


def test_a_permutation_that_keeps_the_order_is_not_a_transposition() -> None:
    graph = Graph.parse(
        "func @m(%x: f32[4, 4]) -> (f32[4, 4]) {\n  %a = aten.permute(%x, [0, 1]) : f32[4, 4]\n"
        "  %b = aten.t(%a) : f32[4, 4]\n  return %b\n}"
    )
    assert not Canonicalize().run(graph)


@pytest.mark.parametrize(
    "text",
    [
        "%a = aten.clone(%x) : f32[2, 4]\n  return %a",  # would return the caller's tensor
        "%a = aten.clone(%x) : f32[2, 4]\n  %b = aten.view(%a, [2, 4]) : f32[2, 4]\n  %c = aten.neg(%b) : f32[2, 4]\n"
        "  return %b",
        "%v = aten.alias(%w) : f32[2, 4]\n  %a = aten.clone(%w) : f32[2, 4]\n  return %a",  # would return the weight
        "%r = aten.relu(%x) : f32[2, 4]\n  %a = aten.clone(%r) : f32[2, 4]\n  return %r, %a",  # would return it twice
        "%a = aten.clone(%x) : f32[2, 4]\n  core.update(%s, %a)\n  return %y",
        "%e = aten.slice.Tensor(%x, 0, 0, 2) : f32[2, 4]\n  %a = aten._to_copy(%e) : f32[2, 4]\n  return %a",
    ],
)
def test_a_copy_that_prevents_aliasing_stays(text: str) -> None:
    graph = body(text)
    Canonicalize().run(graph)
    assert "%a = " in str(graph)


@pytest.mark.parametrize("made_by", ["aten.relu(%x)", "aten.neg(%x)"])
def test_a_copy_of_an_intermediate_value_is_removed(made_by: str) -> None:
    graph = body(f"%r = {made_by} : f32[2, 4]\n  %a = aten.clone(%r) : f32[2, 4]\n  return %a")
    assert Canonicalize().run(graph)
    assert graph.outputs == (graph["r"],)


def test_a_copy_stays_if_a_view_needs_its_strides() -> None:
    text = (
        "func @m(%x: f32[1, 4]) -> (f32[12]) {\n  %r = aten.relu(%x) : f32[1, 4]\n"
        "  %e = aten.expand(%r, [3, 4]) : f32[3, 4]\n  %a = aten.clone(%e) : f32[3, 4]\n"
        "  %v = aten.view(%a, [12]) : f32[12]\n  return %v\n}"
    )
    graph = Graph.parse(text)
    assert not Canonicalize().run(graph)
    assert interpret(graph, [torch.ones(1, 4)])[0].shape == (12,)


@pytest.mark.parametrize(
    "line",
    [
        "aten.clone(%x) {memory_format = #contiguous_format}",
        "aten.dropout(%x, 0.5, true)",
        "aten.dropout(%x, 0.5)",
        "aten.to.dtype(%x, f32, false, true)",
    ],
)
def test_operations_that_may_have_an_effect_stay(line: str) -> None:
    graph = body(f"%a = {line} : f32[2, 4]\n  %b = aten.relu(%a) : f32[2, 4]\n  return %b")
    assert not Canonicalize().run(graph)


def test_locations_are_inherited() -> None:
    graph = graph_of(*SPELLINGS["addmm"])
    graph["y"].op.loc = type(graph["y"].op.loc)("gpt2.py", 7, "c_attn")
    Canonicalize().run(graph)
    assert str(graph["y"].op.loc) == 'loc("gpt2.py":7 in "c_attn" by "canonicalize")'
    assert str(graph["w_t"].op.loc) == 'loc("gpt2.py":7 in "c_attn" by "canonicalize")'


def test_memory_is_followed_through_views() -> None:
    graph = body(
        "%a = aten.t(%x) : f32[4, 2]\n  %b = aten.t(%a) : f32[2, 4]\n  %c = aten.neg(%b) : f32[2, 4]\n  return %c"
    )
    assert origin(graph["b"]) is graph["x"]
    assert origin(graph["c"]) is graph["c"]
    assert is_view(graph["a"].op)
    assert not is_view(graph["w"].op)


@pytest.mark.parametrize(
    ("indices", "result"),
    [
        ([1], "aten.slice.Tensor(%x, 1, 1, 2)"),
        ([-2, -1], "aten.slice.Tensor(%x, 1, 3, 5)"),
        ([2, 3, 4], "aten.slice.Tensor(%x, 1, 2, 5)"),
        ([0, 2], "its indices are not a range of the axis (%i)"),
        ([-1, 0], "its indices are not a range of the axis (%i)"),
    ],
)
def test_stored_indices_of_a_range_become_a_slice(indices: list[int], result: str) -> None:
    """A copy keeps the strides, which a later view may need."""
    kind, rule = f"f32[2, {len(indices)}, 3]", IndexToSlice()
    graph = Graph.parse(
        f"func @m(%x: f32[2, 5, 3]) -> ({kind}) {{\n"
        f'  %i = core.param() {{name = "i"}} : i64[{len(indices)}]\n'
        f"  %y = aten.index.Tensor(%x, [None, %i]) : {kind}\n  return %y\n}}"
    )
    graph.weights["i"] = torch.tensor(indices)
    x = torch.randn(2, 5, 3)
    (before,) = interpret(graph, [x])
    missed = rule.match(graph["y"].op, graph)
    assert Canonicalize().run(graph) is not isinstance(missed, Missed)
    assert result in (str(missed) if isinstance(missed, Missed) else str(graph))
    (after,) = interpret(graph, [x])
    assert torch.equal(before, after) and before.stride() == after.stride()


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ("aten.index.Tensor(%x, [%i, %i])", "it has several indices"),
        ("aten.index.Tensor(%x, [None, %x])", "its index is not stored (%x)"),
        ("aten.index.Tensor(%x, [%j])", "its index is not a vector of integers (%j)"),
    ],
)
def test_other_indices_stay(call: str, why: str) -> None:
    graph = Graph.parse(
        'func @m(%x: i64[2, 2]) -> (i64[2, 2]) {\n  %i = core.param() {name = "i"} : i64[2]\n'
        f'  %j = core.param() {{name = "j"}} : i64[2, 2]\n  %y = {call} : i64[2, 2]\n  return %y\n}}'
    )
    graph.weights.update(i=torch.arange(2), j=torch.zeros(2, 2, dtype=torch.int64))
    assert str(IndexToSlice().match(graph["y"].op, graph)) == why
