"""attribute_error: the three numbers of each quantized linear, against the same by hand."""

import gc
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qcompiler
from qcompiler import ErrorReport, InputError, PassError, attribute_error, numerics
from qcompiler.diagnostics.error_report import ErrorRow, sqnr
from qcompiler.numerics import ALL


class Two(nn.Module):
    """Two linears with nothing but a relu between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 32), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


@pytest.fixture
def two() -> Two:
    torch.manual_seed(0)
    return Two().eval()


X = torch.randn(7, 48, generator=torch.Generator().manual_seed(1))


def decibels(y: Tensor, other: Tensor) -> float:
    """The ratio of signal to noise, by its definition."""
    return 10 * math.log10(float(y.double().square().sum()) / float((y.double() - other.double()).square().sum()))


def by_module(report: ErrorReport) -> dict[str, ErrorRow]:
    return {row.module: row for row in report.rows}


def dequantized(x: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return numerics.dequantize(
        *numerics.quantize(x, numerics.format_of(block, dtype)), format=numerics.format_of(block, dtype)
    )


@pytest.mark.parametrize(
    ("scheme", "dtype", "x_block", "w_block"),
    [
        ("fp8_tile", torch.float8_e4m3fn, (1, 128), (128, 128)),
        ("int8_row", torch.int8, (1, ALL), (1, ALL)),
        ("int8_channel_reference", torch.int8, (ALL, 1), (1, ALL)),
    ],
)
def test_the_numbers_by_hand(
    two: Two, scheme: str, dtype: torch.dtype, x_block: tuple[int, int], w_block: tuple[int, int]
) -> None:
    fast = qcompiler.compile(two, scheme=scheme, example_inputs=(X,))
    rows = by_module(attribute_error(fast, X))
    with torch.no_grad():
        w1, b1, w2 = two.first.weight, two.first.bias, two.second.weight
        y1 = functional.linear(X, w1, b1)
        h = y1.relu()
        y2 = functional.linear(h, w2)
        q1 = functional.linear(dequantized(X, x_block, dtype), dequantized(w1, w_block, dtype), b1)
        own2 = functional.linear(dequantized(h, x_block, dtype), dequantized(w2, w_block, dtype))
        inherited2 = functional.linear(q1.relu(), w2)
    first, second = rows["first"], rows["second"]
    assert first.own == pytest.approx(decibels(y1, q1), abs=1e-3)
    assert second.own == pytest.approx(decibels(y2, own2), abs=1e-3)
    assert second.inherited == pytest.approx(decibels(y2, inherited2), abs=1e-3)
    assert first.inherited > 120 and first.kernel == second.kernel == math.inf
    assert 20 < first.own < 60 and 20 < second.inherited < 60


def test_worst_first_as_a_table_and_as_json(two: Two) -> None:
    with torch.no_grad():
        two.second.weight[0] *= 1e-4  # far below the scale of its tensor, but not of its row
        two.second.weight[1:, 0] *= 100
    fast = qcompiler.compile(two, scheme="int8_tensor", example_inputs=(X,))
    report = attribute_error(fast, (X,))
    assert [row.own for row in report.rows] == sorted(row.own for row in report.rows)
    lines = str(report).splitlines()
    assert lines[0].split() == ["operation", "module", "own", "dB", "inherited", "dB", "kernel", "dB"]
    assert [line.split()[:2] for line in lines[2:]] == [[f"%{row.name}", row.module] for row in report.rows]
    assert all(line.split()[-1] == "exact" and f"{row.own:.1f}" in line for line, row in zip(lines[2:], report.rows))  # noqa: B905
    read = json.loads(report.to_json())
    assert [row["name"] for row in read] == [row.name for row in report.rows]
    assert read[0] == {
        "name": report.rows[0].name, "module": report.rows[0].module, "own": report.rows[0].own,
        "inherited": report.rows[0].inherited, "kernel": None,
    }  # fmt: skip


def test_a_static_scale_is_that_of_calibration_for_either_input(two: Two) -> None:
    fast = qcompiler.compile(two, scheme="int8_tensor_static", calibration=[X / 4])  # so that most of it saturates
    rows = by_module(attribute_error(fast, {"x": X}))
    with torch.no_grad():
        scale = fast.graph.weights["x.scale"]
        assert scale.item() == ((X / 4).abs().max() / torch.tensor(127.0)).item()
        codes = numerics.quantize_static(X, scale, numerics.format_of((-1, -1), torch.int8))
        w = dequantized(two.first.weight, (ALL, ALL), torch.int8)
        got = functional.linear(
            numerics.dequantize(codes, scale, format=numerics.format_of((ALL, ALL), codes.dtype)), w, two.first.bias
        )
        assert rows["first"].own == pytest.approx(decibels(two.first(X), got), abs=1e-3)
    assert rows["first"].own < 15 and rows["first"].kernel == math.inf


@pytest.mark.parametrize("scheme", ["smoothquant_o1", "smoothquant_o3", "smoothquant_o1{pow2=true}"])
def test_a_prescaled_input(two: Two, scheme: str) -> None:
    fast = qcompiler.compile(two, scheme=scheme, calibration=[X])
    weights, op = fast.graph.weights, fast.graph["linear"].op
    static = scheme == "smoothquant_o3"
    assert op["x"].op.get("prescale") is not None and (op["x"].op.get("scale") is not None) == static
    rows = by_module(attribute_error(fast, X))
    inverse, bias = weights["x.smooth_inverse"], weights["first.bias_folded"]
    assert inverse.shape == (48,) and not torch.equal(inverse, torch.ones(48))
    with torch.no_grad():
        smoothed = two.first.weight / inverse * (bias / two.first.bias)[:, None]
        y = functional.linear(X * inverse, smoothed, bias)
        if static:
            scale = weights[str(op["x_scale"].op.attrs["name"])]
            codes = numerics.quantize_static(X, scale, numerics.format_of((-1, -1), torch.int8), prescale=inverse)
            x = numerics.dequantize(codes, scale, format=numerics.format_of((ALL, ALL), codes.dtype))
        else:
            x = numerics.dequantize(
                *numerics.quantize(X, numerics.format_of((1, ALL), torch.int8), prescale=inverse),
                format=numerics.format_of((1, ALL), torch.int8),
            )
        got = functional.linear(x, dequantized(smoothed, (ALL, ALL), torch.int8), bias)
    assert rows["first"].own == pytest.approx(decibels(y, got), abs=0.02)
    assert rows["first"].inherited > 120  # its input is the float model's
    assert 20 < rows["second"].inherited < 60 and rows["first"].kernel == rows["second"].kernel == math.inf


def test_a_cast_behind_a_linear() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(48, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x).bfloat16().float()).bfloat16()
            return y

    model = Cast().eval()
    fast = qcompiler.compile(model, scheme="int8_row", example_inputs=(X,))
    rows = by_module(attribute_error(fast, X))
    with torch.no_grad():
        y = model.first(X).bfloat16()
        left, right = (dequantized(t, (1, ALL), torch.int8) for t in (X, model.first.weight))
        got = functional.linear(left, right, model.first.bias).bfloat16()
    assert rows["first"].own == pytest.approx(decibels(y, got), abs=1e-3)
    assert rows["first"].inherited == math.inf and 20 < rows["second"].inherited < 60


def test_bf16_models_and_overrides(two: Two) -> None:
    fast = qcompiler.compile(
        two.bfloat16(), scheme="fp8_row", overrides={"second": "int8_row"}, example_inputs=(X.bfloat16(),)
    )
    rows = by_module(attribute_error(fast, X.bfloat16()))
    assert rows["first"].own < rows["second"].own and rows["first"].inherited == math.inf
    assert all(20 < row.own < 60 and row.kernel == math.inf for row in rows.values())


def test_the_float_model_must_be_there(two: Two) -> None:
    fast = qcompiler.compile(two, example_inputs=(X,))
    want = attribute_error(fast, X)
    twin = Two().eval()
    twin.load_state_dict(two.state_dict())
    lonely = qcompiler.compile(twin, example_inputs=(X,))
    del twin
    gc.collect()
    assert attribute_error(lonely, X, two) == attribute_error(lonely, X, model=two) == want
    with pytest.raises(InputError) as error:
        attribute_error(lonely, X)
    assert str(error.value) == (
        "the float model has been freed. Keep the original model, or pass it: attribute_error(compiled, batch, model)."
    )


def test_what_cannot_be_attributed(two: Two) -> None:
    unfused = qcompiler.compile(two, pipeline="canonicalize; fp8-tile", example_inputs=(X,))
    with pytest.raises(
        PassError, match=r"the graph has no fused quantized linear.*need a pipeline with fuse-linear in it"
    ):
        attribute_error(unfused, X)
    fast = qcompiler.compile(two, example_inputs=(X,))
    wrong: Any
    other = Two()
    other.first, other.second = nn.Linear(48, 24), nn.Linear(24, 16, bias=False)
    other.eval()
    with pytest.raises(
        InputError, match=r"not the one that was compiled: got first\.weight: f32\[.*; need first\.weight"
    ):
        attribute_error(fast, X, other)
    with pytest.raises(
        InputError, match=r"this is not a compiled model: got Two; need the result of qcompiler\.compile"
    ):
        attribute_error(two, X)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(InputError, match="a call of the model has the wrong type: got NoneType; need a tensor"):
        attribute_error(fast, None)
    for wrong in (3, X[:, :7], X.half()):
        with pytest.raises(qcompiler.QCompilerError):
            attribute_error(fast, wrong)


def test_sqnr() -> None:
    y = torch.tensor([3.0, 4.0])
    assert sqnr(y, y + torch.tensor([0.3, 0.4])) == pytest.approx(20.0, abs=1e-5)
    assert sqnr(y, torch.zeros(2)) == 0.0
    assert sqnr(y, y.clone()) == sqnr(torch.zeros(2), torch.zeros(2)) == math.inf
    assert sqnr(torch.zeros(2), y) == -math.inf
    assert sqnr(y.bfloat16(), y + 2**-20) == pytest.approx(10 * math.log10(25 / (2 * 2.0**-40)), rel=1e-3)


def test_the_data_of_calibration_is_let_go_and_not_needed_again(two: Two) -> None:
    batches = [torch.randn(8, 48, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    fast = qcompiler.compile(two, scheme="smoothquant_o3{observer=mse}", calibration=batches)
    assert fast.calibration is not None and fast.calibration.batches is None
    rows = attribute_error(fast, batches[0]).rows
    assert {row.name for row in rows} == {"linear", "linear_1"}
    assert all(15 < row.own < 60 for row in rows)
