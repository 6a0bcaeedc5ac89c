"""Graphs in MLIR: stages, names and sizes; weights in three forms; one error for all unsupported operations; casts."""

import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ResidualMlp
from torch import nn

import qcompiler
from codegen.mlir import to_mlir
from codegen.mlir.casts import SMALLEST, prepared
from codegen.mlir.meanings import grouped_linear, histc
from codegen.mlir.reshaping import groups
from qcompiler import numerics
from qcompiler.compiler.model import CompiledModel
from qcompiler.dialects.grouped import grouped_linear as grouped_linear_meaning
from qcompiler.errors import CodegenError, InputError, QCompilerError
from qcompiler.ir import Graph, Value

needs_torch_mlir = pytest.mark.skipif(find_spec("torch_mlir") is None, reason="needs the extra mlir")


class Unusual(nn.Module):
    """Operations that torch-mlir does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        found: torch.Tensor = torch.special.i0(y) + torch.special.i0(y + 1) + torch.igamma(y.abs(), y.abs())
        return found


@pytest.fixture(scope="module")
def model() -> ResidualMlp:
    torch.manual_seed(0)
    return ResidualMlp().eval()


@pytest.fixture(scope="module")
def compiled(model: ResidualMlp) -> CompiledModel:
    return qcompiler.compile(model, scheme="fp8_tile", example_inputs=(torch.randn(7, 256),))


@needs_torch_mlir
@pytest.mark.parametrize(
    ("stage", "dialect"),
    [("captured", "torch"), ("fp8-tile", "linalg"), ("fuse-linear", "torch"), ("fuse-epilogue", "torch")],
)
def test_stages_have_modules(compiled: CompiledModel, stage: str, dialect: str) -> None:
    """`to_mlir` itself verifies each module and checks its round-trip through text."""
    module = compiled.to_mlir(stage, dialect)
    assert module.name == "ResidualMlp" and f"func.func @{module.name}(" in module.text
    assert str(module) == module.text
    assert ("linalg." in module.text) == (dialect == "linalg")
    assert ("torch.aten." in module.text) == (dialect == "torch")


@needs_torch_mlir
def test_names_sizes_codes_and_scales_are_kept(compiled: CompiledModel) -> None:
    module = compiled.to_mlir(dialect="linalg")
    assert str(module.arguments[0]) == "input x: f32[s0, 256]"
    (output,) = compiled.graph.outputs
    assert isinstance(output, Value)
    assert [str(result) for result in module.results] == [f"output {output.name}: f32[s0, 256]"]
    signature = next(line for line in module.text.splitlines() if "func.func" in line)
    for number, argument in enumerate(module.arguments):
        assert re.search(
            rf'%arg{number}: [^%]*qcompiler.name = "{re.escape(argument.name)}", '
            rf'qcompiler.type = "{re.escape(str(argument.type))}"',
            signature,
        )
    assert 'tensor<384x256xf8E4M3FN> {qcompiler.name = "up.weight_q"' in signature
    assert 'tensor<3x2xf32> {qcompiler.name = "up.weight_s"' in signature
    assert "tensor<?x256xf32>" in signature
    assert re.search(r"arith.truncf .*f8E4M3FN", module.text)


@needs_torch_mlir
@pytest.mark.parametrize("dialect", ["torch", "linalg"])
def test_weights_as_resources_and_omitted(model: ResidualMlp, compiled: CompiledModel, dialect: str) -> None:
    whole, elided = (compiled.to_mlir(None, dialect, weights) for weights in ("resource", "elide"))
    for module in (whole, elided):
        assert [argument.kind for argument in module.arguments] == ["input"]
        assert "dense_resource<up.weight_q> : tensor<384x256xf8E4M3FN>" in module.text
    blob = re.search(r'up\.weight_q: "0x(\w+)"', whole.text)
    assert blob is not None and "0x" + blob[1][:8] == "0x01000000"  # the alignment, then the bytes
    codes = compiled.graph.weights["up.weight_q"].view(torch.uint8).numpy().tobytes()
    assert bytes.fromhex(blob[1][8:]) == codes
    assert "dialect_resources" not in elided.text
    early = compiled.to_mlir("captured", dialect, "resource").text
    assert model.up.bias.detach().numpy().tobytes().hex().upper() in early


@needs_torch_mlir
def test_a_released_weight_is_named(compiled: CompiledModel) -> None:
    with pytest.raises(InputError, match=r"got down\.weight\. Keep the compiled model alive"):
        to_mlir(compiled.stages["captured"], weights="resource", store=compiled.graph.weights)


@needs_torch_mlir
def test_saved(compiled: CompiledModel, tmp_path: Path) -> None:
    module = compiled.to_mlir("captured")
    assert module.save(tmp_path / "model.mlir").read_text() == module.text + "\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "model.mlir"]
    with pytest.raises(InputError, match="cannot be written"):
        module.save(tmp_path / "nowhere" / "model.mlir")


@needs_torch_mlir
@pytest.mark.parametrize("dialect", ["torch", "linalg"])
def test_one_error_lists_all_unsupported_operations(dialect: str) -> None:
    compiled = qcompiler.compile(Unusual().eval(), scheme="fp8_tile", example_inputs=(torch.randn(7, 256),))
    with pytest.raises(CodegenError) as caught:
        compiled.to_mlir("captured", dialect)
    message = str(caught.value)
    assert message.startswith(f"2 operations of the graph cannot be lowered to {dialect}:\n")
    assert re.search(r"\n  aten\.i0 \(x2, tests/codegen/mlir/test_mlir\.py:\d+\): ", message)
    assert re.search(r"\n  aten\.igamma \(x1, tests/codegen/mlir/test_mlir\.py:\d+\): ", message)


@needs_torch_mlir
def test_one_error_lists_everything_that_cannot_be_traced() -> None:
    text = """func @data(%x: f32[8, 4], %n: float) -> (f32[8, 4]) {
      %a = aten.nonzero(%x) : i64[u0, 2]
      %b = aten.mul.Scalar(%x, %n) : f32[8, 4]
      %c = aten.masked_select(%x, %x) : f32[u1]
      return %b
    }"""
    with pytest.raises(QCompilerError, match="a number that is not a size"):
        to_mlir(Graph.parse(text))
    with pytest.raises(CodegenError, match=r"(?s)2 operations.*aten\.nonzero.*aten\.masked_select"):
        to_mlir(Graph.parse(text.replace(", %n: float", "").replace("%n", "2.0")))


@needs_torch_mlir
@pytest.mark.parametrize(("dialect", "weights"), [("linalgg", "arguments"), ("torch", "resources")])
def test_misspelled_options(compiled: CompiledModel, dialect: str, weights: str) -> None:
    with pytest.raises(InputError, match="Did you mean"):
        compiled.to_mlir(None, dialect, weights)


def test_a_missing_package_names_the_extra(compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch_mlir")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_mlir", None)
    with pytest.raises(QCompilerError, match=re.escape('pip install "qcompiler[mlir]"')):
        compiled.to_mlir()


@needs_torch_mlir
def test_state_is_an_argument_and_its_new_value_a_result() -> None:
    graph = Graph.parse("""func @counter(%x: f32[s0, 4]) -> (f32[s0, 4]) {
      %w = core.param() {name = "w"} : f32[4]
      %seen = core.buffer() {name = "seen"} : f32[4]
      %y = aten.mul.Tensor(%x, %w) : f32[s0, 4]
      %next = aten.add.Tensor(%seen, %w) : f32[4]
      core.update(%seen, %next)
      return %y
    }""")
    module = to_mlir(graph, "linalg", "elide")
    assert list(map(str, module.arguments)) == ["input x: f32[s0, 4]", "state seen: f32[4]"]
    assert list(map(str, module.results)) == ["output y: f32[s0, 4]", "update seen: f32[4]"]


def floats() -> Iterator[torch.Tensor]:
    """FP32 numbers with all kinds of bit patterns, and every tie between FP8 neighbors."""
    for start in range(0, 2**32, 2**28):
        yield torch.arange(start, start + 2**28, 6151, dtype=torch.int64).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", SMALLEST)
def test_prepared_numbers_have_equal_codes_and_need_no_rounding_up_to_normal(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int64).to(torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()].sort().values
    ties = (codes[1:] + codes[:-1]) / 2
    top = torch.finfo(dtype).max
    for x in (*floats(), codes, ties, ties.nextafter(torch.tensor(9e9)), ties.nextafter(torch.tensor(-9e9))):
        x = x.clamp(-top, top)
        y = prepared(x, dtype)
        known = ~x.isnan()
        assert torch.equal(y.to(dtype).view(torch.uint8)[known], x.to(dtype).view(torch.uint8)[known])
        assert torch.equal(y.isnan(), x.isnan())
        smallest, least = SMALLEST[dtype]
        assert not ((y.abs() >= least) & (y.abs() < smallest)).any()


@settings(max_examples=12)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    block=st.sampled_from([(1, 128), (1, 64), (1, -1)]),
)
def test_grouped_rows_without_reading_data(sizes: list[int], block: tuple[int, int]) -> None:
    torch.manual_seed(len(sizes))
    rows, w = torch.randn(sum(sizes) + 3, 128), torch.randn(len(sizes), 128, 128)
    offsets = torch.tensor(sizes).cumsum(0).to(torch.int32)
    operands = (
        *numerics.quantize(rows, numerics.format_of(block)),
        *numerics.quantize(w, numerics.format_of((128, 128))),
        offsets,
    )
    options: dict[str, Any] = {
        "x_format": numerics.format_of(block),
        "w_format": numerics.format_of((128, 128)),
        "out_dtype": torch.float32,
    }
    got, want = grouped_linear(*operands, **options), grouped_linear_meaning(*operands, **options)
    # The same products; for another number of rows, a matmul library may add them in another order.
    torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-5)


@given(st.lists(st.integers(-2, 9), max_size=50), st.integers(2, 8))
def test_histograms(numbers: list[int], bins: int) -> None:
    x = torch.tensor(numbers, dtype=torch.float32)
    assert torch.equal(histc(x, bins, 0, bins - 1), torch.histc(x, bins, 0, bins - 1))


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ((2, 3, 4), (6, 4), [((0, 2), (0, 1)), ((2, 3), (1, 2))]),
        ((6, 4), (6, 2, 2), [((0, 1), (0, 1)), ((1, 2), (1, 3))]),
        ((5, 1, 8), (5, 8), [((0, 1), (0, 1)), ((1, 3), (1, 2))]),
        ((5, 8, 1), (5, 8), [((0, 1), (0, 1)), ((1, 3), (1, 2))]),
        ((5, 8), (5, 8, 1), [((0, 1), (0, 1)), ((1, 2), (1, 3))]),
        ((4, 6), (3, 8), [((0, 2), (0, 2))]),
    ],
)
def test_runs_of_dimensions(before: tuple[int, ...], after: tuple[int, ...], found: list[Any]) -> None:
    assert [((a.start, a.stop), (b.start, b.stop)) for a, b in groups(before, after)] == found


def test_key_value_caches_are_not_lowered() -> None:
    kind = "cache<f32, slots = 1, heads = 1, capacity = 4, key = 8, value = 8>"
    graph = Graph.parse(
        f"""func @f(%q: f32[1, 1, 1, 8], %slots: i64[1], %lengths: i64[1]) -> (f32[1, 1, 1, 8]) {{
          %c = state.cache() {{name = "layers.0"}} : {kind}
          %o = state.attend(%c, %q, %slots, %lengths) {{scale = 1.0}} : f32[1, 1, 1, 8]
          return %o
        }}"""
    )
    with pytest.raises(CodegenError, match="key-value caches cannot be lowered to MLIR: got 1 caches"):
        to_mlir(graph)
