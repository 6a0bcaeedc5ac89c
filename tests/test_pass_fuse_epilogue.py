"""fuse-epilogue: the arithmetic behind a product, and its quantization, become part of the product's operation."""

from dataclasses import replace

import pytest
import torch

from passes.fusing.fuse_activation_quantize import FuseActivationQuantize
from passes.fusing.fuse_epilogue import FuseEpilogue
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Op
from qcompiler.ir.formats import FP8_TILE
from qcompiler.numerics import format_of, quantize
from qcompiler.pass_manager.instruments import CheckChanged, Validate
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.testing import random_inputs, verified

STEPS = Pipeline((FuseActivationQuantize(), FuseEpilogue()))
ATTRS = 'w_format = #fp8_block, x_format = #fp8_tile<scale_layout = "col_major">}'
Q = '{format = #fp8_tile<scale_layout = "col_major">}'
NARROW = "{format = #format<f8e4m3fn, block = [1, 64]>}"
HALF, WHOLE = "bf16[5, 256]", "bf16[5, 512]"
KINDS = {"%y_q": "f8e4m3fn[5, 256]", "%y_s": "f32[5, 2]", "%p": HALF, "%m": WHOLE}
HEAD = f"""
  %w_q = core.param() {{name = "w_q"}} : f8e4m3fn[512, 128]
  %w_s = core.param() {{name = "w_s"}} : f32[4, 1]
  %v_q = core.param() {{name = "v_q"}} : f8e4m3fn[256, 128]
  %v_s = core.param() {{name = "v_s"}} : f32[2, 1]
  %bias = core.param() {{name = "bias"}} : bf16[256]
  %gain = core.param() {{name = "gain"}} : f32[256]
  %state = core.buffer() {{name = "state"}} : {HALF}"""
PRODUCT = f"%p = kernel.scaled_linear(%x_q, %x_s, %v_q, %v_s, %bias) {{out_dtype = bf16, {ATTRS} : {HALF}"
OTHER = f"%o = kernel.scaled_linear(%x_q, %x_s, %v_q, %v_s) {{out_dtype = bf16, {ATTRS} : {HALF}"
MERGED = f"%m = kernel.scaled_linear(%x_q, %x_s, %w_q, %w_s) {{out_dtype = bf16, {ATTRS} : {WHOLE}"
LEFT = f"%a = aten.slice.Tensor(%m, -1, 0, 256) : {HALF}"
RIGHT = f"%b = aten.slice.Tensor(%m, 1, 256, 9223372036854775807) : {HALF}"
QUANTIZED = f"%y_q, %y_s = kernel.quantize(%y) {Q} : f8e4m3fn[5, 256], f32[5, 2]"


def model(*lines: str, returned: str = "%y") -> Graph:
    """A graph of some lines over an FP8 activation and two BF16 tensors."""
    kinds = ", ".join(KINDS.get(name, HALF) for name in returned.split(", "))
    body = "\n  ".join(lines)
    return verified(
        Graph.parse(
            f"func @m(%x_q: f8e4m3fn[5, 128], %x_s: f32[5, 1], %r: {HALF}, %t: {HALF}, %u: {HALF}) -> ({kinds}) {{"
            f"{HEAD}\n  {body}\n  return {returned}\n}}"
        )
    )


def with_numbers(graph: Graph) -> list[torch.Tensor]:
    """Inputs; codes and scales are those of random tensors."""
    inputs, weights = random_inputs(graph, 3)
    inputs[0], inputs[1] = quantize(inputs[0].float(), format_of((1, 128), torch.float8_e4m3fn))
    for name in ("w", "v"):
        weights[f"{name}_q"], weights[f"{name}_s"] = quantize(
            weights[f"{name}_q"].float(), format_of((128, 128), torch.float8_e4m3fn)
        )
    graph.weights = weights
    return inputs


def fused(graph: Graph) -> list[Op]:
    """What a graph gets, whose numbers must stay the same to the bit, and which must change once only."""
    inputs = with_numbers(graph)
    before = interpret(graph, inputs)
    run_pipeline(STEPS, graph, instruments=[Validate(), CheckChanged()], inputs=inputs)
    verified(graph)
    for got, want in zip(interpret(graph, inputs), before, strict=True):
        assert got.dtype is want.dtype and torch.equal(got.float(), want.float())
    text = str(graph)
    run_pipeline(STEPS, graph)
    assert str(graph) == text
    return graph.ops("kernel.fused_linear")


def shown(op: Op) -> str:
    """The operands behind those of the product, and the body."""
    return f"{', '.join(map(str, op.args[4:])) or '-'} | {op.attrs['body']}"


@pytest.mark.parametrize(
    ("lines", "result"),
    [
        ([PRODUCT, f"%y = aten.gelu(%p) : {HALF}"], "%bias | bf16(gelu(bf16(y0)))"),
        ([OTHER, f"%y = aten.add.Tensor(%r, %o) : {HALF}"], "None, %r | bf16(x0 + bf16(y0))"),
        (
            [PRODUCT, "%h = aten.mul.Tensor(%p, %gain) : f32[5, 256]",
             f"%c = aten._to_copy(%h) {{dtype = bf16}} : {HALF}", f"%y = aten.add.Tensor(%r, %c) : {HALF}"],
            "%bias, %r, %gain | bf16(x0 + bf16(bf16(y0) * x1))",
        ),
        (  # read several times, but nowhere else
            [PRODUCT, f"%h = aten.tanh(%p) : {HALF}", f"%y = aten.mul.Tensor(%h, %p) : {HALF}"],
            "%bias | t0 = bf16(y0); bf16(bf16(tanh(t0)) * t0)",
        ),
        (  # as far as nobody else reads it, and what stands beside comes along
            [PRODUCT, f"%h = aten.relu(%p) : {HALF}", f"%s = aten.silu(%r) : {HALF}",
             f"%y = aten.add.Tensor(%h, %s) : {HALF}", f"%z = aten.neg(%y) : {HALF}"],
            "%bias, %r | bf16(bf16(relu(bf16(y0))) + bf16(silu(x0)))",
        ),
        (
            [MERGED, LEFT, RIGHT, f"%s = aten.silu(%a) : {HALF}", f"%y = aten.mul.Tensor(%s, %b) : {HALF}"],
            "- | bf16(bf16(silu(bf16(y0))) * bf16(y1))",
        ),
        (
            [MERGED, f"%a, %b = aten.split_with_sizes(%m, [256, 256], -1) : {HALF}, {HALF}",
             f"%s = aten.gelu(%b) : {HALF}", f"%h = aten.mul.Tensor(%a, %s) : {HALF}",
             f"%y = aten.add.Tensor(%h, %r) : {HALF}"],
            "None, %r | bf16(bf16(bf16(y0) * bf16(gelu(bf16(y1)))) + x0)",
        ),
    ],
)  # fmt: skip
def test_arithmetic(lines: list[str], result: str) -> None:
    returned = "%y, %z" if "%z" in lines[-1] else "%y"
    (op,) = fused(model(*lines, returned=returned))
    assert shown(op) == result and len(op.results) == 1 and "block" not in op.attrs
    assert op.attrs["parts"] == (2 if "y1" in result else 1) and op.result.name == "y"


@pytest.mark.parametrize(
    ("lines", "result"),
    [
        ([PRODUCT, f"%y = aten.relu(%p) : {HALF}"], "%bias | bf16(relu(bf16(y0)))"),
        (
            [MERGED, LEFT, RIGHT, f"%s = aten.silu(%a) : {HALF}", f"%y = aten.mul.Tensor(%s, %b) : {HALF}"],
            "- | bf16(bf16(silu(bf16(y0))) * bf16(y1))",
        ),
        (  # the second half may be the one with the activation
            [MERGED, RIGHT, LEFT, f"%s = aten.silu(%b) : {HALF}", f"%y = aten.mul.Tensor(%s, %a) : {HALF}"],
            "- | bf16(bf16(silu(bf16(y1))) * bf16(y0))",
        ),
        (  # of two products, one takes the other as an operand
            [PRODUCT, OTHER, f"%s = aten.silu(%p) : {HALF}", f"%y = aten.mul.Tensor(%s, %o) : {HALF}"],
            "%bias, %o | bf16(bf16(silu(bf16(y0))) * x0)",
        ),
        (
            [PRODUCT, f"%s = aten.sigmoid(%p) : {HALF}", f"%y = aten.mul.Tensor(%s, %p) : {HALF}"],
            "%bias | p0 = bf16(y0); bf16(bf16(sigmoid(p0)) * p0)",
        ),
    ],
)  # fmt: skip
def test_arithmetic_and_quantization(lines: list[str], result: str) -> None:
    (op,) = fused(model(*lines, QUANTIZED, returned="%y_q, %y_s"))
    assert shown(op) == result
    assert op.format() == replace(FP8_TILE, scale_layout="col_major")
    assert [value.name for value in op.results] == ["y_q", "y_s"]


def test_a_product_that_is_quantized_as_it_is() -> None:
    (op,) = fused(model(PRODUCT, QUANTIZED.replace("(%y)", "(%p)"), returned="%y_q"))
    assert shown(op) == "%bias | bf16(y0)"
    (op,) = fused(model(OTHER, QUANTIZED.replace("(%y)", "(%o, %gain)"), returned="%y_q"))
    assert shown(op) == "None, %gain | bf16(y0) * x0"


def test_it_stands_where_all_of_its_operands_are_known() -> None:
    graph = model(PRODUCT, f"%s, %i = aten.sort(%r) : {HALF}, i64[5, 256]", f"%y = aten.add.Tensor(%p, %s) : {HALF}")
    (op,) = fused(graph)
    assert [op.name for op in graph.ops() if not op.name.startswith("core.")] == ["aten.sort", "kernel.fused_linear"]
    assert shown(op) == "%bias, %s | bf16(bf16(y0) + x0)"


Y = f"%y = aten.relu(%p) : {HALF}"
SUMS = [
    f"%a1 = aten.add.Tensor(%p, %r) : {HALF}",
    f"%a2 = aten.mul.Tensor(%a1, %t) : {HALF}",
    f"%y = aten.add.Tensor(%a2, %u) : {HALF}",
]


@pytest.mark.parametrize(
    ("lines", "returned", "why"),
    [
        ([PRODUCT, Y], "%y, %p", "it leaves the graph (%p)"),
        ([PRODUCT, Y, "core.update(%state, %p)"], "%y", "it is written to a buffer (%p)"),
        ([PRODUCT, Y, f"%z, %i = aten.sort(%p) : {HALF}, i64[5, 256]"], "%y, %z", "it is also read by aten.sort (%p)"),
        ([PRODUCT, Y, f"%z = aten.neg(%p) : {HALF}"], "%y, %z", "it is also read by aten.neg (%p)"),
        ([PRODUCT, f"%y = aten.cumsum(%p, 1) : {HALF}"], "%y",
         "what reads it cannot be fused with it: aten.cumsum (%p)"),
        ([PRODUCT, f"%y = aten.layer_norm(%p, [256]) : {HALF}"], "%y", "a reduction over the row computes it (%y)"),
        ([PRODUCT, Y, QUANTIZED], "%y, %y_q", "the arithmetic behind it has a second result (%y)"),
        ([PRODUCT, Y, QUANTIZED.replace(Q, NARROW).replace("[5, 2]", "[5, 4]")], "%y_q",
         "it is not quantized to #fp8_tile again (%y_q)"),
        ([PRODUCT, *SUMS, QUANTIZED], "%y_q", "its body would read 3 other tensors, of 2 at most (%y_q)"),
        ([PRODUCT.replace("#fp8_tile<", "#fp8_row<"), Y], "%y",
         "only products of #fp8_tile and #fp8_block take a body"),
        ([MERGED, LEFT, f"%y = aten.neg(%a) : {HALF}"], "%y", "it is cut otherwise than in two halves (%m)"),
        ([MERGED, LEFT, RIGHT, f"%y = aten.mul.Tensor(%a, %b) : {HALF}"], "%y, %m", "it is read as a whole, too (%m)"),
        ([MERGED, LEFT, RIGHT, f"%y = aten.neg(%a) : {HALF}", f"%z = aten.neg(%b) : {HALF}"], "%y, %z",
         "it is also read by aten.neg (%a)"),
    ],
)  # fmt: skip
def test_what_is_left_alone(lines: list[str], returned: str, why: str) -> None:
    graph = model(*lines, returned=returned)
    FuseActivationQuantize().run(graph)
    assert [*FuseEpilogue().explain(graph).values()] == [why]
    assert not FuseEpilogue().run(graph)


def test_a_long_chain_goes_in_as_far_as_its_operands_allow() -> None:
    graph = model(PRODUCT, *SUMS)
    (op,) = fused(graph)
    assert shown(op) == "%bias, %r, %t | bf16(bf16(bf16(y0) + x0) * x1)" and op.result.name == "a2"


def test_halves_are_multiples_of_a_tile() -> None:
    text = str(model(MERGED, LEFT, RIGHT, f"%s = aten.silu(%a) : {HALF}", f"%y = aten.mul.Tensor(%s, %b) : {HALF}"))
    graph = Graph.parse(text.replace("512", "384").replace("256", "192").replace("f32[4, 1]", "f32[3, 1]"))
    assert FuseEpilogue().explain(graph) == {"m": "its halves have 192 columns, which is no multiple of 128 (%m)"}
