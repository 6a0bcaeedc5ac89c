"""calibrate: what it observes and skips, its messages about missing data, and experts without tokens."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from passes.quantizing.calibrate import Calibrate, activations, after_top_k, saw_no_token, statistics_of
from qcompiler.calibration import Calibration, Statistics
from qcompiler.capture import capture
from qcompiler.errors import InputError, PassError, QCompilerError
from qcompiler.ir import Graph
from qcompiler.pass_manager.instruments import CheckChanged, Validate
from qcompiler.pass_manager.pipeline import Pass, Pipeline
from qcompiler.pass_manager.runner import run_pipeline

TEXT = """
func @m(%x: f32[s0, 16], %k: f32[s0, 16]) -> (f32[s0, s0]) where s0 in 0.. {
  %w1 = core.param() {name = "w1"} : f32[24, 16]
  %w2 = core.param() {name = "w2"} : f32[20, 24]
  %h = aten.linear(%x, %w1) : f32[s0, 24] loc("m.py":3 in "up")
  %g = aten.linear(%x, %w1) : f32[s0, 24] loc("m.py":4 in "gate")
  %a = aten.relu(%h) : f32[s0, 24] loc("m.py":5 in "act")
  %y = aten.linear(%a, %w2) : f32[s0, 20] loc("m.py":6 in "down")
  %q = aten.linear(%x, %k) : f32[s0, s0]
  return %q
}
"""


def model(calibration: Any = None) -> Graph:
    graph = Graph.parse(TEXT)
    rng = torch.Generator().manual_seed(0)
    graph.weights = {"w1": torch.randn(24, 16, generator=rng), "w2": torch.randn(20, 24, generator=rng)}
    graph.calibration = calibration
    return graph


def data(*rows: int) -> list[list[Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [[torch.randn(n, 16, generator=rng) for _ in range(2)] for n in rows]


def test_it_observes_quantizable_inputs_and_does_not_change_the_graph() -> None:
    graph = model(Calibration(data(3, 5)))
    before = str(graph)
    run_pipeline(Pipeline((Calibrate(),)), graph, instruments=[Validate(), CheckChanged()], inputs=data(2)[0])
    assert str(graph) == before and not Calibrate().run(graph) and Calibrate().explain(graph) == {}
    assert list(graph.calibration.statistics) == ["x", "a"]  # %q has no weight, and %x is read twice
    seen = statistics_of(graph, graph["a"])
    x = torch.cat([batch[0] for batch in data(3, 5)])
    torch.testing.assert_close(seen.absmax, (x @ graph.weights["w1"].T).relu().amax(0))
    assert seen.rows == 8 and seen.histogram is None and seen.sample is None and not saw_no_token(graph, graph["a"])
    assert graph.calibration.modules == {"x": "up", "a": "act"}


def test_known_statistics_are_not_observed_again() -> None:
    read = []

    class Counted(list[Any]):
        def __iter__(self) -> Any:
            read.append(1)
            return super().__iter__()

    graph = model(Calibration(Counted(data(3, 5))))
    for step in (Calibrate(), Calibrate()):
        step.run(graph)
    assert len(read) == 1
    del graph.calibration.statistics["a"]
    x = graph.calibration.statistics["x"]
    Calibrate().run(graph)
    assert len(read) == 2 and graph.calibration.statistics["x"] is x
    for options in ({"histogram": True}, {"histogram": True, "rows": 3}, {"histogram": True, "rows": 5}):
        for _ in range(2):
            Calibrate(**options).run(graph)
        seen = graph.calibration.statistics["a"]
        assert seen.histogram is not None and bool(options.get("rows")) == (seen.sample is not None)
    assert len(read) == 5
    Calibrate(rows=2).run(graph)  # more rows exist already
    assert len(read) == 5 and graph.calibration.statistics["a"].sample.capacity == 5


def test_saved_statistics_need_no_data(tmp_path: Any) -> None:
    graph = model(Calibration(data(3)))
    Calibrate(rows=2).run(graph)
    graph.calibration.save(tmp_path / "c")
    again = model(Calibration.load(tmp_path / "c"))
    Calibrate().run(again)
    assert again.calibration.digest == graph.calibration.digest
    with pytest.raises(PassError) as error:
        Calibrate(histogram=True, rows=2).run(again)
    assert str(error.value) == (
        "the calibration lacks statistics, and there is no data to compute them from: got none of %x and 1 more with a "
        "histogram and a sample of 2 rows. Give the data: compile(..., calibration=batches)."
    )


def test_a_graph_with_nothing_to_observe_needs_no_data() -> None:
    graph = Graph.parse("func @m(%x: f32[2]) -> (f32[2]) {\n  return %x\n}")
    assert not Calibrate().run(graph) and graph.calibration is None


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (
            None,
            "there is no calibration data, and this pipeline needs some (in pass 'calibrate'). Give it: "
            "compile(..., calibration=batches), a list of real calls of the model.",
        ),
        ([1], "the calibration of the graph has the wrong type: got list; need Calibration"),
        (
            Calibration(),
            "the calibration lacks statistics, and there is no data to compute them from: got none of %x and 1 "
            "more (in pass 'calibrate'). Give the data: compile(..., calibration=batches).",
        ),
        (Calibration([]), "there is no calibration data: got no batches; need at least one batch"),
        (
            Calibration([[torch.zeros(2, 16), torch.ones(2, 16)]]),
            "calibration saw only zeros or no rows in %x: got 2 rows of zeros in 1 batch; need at least one "
            "nonzero element",
        ),
        (
            Calibration(data(0, 0)),
            "calibration saw only zeros or no rows in %x: got no row in 2 batches; need at least one nonzero element",
        ),
        (
            Calibration([[torch.ones(1, 16), torch.ones(1, 16)], [torch.full((2, 16), torch.inf), torch.ones(2, 16)]]),
            "calibration found numbers in %x that are not finite: got 0 NaN and 32 Inf in batches[1]; need finite "
            "numbers (in pass 'calibrate', core.input)",
        ),
    ],
)
def test_missing_and_invalid_data(calibration: Any, message: str) -> None:
    with pytest.raises(QCompilerError) as error:
        run_pipeline(Pipeline((Calibrate(),)), model(calibration))
    assert str(error.value).startswith(message)
    assert isinstance(error.value, PassError | InputError)


def test_statistics_of_another_model() -> None:
    calibration = Calibration(data(3))
    calibration.statistics["a"] = Statistics.empty(7)
    with pytest.raises(PassError) as error:
        Calibrate().run(model(calibration))
    assert str(error.value) == (
        "the calibration belongs to another model: got 7 channels of %a; need 24. Calibrate this model: "
        "compile(..., calibration=batches)."
    )
    assert list(calibration.statistics) == ["a"]


def test_a_query_for_unobserved_statistics() -> None:
    graph = model(Calibration())
    with pytest.raises(PassError, match="a value was not observed in calibration: got %a"):
        statistics_of(graph, graph["a"])


def test_options() -> None:
    step = Calibrate(histogram=True, rows=256)
    assert str(step) == "calibrate{histogram=true, rows=256}" and Pass.parse(str(step)) == step
    with pytest.raises(PassError, match="option 'rows' of pass 'calibrate' is negative: got -1; need 0 or more"):
        Calibrate(rows=-1)


def test_copies_of_a_graph_share_the_calibration() -> None:
    graph = model(Calibration(data(1)))
    assert graph.clone().calibration is graph.calibration
    assert graph.clone(weights=False).calibration is None and Graph("new").calibration is None


def test_updating_a_calibration_does_not_change_the_old_one() -> None:
    graph = model(Calibration(iter(data(3))))
    Calibrate().run(graph)
    old, new = graph.calibration, graph.calibration.updated({"s": Statistics.empty(8)})
    assert list(old.statistics) == ["x", "a"] and list(new.statistics) == ["x", "a", "s"]
    assert new.statistics["x"] is old.statistics["x"] and new.modules == old.modules
    with pytest.raises(InputError, match="which has already been consumed"):
        new.observe(graph, ["h"])


# Mixtures of experts


class Experts(nn.Module):
    """Four experts, two per token, written in one of two ways; followed by a linear."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.gate, self.out = nn.Linear(16, 4, bias=False), nn.Linear(16, 16)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24, bias=False), nn.SiLU(), nn.Linear(24, 16, bias=False)) for _ in range(4)
        )
        with torch.no_grad():
            self.gate.weight.zero_()
            self.gate.weight[2:, 0] = torch.tensor([1.0, 2.0])  # where x[0] is positive, only experts 2 and 3 are used

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = torch.topk(self.gate(x).softmax(-1), 2)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            hit = choice == index
            if self.kind == "gather":
                row, place = torch.where(hit)
                y = y.index_add(0, row, expert(x[row]) * weight[row, place, None])
            else:
                y = y + expert(x * hit.any(-1, keepdim=True)) * (weight * hit).sum(-1, keepdim=True)
        z: Tensor = self.out(x + y)
        return z


@cache
def captured(kind: str) -> Graph:
    torch.manual_seed(0)
    return capture(Experts(kind).eval(), (torch.randn(6, 16),)).graph


@pytest.mark.parametrize("kind", ["gather", "mask"])
def test_experts_without_tokens_are_reported_without_an_error(kind: str) -> None:
    graph = captured(kind).clone()
    x = torch.randn(7, 16)
    x[:, 0] = x[:, 0].abs() + 1
    graph.calibration = Calibration([[x], [x[:2]]])
    Calibrate(histogram=True, rows=4).run(graph)
    values = list(activations(graph))
    assert len(values) == 9  # two per expert, and one after them; the router is not quantized
    unseen = [saw_no_token(graph, value) for value in values]
    assert unseen == [True] * 4 + [False] * 5
    assert {row.value for row in graph.calibration.coverage.unseen} == {value.name for value in values[:4]}
    rows = [statistics_of(graph, value).rows for value in values]
    assert rows == ([0] * 4 + [9] * 5 if kind == "gather" else [9] * 9)
    assert statistics_of(graph, values[0]).amax("percentile", "tensor") == 0


@pytest.mark.parametrize("kind", ["gather", "mask"])
def test_layers_after_the_experts_must_see_data(kind: str) -> None:
    graph = captured(kind).clone()
    values, routed = list(activations(graph)), after_top_k(graph)
    assert [value in routed for value in values] == [True] * 8 + [False]
    graph.calibration = Calibration([[torch.zeros(3, 16)]])
    with pytest.raises(InputError) as error:
        Calibrate().run(graph)
    assert str(error.value).startswith(
        f"calibration saw only zeros or no rows in {values[-1]}: got 3 rows of zeros in 1 batch"
    )


def test_a_captured_model() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 40), nn.Linear(40, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
            return y

    torch.manual_seed(0)
    block = Block().eval()
    graph = capture(block, (torch.randn(2, 3, 16),)).graph
    batches = [torch.randn(2, 5, 16), torch.randn(1, 1, 16)]
    graph.calibration = Calibration([[x] for x in batches])
    Calibrate().run(graph)
    with torch.no_grad():
        normed = torch.cat([block.norm(x).reshape(-1, 16) for x in batches])
        hidden = nn.functional.gelu(block.up(normed))
    for value, want in zip(activations(graph), (normed, hidden), strict=True):
        torch.testing.assert_close(statistics_of(graph, value).amax("absmax", "channel"), want.abs().amax(0))
        torch.testing.assert_close(statistics_of(graph, value).minimum, want.amin(0))


def test_only_selected_layers_are_observed() -> None:
    """The input of a layer that stays in float may contain anything, zeros or infinities."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.first(x) + self.second(x / 0)
            return y

    batches = [torch.ones(2, 16)]
    with pytest.raises(InputError, match="not finite"):
        qcompiler.compile(Two().eval(), scheme="int8_tensor_static", calibration=batches)
    fast = qcompiler.compile(Two().eval(), scheme="int8_tensor_static", calibration=batches, overrides={"second": None})
    assert str(fast.pipeline["calibrate"]) == 'calibrate{layers=["*", "!second"]}'
    assert fast.calibration is not None and list(fast.calibration.statistics) == ["x"]
    assert [row.module for row in fast.report.quantized] == ["first"]
