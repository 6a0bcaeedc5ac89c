"""Sums of quantized terms: type rules, the order of additions, one rounding."""

import pytest
import torch

from qcompiler.dialects.terms import fused_sum_quantize, sum_terms
from qcompiler.errors import VerifyError
from qcompiler.ir import Format, Graph
from qcompiler.ir.formats import FP8_TILE, INT8_ROW
from qcompiler.numerics import quantize

TERMS = "%t: f8e4m3fn[3, s0, 256], %s: f32[3, s0, 2]"
SUM = "quant.sum_terms(%t, %s) {format = #fp8_tile, out_dtype = bf16}"
EXPRESSION = 'kernel.fused_sum_quantize(%t, %s, {more}) {{expression = "{text}", format = #fp8_tile, keep = []'


def graph(inputs: str, op: str, results: str) -> Graph:
    names = ", ".join(f"%r{place}" for place in range(results.count("[")))
    return Graph.parse(
        f"func @m({inputs}) -> ({results}) where s0 in 1.. {{\n  {names} = {op} : {results}\n  return {names}\n}}"
    )


def fused(text: str, more: str = "%x") -> str:
    return EXPRESSION.format(text=text, more=more) + ", term_format = #fp8_tile}"


CODES = "f8e4m3fn[s0, 256], f32[s0, 2]"


@pytest.mark.parametrize(
    ("inputs", "op", "results"),
    [
        (TERMS, SUM, "bf16[s0, 256]"),
        ("%t: i8[1, 7], %s: f32[1, 1]", SUM.replace("fp8_tile", "int8_row"), "bf16[7]"),
        (TERMS + ", %x: bf16[s0, 256], %w: f32[256]", fused("x1 * (x0 + y0)", "%x, %w"), CODES),
    ],
)
def test_types(inputs: str, op: str, results: str) -> None:
    graph(inputs, op, results).verify()


@pytest.mark.parametrize(
    ("inputs", "op", "results", "message"),
    [
        ("%t: f8e4m3fn[256], %s: f32[2]", SUM, "bf16[256]", "1 to 16 terms along the first of 2 axes"),
        ("%t: f8e4m3fn[s0, 256], %s: f32[s0, 2]", SUM, "bf16[256]", "1 to 16 terms along the first of 2 axes"),
        ("%t: f8e4m3fn[17, 256], %s: f32[17, 2]", SUM, "bf16[256]", "1 to 16 terms along the first of 2 axes"),
        ("%t: f8e4m3fn[3, s0, 256], %s: f32[3, s0, 1]", SUM, "bf16[s0, 256]", "the scale is f32"),
        (TERMS, SUM, "bf16[3, s0, 256]", r"rule requires bf16\[s0, 256\]"),
        (TERMS + ", %x: bf16[s0, 256]", fused("x0 + y1"), CODES, "must read y0, and besides only its operands"),
        (TERMS + ", %x: bf16[s0, 256]", fused("x0"), CODES, "must read y0, and besides only its operands"),
        (TERMS + ", %x: bf16[3, s0, 256]", fused("x0 + y0"), CODES, r"operand x0 is bf16\[3, s0, 256\]"),
        (TERMS + ", %x: bf16[s0, 256]", fused("y0"), CODES, "its expression reads no operands, but it has 1"),
    ],
)
def test_wrong_types(inputs: str, op: str, results: str, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        graph(inputs, op, results).verify()


def test_terms_are_added_in_order_in_fp32_and_rounded_once() -> None:
    codes = torch.tensor([[[64.0]], [[64.0]], [[1.0]], [[1.0]]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[[2.0**20]], [[-(2.0**20)]], [[0.5]], [[2.0**-10]]])
    exact = sum_terms(codes, scale, format=FP8_TILE, out_dtype=torch.float32)
    assert exact.item() == 0.5 + 2.0**-10  # in another order, the small terms would be lost
    assert sum_terms(codes, scale, format=FP8_TILE, out_dtype=torch.bfloat16).item() == 0.5
    alike = torch.tensor([1.0, 2.0**-8, 2.0**-8, 2.0**-8]).view(4, 1, 1)
    ones = torch.ones(4, 1, 1).to(torch.float8_e4m3fn)
    once = sum_terms(ones, alike, format=FP8_TILE, out_dtype=torch.bfloat16)
    assert once.item() == 1.0 + 2.0**-6  # each addition in bfloat16 would return 1.0


@pytest.mark.parametrize("format", [FP8_TILE, INT8_ROW])
def test_the_fused_operation_adds_then_computes(format: Format) -> None:
    torch.manual_seed(0)
    codes, scale = quantize(torch.randn(3, 5, 300), format)
    x, gain = torch.randn(5, 300).bfloat16(), torch.randn(300)
    text = "h = bf16(x0 + bf16(y0)); x1 * h * rsqrt(mean(h * h) + 1e-06)"
    q, s, h = fused_sum_quantize(
        codes, scale, x, gain, expression=text, keep=["h"], term_format=format, format=FP8_TILE
    )
    total = sum_terms(codes, scale, format=format, out_dtype=torch.bfloat16)
    assert torch.equal(h, x + total)
    wide = h.float()
    want_q, want_s = quantize(gain * wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6), FP8_TILE)
    assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8)) and torch.equal(s, want_s)
