"""The helpers that we ship for tests: graphs and numbers compared."""

import math

import pytest
import torch

from qcompiler.errors import QCompilerError
from qcompiler.ir import Graph, Range
from qcompiler.testing import assert_text, difference, random_graph, random_inputs

GRAPH = """
    func @f(%x: f32[s0, 4]) -> (f32[s0, 4]) where s0 in 3..3 {
      %y = aten.neg(%x) : f32[s0, 4] loc("m.py":1)
      return %y
    }
"""


def test_a_text_is_compared_without_its_indentation() -> None:
    graph = Graph.parse(GRAPH)
    assert_text(graph, GRAPH, locations=True)
    assert_text(graph, GRAPH.replace(' loc("m.py":1)', ""))


def test_a_text_that_differs_is_shown_by_its_lines() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_text(Graph.parse(GRAPH), GRAPH.replace("neg", "relu"), locations=True)
    assert str(caught.value).splitlines()[0] == "@f does not print as expected"
    assert '-  %y = aten.relu(%x) : f32[s0, 4] loc("m.py":1)' in str(caught.value).splitlines()
    assert '+  %y = aten.neg(%x) : f32[s0, 4] loc("m.py":1)' in str(caught.value).splitlines()


def test_difference_is_zero_for_equal_and_one_for_unrelated_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4000, generator=generator)
    assert difference(a, a) == 0
    assert difference(a, b) == pytest.approx(1, abs=0.1)
    assert difference(a, -a) == pytest.approx(2)
    assert difference(a, torch.zeros_like(a)) == pytest.approx(1)
    assert 0 < difference(a, a.bfloat16()) < 1e-5
    assert 1e-5 < difference(a, a.to(torch.float8_e4m3fn)) < 1e-3


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_difference_does_not_depend_on_scale_and_order(scale: float) -> None:
    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    b = torch.tensor([1.0, 2.0, 3.3], dtype=torch.float64)
    assert difference(a * scale, b * scale) == pytest.approx(difference(a, b))
    assert difference(a, b) == difference(b, a)


def test_difference_of_what_is_not_finite() -> None:
    odd = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    assert difference(odd, odd.clone()) == 0
    assert difference(odd, torch.tensor([2.0, math.inf, -math.inf, math.nan])) > 0
    assert difference(odd, torch.tensor([1.0, -math.inf, -math.inf, math.nan])) == math.inf
    assert difference(odd, torch.tensor([1.0, math.inf, -math.inf, 1.0])) == math.inf
    assert difference(torch.tensor([math.inf]), torch.tensor([1e38])) == math.inf
    assert difference(torch.tensor([math.inf]), torch.tensor([math.nan])) == math.inf
    top = torch.tensor([torch.finfo(torch.float64).max], dtype=torch.float64)
    assert difference(top, torch.tensor([math.inf])) == math.inf


def test_difference_of_other_kinds() -> None:
    assert difference(torch.tensor([]), torch.tensor([])) == 0
    assert difference(torch.zeros(3), torch.zeros(3)) == 0
    assert difference(torch.tensor([True, False]), torch.tensor([True, True])) > 0
    assert difference(torch.tensor([1 + 1j]), torch.tensor([1 - 1j])) == pytest.approx(1)
    with pytest.raises(QCompilerError, match=r"different shapes cannot be compared: got \[2\]; need \[2, 1\]"):
        difference(torch.zeros(2), torch.zeros(2, 1))


def test_random_inputs_fit_the_graph() -> None:
    graph = Graph.parse(GRAPH)
    inputs, weights = random_inputs(graph)
    assert [tuple(tensor.shape) for tensor in inputs] == [(3, 4)]
    assert weights == {}
    assert torch.equal(inputs[0], random_inputs(graph)[0][0])
    assert not torch.equal(inputs[0], random_inputs(graph, 1)[0][0])
    graph.symbols["s0"] = Range(1)
    assert random_inputs(graph, sizes={"s0": 9})[0][0].shape == (9, 4)


def test_random_graphs_differ_in_everything() -> None:
    graphs = [random_graph(seed) for seed in range(300)]
    texts = "\n".join(map(str, graphs))
    for part in (
        "core.param", "core.buffer", "core.update", "core.floordiv", "quant.linear", "aten.topk", "none", "None", "nan",
        "-inf", "#", "bf16", " in ", "by ", "where", "[]", "true", "floordiv(", "mod(", "u0", 'say \\"hi\\"', "重み",
    ):  # fmt: skip
        assert part in texts
    assert any(not graph.inputs for graph in graphs)
    assert any(not graph.outputs for graph in graphs)
    assert len({str(graph) for graph in graphs}) == 300
