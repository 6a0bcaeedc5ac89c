"""Formats with zero points: text, types, numbers element by element, and whole models on the target cpu."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qcompiler
from qcompiler import numerics
from qcompiler.diagnostics.attribution import attribute_error
from qcompiler.dialects.kernel import why_no_kernel
from qcompiler.errors import QCompilerError
from qcompiler.ir import ALL, DType, Format, Graph, parse_format
from qcompiler.ir.formats import register_format, unregister_format
from qcompiler.schemes.named import SCHEMES, Scheme, register
from qcompiler.schemes.pipelines import QuantizationSpec

F32 = np.float32
INT8 = Format(DType.i8, (1, ALL), symmetric=False)
INT4 = Format(DType.i4, (1, 8), symmetric=False)


def unpacked(codes: Tensor, format: Format) -> list[list[int]]:
    if format.element is DType.i8:
        return codes.tolist()
    pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).to(torch.int16)
    return torch.where(pairs > 7, pairs - 16, pairs).tolist()


def slow(x: np.ndarray, format: Format) -> tuple[list[list[int]], list[list[float]], list[list[int]]]:
    """Codes, scales and zero points, one number at a time."""
    least, most = (-128, 127) if format.element is DType.i8 else (-8, 7)
    codes: list[list[int]] = []
    scales: list[list[float]] = []
    zeros: list[list[int]] = []
    for row in x:
        width = len(row) if format.block[1] == ALL else format.block[1]
        codes.append([])
        scales.append([])
        zeros.append([])
        for start in range(0, len(row), width):
            part = row[start : start + width]
            low, high = F32(min(part.min(), 0)), F32(max(part.max(), 0))
            scale = max(F32(high / F32(most - least)) - F32(low / F32(most - least)), F32(2.0**-100))
            zero = int(np.clip(np.rint(F32(least) - F32(low / scale)), least, most))
            codes[-1] += [int(np.clip(np.rint(F32(value / scale)) + zero, least, most)) for value in part]
            scales[-1].append(float(scale))
            zeros[-1].append(zero)
    return codes, scales, zeros


@pytest.mark.parametrize("format", [INT8, INT4])
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_element_by_element(format: Format, shift: float) -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) + shift
    x[2] = 0.0
    codes, scale, zero_point = numerics.quantize(x, format)
    want_codes, want_scales, want_zeros = slow(x.numpy(), format)
    assert unpacked(codes, format) == want_codes and scale.tolist() == want_scales and zero_point.tolist() == want_zeros
    stored = [(list(part.shape), part.dtype) for part in (codes, scale, zero_point)]
    kinds = [kind.stored for kind in format.types(tuple(x.shape))]
    assert stored == [(list(kind.shape), numerics.torch_dtype(kind.dtype)) for kind in kinds]
    got = numerics.dequantize(codes, scale, zero_point=zero_point, format=format)
    assert float(got[2].abs().max()) == 0.0
    step = scale.repeat_interleave(32 // scale.shape[1], 1)
    assert bool(((got - x).abs() <= step * 0.5001).all()), "each number is within half a step"


def test_one_sided_numbers_use_all_codes() -> None:
    x = torch.rand(4, 256, generator=torch.Generator().manual_seed(0))
    codes, scale, zero_point = numerics.quantize(x, INT8)
    assert zero_point.tolist() == [[-128]] * 4 and int(codes.max()) == 127
    _, symmetric = numerics.quantize(x, Format(DType.i8, (1, ALL)))
    torch.testing.assert_close(symmetric / scale, torch.full((4, 1), 255 / 127))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_poisons_its_block_alone(odd: float) -> None:
    x = torch.randn(2, 16)
    x[1, 9] = odd
    codes, scale, zero_point = numerics.quantize(x, INT4)
    got = numerics.dequantize(codes, scale, zero_point=zero_point, format=INT4)
    assert got.isnan().tolist() == [[False] * 16, [False] * 8 + [True] * 8]


def test_the_largest_numbers_stay_finite() -> None:
    x = torch.tensor([[3e38, -3e38, 0.0, 1.0]])
    codes, scale, zero_point = numerics.quantize(x, INT8)
    assert bool(numerics.dequantize(codes, scale, zero_point=zero_point, format=INT8).isfinite().all())


def test_a_stack_is_quantized_matrix_by_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 8, 64)
    whole = numerics.quantize(x, INT4)
    monkeypatch.setattr("qcompiler.numerics.quantizing.MOST_AT_ONCE", 1)
    assert all(map(torch.equal, whole, numerics.quantize(x, INT4)))


def test_the_text() -> None:
    for format, text in (
        (INT8, "#int8_row<symmetric = false>"),
        (INT4, "#format<i4, block = [1, 8], symmetric = false>"),
    ):
        assert str(format) == text and parse_format(text) == format
    assert INT8.level == "zero_point" and not INT8.decodes_like(Format(DType.i8, (1, ALL)))
    assert INT8.bytes((4, 256)) == 4 * 256 + 4 * 4 + 4
    assert "kernels need symmetric 8-bit codes" in str(why_no_kernel(INT8))


@pytest.mark.parametrize(
    "fields",
    [
        {"element": DType.f8e4m3fn},
        {"element": DType.i8, "scale": DType.f8e8m0fnu},
        {"element": DType.i8, "profile": "ue8m0"},
        {"element": DType.i8, "scale": DType.f8e4m3fn, "tensor_scale": True},
    ],
)
def test_formats_that_cannot_have_zero_points(fields: dict[str, object]) -> None:
    with pytest.raises(QCompilerError, match=r"cannot have zero points: got .*; need integer codes, and FP32 scales"):
        Format(block=(1, 32), symmetric=False, **fields)  # type: ignore[arg-type]  # any fields


def test_zero_points_belong_to_their_format() -> None:
    codes, scale, zero_point = numerics.quantize(torch.randn(4, 16), INT8)
    with pytest.raises(QCompilerError, match="the zero points do not match the format: got no zero points"):
        numerics.dequantize(codes, scale, format=INT8)
    with pytest.raises(QCompilerError, match="the zero points do not match the format: got zero points int8"):
        numerics.dequantize(codes, scale, zero_point=zero_point, format=Format(DType.i8, (1, ALL)))
    with pytest.raises(QCompilerError, match="a static scale has no zero points"):
        numerics.quantize_static(torch.randn(4, 16), scale, INT8)
    with pytest.raises(QCompilerError, match=r"the zero point is missing, but format #int8_row<symmetric = false>"):
        Graph.parse("""
        func @m(%q: i8[4, 16], %s: f32[4, 1]) -> (f32[4, 16]) {
          %x = quant.dequantize(%q, %s) {format = #int8_row<symmetric = false>, out_dtype = f32} : f32[4, 16]
          return %x
        }""").verify()


@pytest.fixture
def scheme() -> Iterator[str]:
    """A scheme with 4-bit weights and 8-bit activations, both with zero points."""
    four = register_format("test_asymmetric", INT4)
    register(Scheme("test_asymmetric", "Zero points.", spec=QuantizationSpec(INT8, four), options=()))
    yield "test_asymmetric"
    unregister_format("test_asymmetric")
    del SCHEMES["test_asymmetric"]


@torch.no_grad()
def test_a_model(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48)).eval()
    x = torch.randn(5, 64)
    fast = qcompiler.compile(model, example_inputs=(x,), scheme=scheme, target="cpu")
    text = fast.graph.text(locations=False)
    assert '%0.weight_z = core.param() {name = "0.weight_z"} : i8[96, 8]' in text
    operands = "%input_q, %input_s, %0.weight_q, %0.weight_s, %0.bias, None, None, %input_z, %0.weight_z"
    assert f"quant.linear({operands})" in text
    assert str(Graph.parse(str(fast.graph))) == str(fast.graph)

    def rounded(tensor: Tensor, format: Format) -> Tensor:
        codes, scale, zero_point = numerics.quantize(tensor, format)
        return numerics.dequantize(codes, scale, zero_point=zero_point, format=format)

    first, second = model[0], model[2]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    want = functional.relu(functional.linear(rounded(x, INT8), rounded(first.weight, INT4), first.bias))
    want = functional.linear(rounded(want, INT8), rounded(second.weight, INT4), second.bias)
    assert torch.equal(fast(x), want)
    with pytest.raises(QCompilerError, match=r"0\.weight: it or its activation is quantized with zero points"):
        fast.save_checkpoint(tmp_path / "folder", format="compressed-tensors")
    assert [row.kernel for row in attribute_error(fast, (x,)).rows] == [float("inf")] * 2, "equal to the reference"
