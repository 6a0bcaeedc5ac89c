"""Layers named by a pattern: quantized although a heuristic would skip them, or an error with the reason."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from passes.analyses.candidates import SMALLEST, why_tiny
from passes.analyses.layers import check_names, is_name, requested_layers
from passes.quantizing.fp8_tile import Fp8Tile
from passes.quantizing.quantize import Quantize
from qcompiler.errors import PassError
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline

TEXT = """
func @m(%ids: i64[s0], %x: f32[s0, 32], %d: f64[s0, 32]) -> (f32[s0, 64], f32[s0, 2], f32[s0, 8], f32[s0, 32], f64[s0, 32], f32[s0, 32]) where s0 in 0.. {
  %table = core.param() {name = "embed.weight"} : f32[64, 32]
  %wg = core.param() {name = "layers.0.gate.weight"} : f32[16, 32]
  %wa = core.param() {name = "layers.0.lora_A.weight"} : f32[8, 32]
  %wu = core.param() {name = "layers.0.up.weight"} : f32[32, 32]
  %wd = core.param() {name = "layers.0.double.weight"} : f64[32, 32]
  %e = aten.embedding(%table, %ids) : f32[s0, 32]
  %head = aten.linear(%x, %table) : f32[s0, 64]
  %gate = aten.linear(%x, %wg) : f32[s0, 16]
  %v, %i = aten.topk(%gate, 2) : f32[s0, 2], i64[s0, 2]
  %lora = aten.linear(%x, %wa) : f32[s0, 8]
  %up = aten.linear(%x, %wu) : f32[s0, 32]
  %double = aten.linear(%d, %wd) : f64[s0, 32]
  return %head, %v, %lora, %up, %double, %e
}
"""  # noqa: E501


def quantized(*layers: str) -> set[str]:
    graph = Graph.parse(TEXT)
    Quantize(layers=layers).run(graph)
    graph.verify(after="quantize")
    done = (op for op in graph.ops("aten.linear") if op["input"].op.name == "quant.dequantize")
    return {op.result.name.removesuffix("_f32") for op in done}


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (("*",), {"up"}),
        (("*", "embed"), {"up", "head"}),
        (("*", "layers.0.gate"), {"up", "gate"}),
        (("*", "*.gate"), {"up", "gate"}),
        (("*", "layers.*.gate.weight"), {"up", "gate"}),
        (("*", "*.lora_A"), {"up", "lora"}),
        (("layers.0.*",), {"up"}),  # a trailing wildcard does not name a layer
        (("*.weight",), {"up"}),
        (("*gate*",), {"gate"}),  # it selects only layers that would be skipped
        (("*", "*[gm]at*", "*lora*"), {"up", "gate", "lora"}),
        (("*", "*.gate", "!*"), set()),
        (("*.gate", "*"), {"up"}),  # the last matching pattern wins
        (("*", "!layers.*", "*.gate"), {"gate"}),
    ],
)
def test_named_layers_are_quantized(layers: tuple[str, ...], names: set[str]) -> None:
    assert quantized(*layers) == names


@pytest.mark.parametrize("pattern", ["*.double", "layers.0.double", "*double*"])
def test_a_named_layer_that_cannot_be_quantized_is_an_error(pattern: str) -> None:
    with pytest.raises(PassError) as error:
        run_pipeline(Pipeline((Quantize(layers=("*", pattern)),)), Graph.parse(TEXT))
    assert str(error.value) == (
        f"layers that '{pattern}' asks to quantize cannot be quantized: got %double: its operands are f64 and f64, not "
        f'f32, f16 or bf16 (in pass \'quantize{{layers=["*", "{pattern}"]}}\'). Choose another scheme for these '
        "layers, or None to leave them in float."
    )


def test_names_and_patterns() -> None:
    for pattern in ("lm_head", "lm_head.weight", "*.gate", "model.layers.*.gate.weight", "a.[0-9].b", "gate_up_proj"):
        assert is_name(pattern), pattern
    for pattern in ("*", "*.weight", "lm_*", "layers.0.*", "*.gate?", "a.[ab]", "*.*.weight"):
        assert not is_name(pattern), pattern
    graph = Graph.parse(TEXT)
    asked = requested_layers(("*", "*.gate", "layers.*_A", "!*.up"), graph)
    assert {pattern: [op.result.name for op in ops] for pattern, ops in asked.items()} == {
        "*.gate": ["gate"],
        "layers.*_A": ["lora"],
    }
    assert requested_layers(("*",), graph) == {}


EXPERTS = """
func @m(%x: bf16[s0, 32], %ends: i32[4]) -> (bf16[s0, 2], bf16[s0, 32], i64[s0, 2]) where s0 in 0.. {
  %w = core.param() {name = "mlp.experts.w"} : bf16[4, 32, 32]
  %g = core.param() {name = "mlp.gate.weight"} : bf16[16, 32]
  %y = aten._grouped_mm(%x, %w, %ends) : bf16[s0, 32]
  %gate = aten.linear(%x, %g) : bf16[s0, 16]
  %v, %i = aten.topk(%gate, 2) : bf16[s0, 2], i64[s0, 2]
  return %v, %y, %i
}
"""


def test_a_pattern_of_experts_and_their_router_does_not_name_the_router() -> None:
    graph = Graph.parse(EXPERTS)
    assert Fp8Tile(layers=("mlp.*",)).run(graph)
    assert len(graph.ops("quant.grouped_linear")) == 1 and graph["gate"].op.name == "aten.linear"
    assert Fp8Tile(layers=("mlp.*",)).explain(graph) == {"gate": "it is a router: a top-k selects from its output"}


@pytest.mark.parametrize("pattern", ["mlp.*", "mlp.exp*", "mlp.experts"])
def test_a_pattern_without_effect_is_an_error(pattern: str) -> None:
    with pytest.raises(PassError) as error:
        Quantize(layers=(pattern,)).run(Graph.parse(EXPERTS))
    assert str(error.value).startswith(
        f"layers that '{pattern}' asks to quantize cannot be quantized: got %y: a grouped matmul supports only "
    )
    assert ("%gate: it is a router" in str(error.value)) == (pattern == "mlp.*")


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (64, 1), (8, 4096), (4096, 8), (15, 16), (16, 15), (16, 16)])
def test_tiny_weights(rows: int, columns: int) -> None:
    graph = Graph.parse(
        f'func @m() -> () {{\n  %w = core.param() {{name = "w"}} : f32[{rows}, {columns}]\n  return\n}}'
    )
    missed = why_tiny(graph["w"])
    assert (missed is None) == (min(rows, columns) >= SMALLEST)
    if missed is not None:
        assert str(missed) == f"its weight has fewer than 16 rows or columns: [{rows}, {columns}] (%w)"


class Tied(nn.Module):
    """A head that shares its weight with an embedding, a router, and a one-row gate."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.router = nn.Embedding(96, 64), nn.Linear(64, 64), nn.Linear(64, 16)
        self.shared_gate, self.lm_head = nn.Linear(64, 1), nn.Linear(64, 96, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        best = self.router(x).topk(2, -1).values.sum(-1, keepdim=True)
        y: Tensor = self.lm_head(self.up(x) * best * self.shared_gate(x).sigmoid())
        return y


IDS = torch.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def tied() -> Tied:
    torch.manual_seed(0)
    return Tied().eval()


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["fp8_row", "fp8_tile"])
def test_a_tied_head_is_quantized_and_the_embedding_stays(tied: Tied, scheme: str) -> None:
    fast = qcompiler.compile(tied, example_inputs=(IDS,), overrides={"lm_head": scheme, "shared_gate": scheme})
    rows = {row.module: row for row in fast.report.rows if row.is_matmul}
    assert rows["lm_head"].quantized and rows["lm_head"].format == scheme
    assert rows["lm_head"].remark == (
        "named by 'lm_head', although it is the vocabulary projection: an embedding has the same weight; the embedding "
        "keeps its weight in float"
    )
    assert rows["shared_gate"].remark == (
        "named by 'shared_gate', although its weight has fewer than 16 rows or columns: [1, 64]"
    )
    assert rows["router"].reason == "it is a router: a top-k selects from its output" and not rows["router"].quantized
    tables = [tensor for tensor in fast.graph.weights.values() if tensor.shape == (96, 64)]
    codes, table = sorted(tables, key=lambda tensor: tensor.itemsize)
    assert codes.dtype is torch.float8_e4m3fn and torch.equal(table, tied.embed.weight)
    exact = tied(IDS)
    assert float((fast(IDS) - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize(
    ("overrides", "ignore", "message"),
    [
        (
            {"lm_haed": "fp8_row"},
            [],
            "a pattern matches no weight of the model: got 'lm_haed'. Did you mean 'lm_head'? ",
        ),
        ({"*.upp": None}, [], "a pattern matches no weight of the model: got '*.upp'. "),
        ({}, ["router.*.x"], "a pattern matches no weight of the model: got 'router.*.x'. "),
    ],
)
def test_a_misspelled_name_is_found_before_capture(
    monkeypatch: pytest.MonkeyPatch, tied: Tied, overrides: dict[str, Any], ignore: list[str], message: str
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the model was captured")

    monkeypatch.setattr("qcompiler.compiler.pending.capture_model", fail)
    for example in ({}, {"example_inputs": (IDS,)}):
        with pytest.raises(PassError) as error:
            qcompiler.compile(tied, overrides=overrides, ignore=ignore, **example)  # type: ignore[arg-type]
        assert str(error.value).startswith(message) and len(str(error.value)) < 250


def test_only_a_few_of_many_names_are_shown() -> None:
    names = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(40) for part in ("up", "gate", "down")]
    with pytest.raises(PassError) as error:
        check_names(["*", "*.down_prj"], names)
    assert "Did you mean '*.down_proj'? Known: " in str(error.value) and "and 237 more." in str(error.value)
    check_names(["*.down_proj", "!model.layers.3.mlp.up_proj.weight", "*"], names)
