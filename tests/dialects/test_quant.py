"""The quant and kernel dialects: types for every granularity, and what each operation computes."""

from typing import Any

import pytest
import torch

import qcompiler.dialects  # noqa: F401
from qcompiler import numerics
from qcompiler.errors import QCompilerError
from qcompiler.interpreter import interpret
from qcompiler.ir import DType, Format, Graph, symbol
from qcompiler.ir.formats import ELEMENTS, scale_shape
from qcompiler.numerics import ALL
from qcompiler.numerics.dtypes import ir_dtype

BLOCKS = [(1, 128), (1, ALL), (ALL, ALL), (ALL, 1), (128, 128), (ALL, 64), (4, ALL)]


def test_the_formats_are_those_of_numerics() -> None:
    assert {ir_dtype(dtype) for dtype in numerics.FORMAT_MAX} == {each for each in ELEMENTS if each.bits == 8}


@pytest.mark.parametrize("block", BLOCKS)
def test_scale_shapes_of_fixed_and_of_symbolic_sizes(block: tuple[int, int]) -> None:
    for shape in ((300,), (5, 300), (2, 5, 300), (0, 300), (2, 3, 4, 65)):
        _, scale = numerics.quantize(torch.zeros(shape), numerics.format_of(block))
        assert scale_shape(shape, block) == list(scale.shape)
    s0 = symbol("s0")
    rows = {1: s0, ALL: 1}
    got = scale_shape((s0, 256), block)
    if block[0] in rows:
        assert got == [rows[block[0]], numerics.scale_shape((1, 256), block)[1]]
    else:
        assert str(got[0]) == f"floordiv(s0 + {block[0] - 1}, {block[0]})"


OPERANDS = """
func @m(%x: {x}[s0, 6, 40], %f: {f}[40], %w: i8[8, 40], %t: f32[8, 1], %s: f32[1, 1]) -> ({type}) where s0 in 0.. {{
  {line}
  return {names}
}}
"""


def check(line: str, inputs: list[Any], types: str, x: str = "f32", f: str = "f32") -> tuple[Any, ...]:
    """The results of one operation, of which the types are checked in the text."""
    names = line.partition(" = ")[0]
    graph = Graph.parse(OPERANDS.format(x=x, f=f, type=types, line=f"{line} : {types}", names=names))
    graph.verify()
    results = interpret(graph, inputs)
    assert str(Graph.parse(str(graph))) == str(graph)
    return results


def inputs(x: torch.dtype = torch.float32, f: torch.dtype = torch.float32) -> list[Any]:
    rng = torch.Generator().manual_seed(0)
    w, t = numerics.quantize(torch.randn(8, 40, generator=rng), numerics.format_of((1, ALL), torch.int8))
    factors = torch.linspace(0.5, 2, 40).to(f)
    return [torch.randn(3, 6, 40, generator=rng).to(x), factors, w, t, torch.full((1, 1), 0.02)]


@pytest.mark.parametrize("dialect", ["quant", "kernel"])
@pytest.mark.parametrize("dtype", [DType.f8e4m3fn, DType.f8e5m2, DType.i8])
@pytest.mark.parametrize(
    ("block", "scale"),
    [((1, 16), "s0, 6, 3"), ((1, ALL), "s0, 6, 1"), ((ALL, ALL), "1, 1"), ((ALL, 1), "1, 40"), ((4, 16), "s0, 2, 3")],
)
def test_quantize_with_and_without_a_prescale(dialect: str, dtype: DType, block: tuple[int, int], scale: str) -> None:
    code = {DType.f8e4m3fn: torch.float8_e4m3fn, DType.f8e5m2: torch.float8_e5m2, DType.i8: torch.int8}[dtype]
    for x, f in (("f32", "f32"), ("bf16", "f16")):
        given = inputs(*({"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[each] for each in (x, f)))
        for operands, prescale in (("%x", None), ("%x, None", None), ("%x, %f", given[1])):
            line = f"%q, %d = {dialect}.quantize({operands}) {{format = {Format(dtype, block)}}}"
            q, d = check(line, given, f"{dtype}[s0, 6, 40], f32[{scale}]", x, f)
            want_q, want_d = numerics.quantize(given[0], numerics.format_of(block, code), prescale=prescale)
            assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8)) and torch.equal(d, want_d)


@pytest.mark.parametrize("dialect", ["quant", "kernel"])
@pytest.mark.parametrize("prescaled", [False, True])
def test_quantize_static(dialect: str, prescaled: bool) -> None:
    given = inputs()
    line = f"%q = {dialect}.quantize_static(%x, %s{', %f' if prescaled else ''}) {{format = #int8_tensor}}"
    (q,) = check(line, given, "i8[s0, 6, 40]")
    factors = given[1] if prescaled else None
    assert torch.equal(
        q, numerics.quantize_static(given[0], given[4], numerics.format_of((-1, -1), torch.int8), prescale=factors)
    )


def test_a_linear_of_int8() -> None:
    given = inputs()
    given[0], scale = numerics.quantize(given[0], numerics.format_of((ALL, ALL), torch.int8))
    given[4] = scale
    attrs = "out_dtype = bf16, w_format = #int8_row, x_format = #int8_tensor"
    (y,) = check(f"%y = quant.linear(%x, %s, %w, %t) {{{attrs}}}", given, "bf16[s0, 6, 8]", "i8")
    want = numerics.scaled_linear(
        given[0],
        scale,
        given[2],
        given[3],
        x_format=numerics.format_of((ALL, ALL), given[0].dtype),
        w_format=numerics.format_of((1, ALL), given[2].dtype),
    )
    assert torch.equal(y, want)
    assert torch.equal(want, ((given[0].double() @ given[2].double().T) * (given[3].double().T * scale)).bfloat16())


@pytest.mark.parametrize(
    ("line", "types", "sentence"),
    [
        ("%q, %d = quant.quantize(%x, %w) {A}", "i8[s0, 6, 40], f32[1, 1]",
         "the prescale is i8[8, 40], but f32[s0, 6, 40] needs one number for each channel"),
        ("%q, %d = quant.quantize(%x, %t) {A}", "i8[s0, 6, 40], f32[1, 1]",
         "the prescale is f32[8, 1], but f32[s0, 6, 40] needs one number for each channel"),
        ("%q, %d = quant.quantize(%w) {A}", "i8[8, 40], f32[1, 1]",
         "only a floating-point tensor with at least 1 dimension can be quantized, not i8[8, 40]"),
        ("%q = quant.quantize_static(%x, %t) {A}", "i8[s0, 6, 40]",
         "the scale is f32[8, 1], but format #int8_tensor over f32[s0, 6, 40] needs f32[1, 1]"),
        ("%q = quant.quantize_static(%x) {A}", "i8[s0, 6, 40]",
         "quant.quantize_static takes 2 to 3 arguments (x, scale, prescale?), but got 1"),
        ("%q = quant.quantize_static(%x, %s, %s) {A}", "i8[s0, 6, 40]",
         "the prescale is f32[1, 1], but f32[s0, 6, 40] needs one number for each channel"),
        ("%q = kernel.quantize_static(%x, %s) {A}", "i8[s0, 6, 40], f32[1, 1]", "the type rule requires i8[s0, 6, 40]"),
        ("%q, %d = kernel.quantize(%x) {format = #mxfp4}", "f4e2m1fn[s0, 6, 40], f8e8m0fnu[s0, 6, 2]",
         "attribute 'format' is #mxfp4, but kernel.quantize expects a format of 8-bit codes and FP32 scales"),
        ("%d = quant.dequantize(%w, %s) {format = #fp8_row, out_dtype = f32}", "f32[8, 40]",
         "the codes are i8[8, 40], but format #fp8_row needs f8e4m3fn"),
        ("%d = quant.dequantize(%w, %t, %s) {format = #int8_row, out_dtype = f32}", "f32[8, 40]",
         "the tensor scale is f32[1, 1], but format #int8_row over i8[8, 40] needs none"),
        ("%d = quant.dequantize(%w, %s) {format = #int8_row, out_dtype = f32}", "f32[8, 40]",
         "the scale is f32[1, 1], but format #int8_row over i8[8, 40] needs f32[8, 1]"),
    ],
)  # fmt: skip
def test_broken_operations(line: str, types: str, sentence: str) -> None:
    text = line.replace("{A}", "{format = #int8_tensor}")
    names = line.partition(" = ")[0]
    if types.count("[") > names.count("%"):
        names += ", %more"
        text = text.replace(" = ", ", %more = ", 1)
    graph = Graph.parse(OPERANDS.format(x="f32", f="f32", type=types, line=f"{text} : {types}", names=names))
    with pytest.raises(QCompilerError) as error:
        graph.verify()
    assert sentence in str(error.value).splitlines()[0]
