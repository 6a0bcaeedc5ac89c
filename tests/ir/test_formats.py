"""Number formats as values: their text, what follows from them, and 4-bit formats against a slow computation here."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qcompiler
from qcompiler import numerics
from qcompiler.errors import ParseError, QCompilerError
from qcompiler.ir import ALL, DType, Format, Graph, TensorType, parse_format, parse_literal, symbol
from qcompiler.ir.formats import (
    ELEMENTS,
    FORMATS,
    FP8_TILE,
    MXFP4,
    MXFP8,
    NVFP4,
    SCALES,
    read_format,
    register_format,
    unregister_format,
)
from qcompiler.schemes.named import SCHEMES, Scheme, register
from qcompiler.schemes.pipelines import QuantizationSpec

F32 = np.float32
I4 = Format(DType.i4, (1, 32))
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# Text


@pytest.mark.parametrize("format", [*FORMATS.values(), I4, Format(DType.f8e5m2, (64, 3), DType.f8e8m0fnu, "ue8m0")])
def test_the_text_parses_back(format: Format) -> None:
    for each in (format, replace(format, profile="vllm"), replace(format, scale=DType.f8e4m3fn)):
        assert parse_format(str(each)) == each
    if format.block[0] == 1:
        assert parse_format(str(columns := replace(format, scale_layout="col_major"))) == columns


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("#fp8_tile", "#fp8_tile"),
        ("#format<f8e4m3fn, block = [1, 128]>", "#fp8_tile"),
        ('#fp8_tile< profile = "vllm" >', '#fp8_tile<profile = "vllm">'),
        ("#fp8_tile<block = [1, 64]>", "#format<f8e4m3fn, block = [1, 64]>"),
        ("#fp8_tile<block = [128, 128]>", "#fp8_block"),
        ("#format<f4e2m1fn, block = [1, 16], scale = f8e4m3fn, tensor_scale = true>", "#nvfp4"),
        ("#format<block = [1, 32], scale = f8e8m0fnu, element = f4e2m1fn>", "#mxfp4"),
    ],
)
def test_a_format_has_one_spelling(text: str, canonical: str) -> None:
    assert str(parse_literal(text)) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#format<f8e4m3fn>", "a format needs an element type and a block"),
        (
            "#format<bf16, block = [1, 16]>",
            "the element of a format has an unsupported dtype: got bf16; need f8e4m3fn or",
        ),
        (
            "#format<i8, block = [1, 0]>",
            "a block must be two positive sizes: got [1, 0]; need [rows, columns], where -1",
        ),
        ("#format<i8, block = 3>", "a block must be two positive sizes: got 3"),
        ("#fp8_tile<scale = bf16>", "the scale of a format has an unsupported dtype: got bf16; need f32 or"),
        ('#fp8_tile<profile = "vlm">', "unknown quantization profile: got 'vlm'. Did you mean 'vllm'?"),
        ("#fp8_tile<profile = 7>", "unknown quantization profile: got 7"),
        ("#fp8_tile<blok = [1, 2]>", "a format has no field 'blok'. Did you mean 'block'?"),
        ("#fp8_tile<block = [1, 2], block = [1, 2]>", "the block of a format is given twice"),
        ("#fp8_tiel<block = [1, 2]>", "unknown format: got 'fp8_tiel'. Did you mean 'fp8_tile'?"),
        ("#fp8_tile<tensor_scale = 1>", "a format is malformed: got 1 and row_major"),
        ("#fp8_tile<tensor_scale = true>", "tensor_scale requires scales of limited range: got f32; need f8e4m3fn"),
        ('#fp8_block<scale_layout = "col_major">', "the column-major scale layout requires blocks of 1 row"),
        ("#fp8_tiel", "'#fp8_tiel' is not the name of a format. Did you mean 'fp8_tile'?"),
    ],
)
def test_messages(text: str, message: str) -> None:
    with pytest.raises(ParseError) as error:
        parse_format(text)
    assert message in str(error.value)


def test_what_is_no_format_stays_a_tag() -> None:
    assert str(parse_literal("#contiguous_format")) == "#contiguous_format"
    assert read_format("nvfp4", {}) == NVFP4


# What follows from a format


def test_types_and_bytes() -> None:
    s0 = symbol("s0")
    assert [str(kind) for kind in NVFP4.types((s0, 64))] == ["f4e2m1fn[s0, 64]", "f8e4m3fn[s0, 4]", "f32[]"]
    assert [str(kind) for kind in MXFP4.types((2, s0, 70))] == ["f4e2m1fn[2, s0, 70]", "f8e8m0fnu[2, s0, 3]"]
    assert str(NVFP4.bytes((s0, 64))) == "36*s0 + 4"
    assert MXFP4.bytes((8, 64)) == 8 * 32 + 8 * 2 and FP8_TILE.bytes((8, 256)) == 8 * 256 + 8 * 2 * 4
    assert TensorType(DType.f4e2m1fn, (3, 10)).stored == TensorType(DType.u8, (3, 5))
    with pytest.raises(QCompilerError, match="f4e2m1fn codes are packed 2 in a byte, which does not divide 7 columns"):
        NVFP4.types((3, 7))


@pytest.mark.parametrize("format", [*FORMATS.values(), I4])
@pytest.mark.parametrize("shape", [(40,), (5, 40), (2, 5, 64), (0, 64)])
def test_tensors_are_what_the_format_says(format: Format, shape: tuple[int, ...]) -> None:
    parts = numerics.quantize(torch.randn(shape), format)
    assert [TensorType.of(part) for part in parts] == [kind.stored for kind in format.types(shape)]
    assert sum(part.nbytes for part in parts) == format.bytes(shape)
    assert all(part.is_contiguous() for part in parts)
    assert numerics.dequantize(*parts[:2], *parts[2:], format=format).shape == shape


def test_only_conventions_and_layouts_leave_the_numbers_alone() -> None:
    assert FP8_TILE.decodes_like(replace(FP8_TILE, profile="vllm", scale_layout="col_major"))
    for other in (MXFP8, NVFP4, replace(FP8_TILE, element=DType.f8e5m2), replace(FP8_TILE, block=(1, 64))):
        assert not FP8_TILE.decodes_like(other)


# 4-bit codes and scales of one byte, element by element


def e4m3(code: int) -> float:
    """The number of an FP8 E4M3 code without a sign."""
    exponent, mantissa = code >> 3, code & 7
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6


def nearest(value: float, grid: Sequence[float]) -> int:
    """The place of the nearest number of a grid, of the even one of two; of the last one beyond it."""
    distances = [abs(value - each) for each in grid]
    least = min(distances)
    found = [place for place, distance in enumerate(distances) if distance == least]
    return found[0] if len(found) == 1 else next(place for place in found if place % 2 == 0)


def slow(x: np.ndarray, format: Format) -> tuple[list[list[int]], list[list[float]], float]:
    """Codes, scales and the tensor scale of a matrix, by the definitions: one element at a time, in FP32."""
    columns = format.block[1]
    grid = FP4 if format.element is DType.f4e2m1fn else [float(n) for n in range(8)]
    top = F32(np.abs(x).max()) / F32(format.max * 448) if format.tensor_scale else F32(1)
    codes: list[list[int]] = []
    scales: list[list[float]] = []
    for row in x:
        codes.append([0] * len(row))
        scales.append([])
        for start in range(0, len(row), columns):
            block = row[start : start + columns]
            amax = F32(np.abs(block).max())
            if format.scale is DType.f8e4m3fn:
                scale = e4m3(nearest(float(amax / F32(format.max) / top), [e4m3(code) for code in range(127)]))
            elif format.scale is DType.f8e8m0fnu:
                exponent = math.floor(math.log2(amax)) if amax else -127
                scale = 2.0 ** max(exponent - math.floor(math.log2(format.max)), -127)
            else:
                scale = float(amax / F32(format.max))
            scales[-1].append(scale)
            for place, value in enumerate(block):
                whole = F32(scale) * top
                scaled = float(F32(abs(value)) / whole) if scale else 0.0
                code = nearest(scaled, grid)
                if not scale:
                    codes[-1][start + place] = 0
                elif format.element is DType.i4:
                    codes[-1][start + place] = (16 - code) % 16 if value < 0 else code
                else:
                    codes[-1][start + place] = code + 8 * bool(np.signbit(value))
    return codes, scales, float(top)


def unpacked(codes: Tensor) -> list[list[int]]:
    return [[int(byte) >> shift & 15 for byte in row for shift in (0, 4)] for row in codes]


def samples() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ties = np.array(
        [[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -2.5, -5.0, -0.1, 0.0, -0.0] * 4]
    )
    return {
        "ordinary": rng.standard_normal((6, 70)).astype(F32),
        "wide": (rng.standard_normal((4, 64)) * np.exp(rng.standard_normal((4, 64)) * 4)).astype(F32),
        "ties": np.concatenate([ties, ties * 3, ties * 2.0**-9]).astype(F32),
        "tiny": (rng.standard_normal((3, 64)) * 2.0**-120).astype(F32),
        "zeros": np.concatenate([np.zeros((2, 64)), np.full((1, 64), 1000.0)]).astype(F32),
    }


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("format", [NVFP4, MXFP4, replace(MXFP4, block=(1, 16)), replace(NVFP4, tensor_scale=False)])
def test_four_bits_element_by_element(format: Format, name: str) -> None:
    x = samples()[name]
    if format == NVFP4 and name == "tiny":  # the floor of the tensor scale decides
        x = x * F32(2.0**100)
    want_codes, want_scales, want_top = slow(x, format)
    codes, scale, *tensor_scale = numerics.quantize(torch.from_numpy(x), format)
    assert scale.float().tolist() == want_scales
    assert unpacked(codes) == want_codes
    assert [t.item() for t in tensor_scale] == ([want_top] if format.tensor_scale else [])
    got = numerics.dequantize(codes, scale, *tensor_scale, format=format)
    columns = format.block[1]
    for (row, column), value in np.ndenumerate(got.numpy()):
        code = want_codes[row][column]
        number = FP4[code % 8] * (-1 if code > 7 else 1)
        assert value == F32(number) * (F32(want_scales[row][column // columns]) * F32(want_top))


def test_int4_element_by_element() -> None:
    x = samples()["ordinary"][:, :64]
    codes, scale = numerics.quantize(torch.from_numpy(x), I4)
    want_codes, want_scales, _ = slow(x, I4)
    assert unpacked(codes) == want_codes and scale.tolist() == want_scales
    values = torch.tensor([[code - 16 if code > 7 else code for code in row] for row in want_codes])
    assert torch.equal(numerics.dequantize(codes, scale, format=I4), values * scale.repeat_interleave(32, 1))


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("format", [NVFP4, MXFP4, I4, MXFP8])
def test_what_is_not_finite_poisons_its_block_alone(format: Format, odd: float) -> None:
    x = torch.randn(4, 64)
    clean = numerics.quantize(x.clone().index_fill_(1, torch.tensor([40]), 0.0), format)
    x[:, 40] = 0.0
    x[1, 40] = odd
    codes, scale, *tensor_scale = numerics.quantize(x, format)
    got = numerics.dequantize(codes, scale, *tensor_scale, format=format)
    block = slice(40 // format.block[1] * format.block[1], (40 // format.block[1] + 1) * format.block[1])
    assert bool(got[1, block].isnan().all())
    got[1, block] = want = numerics.dequantize(clean[0], clean[1], *clean[2:], format=format)[1, block]
    assert (
        torch.equal(got, numerics.dequantize(clean[0], clean[1], *clean[2:], format=format)) and not want.isnan().any()
    )


def test_a_stack_is_quantized_matrix_by_matrix_with_one_tensor_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 8, 64) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1)
    for format in (NVFP4, MXFP4, FP8_TILE):
        whole = numerics.quantize(x, format)
        monkeypatch.setattr("qcompiler.numerics.quantizing.MOST_AT_ONCE", 1)
        parts = numerics.quantize(x, format)
        monkeypatch.undo()
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize(("x_format", "w_format"), [(NVFP4, NVFP4), (MXFP8, MXFP4), (Format(DType.i8, (1, ALL)), I4)])
def test_the_matmul(x_format: Format, w_format: Format) -> None:
    x, w, bias = torch.randn(5, 64), torch.randn(7, 64), torch.randn(7)
    x_q, x_s, *x_t = numerics.quantize(x, x_format)
    w_q, w_s, *w_t = numerics.quantize(w, w_format)
    scales = [x_t[0] if x_t else None, w_t[0] if w_t else None]
    got = numerics.scaled_linear(
        x_q, x_s, w_q, w_s, bias, *scales, x_format=x_format, w_format=w_format, out_dtype=torch.float32
    )
    left, right = (
        numerics.dequantize(q, s, *t, format=f) for q, s, f, t in ((x_q, x_s, x_format, x_t), (w_q, w_s, w_format, w_t))
    )
    assert torch.equal(got, torch.nn.functional.linear(left, right, bias))
    with pytest.raises(QCompilerError, match="the scales do not match the format"):
        numerics.dequantize(w_q, w_s, *([] if w_t else [torch.ones(())]), format=w_format)


def test_every_element_and_scale_can_be_combined() -> None:
    x = torch.randn(4, 64)
    for element in ELEMENTS:
        for scale in SCALES:
            format = Format(element, (2, 32), scale, tensor_scale=scale is DType.f8e4m3fn)
            codes, scales, *level = numerics.quantize(x, format)
            error = numerics.dequantize(codes, scales, *level, format=format) - x
            assert 0 < float(error.norm() / x.norm()) < 0.25


# A format and a scheme from outside


@pytest.fixture
def scheme() -> Iterator[str]:
    """The name of a scheme with a format of 4-bit codes, neither of which qcompiler has."""
    four = register_format("test_four_bits", Format(DType.f4e2m1fn, (1, 4), DType.f8e4m3fn, tensor_scale=True))
    register(Scheme("test_four_bits", "Four bits.", spec=QuantizationSpec(four, four), options=("scale",)))
    yield "test_four_bits"
    unregister_format("test_four_bits")
    del SCHEMES["test_four_bits"]


@torch.no_grad()
def test_a_format_and_a_scheme_from_outside(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 48)).eval()
    x = torch.randn(5, 64)
    fast = qcompiler.compile(model, example_inputs=(x,), scheme=scheme, target="cpu")
    assert [row.format for row in fast.report.rows] == [scheme, scheme]
    assert '%0.weight_q = core.param() {name = "0.weight_q"} : f4e2m1fn[96, 64]' in fast.graph.text(locations=False)
    assert "x_format = #test_four_bits" in str(fast.graph) and str(Graph.parse(str(fast.graph))) == str(fast.graph)
    four = FORMATS[scheme]

    def rounded(tensor: Tensor) -> Tensor:
        codes, scale, *rest = numerics.quantize(tensor, four)
        return numerics.dequantize(codes, scale, *rest, format=four)

    first, second = model[0], model[2]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    want = functional.gelu(functional.linear(rounded(x), rounded(first.weight), first.bias))
    want = functional.linear(rounded(want), rounded(second.weight), second.bias)
    got = fast(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert 0.01 < float((got - model(x)).norm() / model(x).norm()) < 0.3
    fast.save(tmp_path / "four")
    again = qcompiler.load(tmp_path / "four")
    assert torch.equal(again(x), got)
    assert again.graph.weights["0.weight_q"].nbytes == 96 * 64 // 2
