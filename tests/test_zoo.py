"""The zoo's own parts: its registry, its simulation of FP8 tiles, and its table. `make zoo` runs the models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qcompiler
from benchmarks.zoo.measure import difference, filled, measure, outputs
from benchmarks.zoo.simulation import Fp8Tiles, address, rounded
from benchmarks.zoo.subjects import FAMILIES, Entry, hidden, load_families
from benchmarks.zoo.table import merged, write_results


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_the_zoo_covers_every_family_with_enough_architectures() -> None:
    zoo = load_families()
    assert {entry.family for entry in zoo.values()} == set(FAMILIES)
    assert len(zoo) >= 150 and all(name == entry.name for name, entry in zoo.items())


def test_a_tile_is_rounded_with_its_own_scale() -> None:
    x = torch.ones(3, 200)
    x[1, 128:] = 1e-6
    x[2, 0] = 448.0
    x[2, 1] = 0.4  # below the scale's resolution for normal numbers, and rounded to a multiple of 2^-9
    got = rounded(x, 1, 128)
    torch.testing.assert_close(got[0], x[0], rtol=2**-22, atol=0)
    torch.testing.assert_close(got[1], x[1], rtol=2**-22, atol=0)
    assert got[2, :2].tolist() == pytest.approx([448.0, 0.40625])
    assert rounded(torch.zeros(2, 5), 1, 128).tolist() == torch.zeros(2, 5).tolist()


def test_a_block_spans_rows_and_stops_at_ragged_edges() -> None:
    w = torch.randn(130, 131)
    w[:128, :128] *= 1e4
    got = rounded(w, 128, 128)
    assert got.shape == w.shape
    assert all(relative(got[part], w[part]) < 0.04 for part in ((slice(128, None),), (slice(0, 128), slice(128, None))))


class Branches(nn.Module):
    """A weight used directly, a weight used through arithmetic, and a stack used through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Parameter(torch.randn(96, 64) / 8)
        self.stack = nn.Parameter(torch.randn(2, 64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.first(x).relu(), (self.second * 2).T) @ self.stack[1]


def test_the_simulation_rounds_only_the_given_weights() -> None:
    torch.manual_seed(0)
    model, x = Branches().requires_grad_(False), torch.randn(5, 64)
    want = model(x)
    for wanted in ([model.first.weight], [model.second], [model.stack], list(model.parameters())):
        with Fp8Tiles(model.parameters(), wanted) as tiles:
            got = model(x)
        assert 0.01 < relative(got, want) < 0.1
        assert tiles.reached == {address(each) for each in wanted} - {address(model.first.bias)}
    with Fp8Tiles(model.parameters(), []) as tiles:
        assert torch.equal(model(x), want) and not tiles.reached


def test_the_simulation_equals_the_compiled_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 96), nn.GELU(), nn.Linear(96, 130)).eval().requires_grad_(False)
    x = {"input": torch.randn(7, 200)}
    compiled = qcompiler.compile(model, target="cpu", example_kwargs=x)
    with Fp8Tiles(model.parameters(), model.parameters()):
        simulated = outputs(model, x)
    assert difference(outputs(compiled, x), simulated) < 1e-6 < 0.02 < difference(simulated, outputs(model, x))


def test_an_overwritten_constant_is_no_longer_constant() -> None:
    weight, x = nn.Parameter(torch.randn(8, 8), requires_grad=False), torch.randn(8, 8)
    with Fp8Tiles([weight], [weight]) as tiles:
        copy = weight * 1
        copy.copy_(x)
        assert torch.equal(x @ copy, x @ x) and not tiles.reached


def test_a_weight_that_a_matmul_expands_is_still_a_weight() -> None:
    layer, x = nn.Linear(64, 64).requires_grad_(False), torch.randn(2, 5, 64)
    for view in (x, x.transpose(0, 1)):
        with Fp8Tiles(layer.parameters(), [layer.weight]) as tiles:
            got = layer(view)
        assert tiles.reached == {address(layer.weight)} and 0.01 < relative(got, layer(view)) < 0.1


@pytest.mark.parametrize("operation", ["expand", "repeat"])
def test_learned_queries_of_a_batch_are_activations(operation: str) -> None:
    torch.manual_seed(0)
    queries, layer = nn.Parameter(torch.randn(1, 3, 64)), nn.Linear(64, 64).requires_grad_(False)
    with torch.no_grad(), Fp8Tiles([queries, *layer.parameters()], [layer.weight]) as tiles:
        batch = queries.expand(2, -1, -1) if operation == "expand" else queries.repeat(2, 1, 1)
        got = layer(batch)
    assert tiles.reached == {address(layer.weight)} and 0.01 < relative(got[1], layer(queries[0].detach())) < 0.1


def test_zero_matrices_are_filled() -> None:
    model = nn.Linear(8, 8)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    filled(model)
    assert model.weight.any() and not model.bias.any()


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def row(name: str, build: Any) -> dict[str, Any]:
    return measure(Entry("plain", name, build))


def test_each_outcome_has_a_status() -> None:
    good = row("good", lambda: (nn.Linear(64, 64), lambda rows, length: {"input": torch.randn(rows, 64)}))
    assert good["status"] == "ok" and good["quantized"] == good["matmuls"] == 1 and good["open"] == 1
    assert 0 < good["error"] == pytest.approx(good["simulated"], rel=1e-4)
    refused = row("refused", lambda: (Hooked(), hidden(64)))
    assert refused["status"] == "refused" and refused["message"].startswith("CaptureError: ")

    def absent() -> Any:
        raise ImportError("No module named 'diffusers'")

    assert row("absent", absent)["status"] == "absent"
    assert row("broken", lambda: 1 / 0)["status"] == "broken"


def test_differences_are_relative_to_each_output() -> None:
    want = {"a": torch.ones(4).double(), "b": torch.full((4,), 1e6).double(), "c": torch.tensor([-torch.inf, 1.0])}
    got = {**want, "a": want["a"] * 1.1}
    assert difference(got, want) == pytest.approx(0.1 / 3**0.5)
    with pytest.raises(ValueError, match="the outputs differ"):
        difference({"a": want["a"]}, want)
    with pytest.raises(ValueError, match="output c differs"):
        difference({**want, "c": torch.ones(2)}, want)


def test_the_table_keeps_rows_that_were_not_measured_again(tmp_path: Path) -> None:
    done = {"family": "plain", "name": "a", "status": "ok", "open": 2, "matmuls": 3, "quantized": 2, "error": 0.03,
            "simulated": 0.03, "CPU s": 4.0}  # fmt: skip
    failed = {"family": "plain", "name": "b", "status": "refused", "message": "CaptureError: no"}
    write_results(tmp_path, [done, failed])
    fixed = {**done, "name": "b"}
    rows = merged(tmp_path, [fixed], ["b", "a"])
    assert rows == [fixed, done]
    write_results(tmp_path, rows)
    text = (tmp_path / "zoo.md").read_text(encoding="utf-8")
    assert "2 of 2 architectures (100.0%) compile" in text and "| plain | b | ok | 2 | yes | 2 / 3 | 0.0300" in text
    assert [each["name"] for each in json.loads((tmp_path / "zoo.json").read_text(encoding="utf-8"))["rows"]] == [
        "b",
        "a",
    ]
