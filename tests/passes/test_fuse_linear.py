"""fuse-linear: fuses three operations and a cast into one with equal bits, unless the parts have other users."""

import pytest
import torch

from passes.quantizing.fp8_tile import Fp8Tile
from passes.quantizing.fuse_linear import FuseLinear
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.testing import random_inputs

W_AND_B = """  %w = core.param() {{name = "w"}} : {d}[70, 130]
  %b = core.param() {{name = "b"}} : {d}[70]
"""
QDQ = """  %x_q, %x_s = quant.quantize(%x) {format = #fp8_tile} : f8e4m3fn[3, 130], f32[3, 2]
  %w_q, %w_s = quant.quantize(%w) {format = #fp8_block} : f8e4m3fn[70, 130], f32[1, 2]
  %x_dq = quant.dequantize(%x_q, %x_s) {format = #fp8_tile, out_dtype = f32} : f32[3, 130]
  %w_dq = quant.dequantize(%w_q, %w_s) {format = #fp8_block, out_dtype = f32} : f32[70, 130]
"""


def graph_of(rest: str, outputs: str, dtype: str = "f32") -> Graph:
    return Graph.parse(f"func @m(%x: f32[3, 130]) -> ({outputs}) {{\n{W_AND_B.format(d=dtype)}{QDQ}{rest}\n}}")


def check_equal_bits(graph: Graph) -> None:
    inputs, weights = random_inputs(graph, 5)
    before = interpret(graph, inputs, weights)
    assert FuseLinear().run(graph)
    graph.verify()
    assert all(map(torch.equal, interpret(graph, inputs, weights), before))
    assert not FuseLinear().run(graph)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_output_of_fp8_tile_is_fused_completely(dtype: str) -> None:
    graph = Graph.parse(
        f"func @m(%x: {dtype}[3, 130]) -> ({dtype}[3, 70]) {{\n{W_AND_B.format(d=dtype)}"
        f'  %y = aten.linear(%x, %w, %b) : {dtype}[3, 70] loc("m.py":4 in "fc")\n  return %y\n}}'
    )
    Fp8Tile().run(graph)
    check_equal_bits(graph)
    assert [op.name for op in graph.ops()] == ["core.param"] * 2 + ["quant.quantize"] * 2 + ["quant.linear"]
    assert graph["y"].op["bias"] is graph["b"]
    assert str(graph["y"].op.loc) == 'loc("m.py":4 in "fc" by "fuse-linear")'


def test_several_following_casts_stay_outside() -> None:
    graph = graph_of(
        "  %y = aten.linear(%x_dq, %w_dq) : f32[3, 70]\n  %a = aten._to_copy(%y) {dtype = bf16} : bf16[3, 70]\n"
        "  %c = aten._to_copy(%y) {dtype = f16} : f16[3, 70]\n  return %a, %c",
        "bf16[3, 70], f16[3, 70]",
    )
    check_equal_bits(graph)
    assert str(graph["y"].type) == "f32[3, 70]"


def test_a_result_that_is_also_returned_keeps_its_type() -> None:
    graph = graph_of(
        "  %y = aten.linear(%x_dq, %w_dq) : f32[3, 70]\n  %a = aten._to_copy(%y) {dtype = bf16} : bf16[3, 70]\n"
        "  return %y, %a",
        "f32[3, 70], bf16[3, 70]",
    )
    check_equal_bits(graph)


@pytest.mark.parametrize(
    "cast", ["{dtype = f64} : f64[3, 70]", "{dtype = f8e4m3fn} : f8e4m3fn[3, 70]", "{dtype = i32} : i32[3, 70]"]
)
def test_a_cast_that_does_more_than_round_to_half_precision_stays(cast: str) -> None:
    kind = cast.rpartition(": ")[2]
    graph = graph_of(
        f"  %y = aten.linear(%x_dq, %w_dq) : f32[3, 70]\n  %a = aten._to_copy(%y) {cast}\n  return %a", kind
    )
    check_equal_bits(graph)
    assert graph["a"].op.name == "aten._to_copy"


def test_values_with_other_users_stay() -> None:
    graph = graph_of(
        "  %y = aten.linear(%x_dq, %w_dq, %b) : f32[3, 70]\n  return %y, %w_dq", "f32[3, 70], f32[70, 130]"
    )
    check_equal_bits(graph)
    assert [op.name for op in graph.ops("quant.dequantize")] == ["quant.dequantize"]


def test_a_deliberately_rounded_bias_stays_rounded() -> None:
    graph = graph_of(
        "  %b_half = aten._to_copy(%b) {dtype = bf16} : bf16[70]\n  "
        "%b_f32 = aten._to_copy(%b_half) {dtype = f32} : f32[70]\n"
        "  %y = aten.linear(%x_dq, %w_dq, %b_f32) : f32[3, 70]\n  return %y",
        "f32[3, 70]",
    )
    check_equal_bits(graph)
    assert graph["y"].op["bias"] is graph["b_half"]


@pytest.mark.parametrize(
    ("line", "reasons"),
    [
        ("aten.linear(%x_dq, %w)", {"y": "one of its operands is not quantized (%w)"}),
        ("aten.linear(%x, %w)", {}),
        ("aten.linear(%x_dq, %w_dq, %x_s)", {"y": "its bias is not one number per column (%x_s)"}),
    ],
)
def test_refusals(line: str, reasons: dict[str, str]) -> None:
    graph = graph_of(f"  %y = {line} : f32[3, 70]\n  return %y", "f32[3, 70]")
    assert not FuseLinear().run(graph)
    assert FuseLinear().explain(graph) == reasons


def test_a_matmul_in_half_precision_is_a_different_operation() -> None:
    graph = graph_of("  %y = aten.linear(%x_dq, %w_dq) : f32[3, 70]\n  return %y", "f32[3, 70]")
    text = str(graph).replace("out_dtype = f32} : f32", "out_dtype = bf16} : bf16").replace("f32[3, 70]", "bf16[3, 70]")
    graph = Graph.parse(text)
    assert not FuseLinear().run(graph)
    assert FuseLinear().explain(graph) == {"y": "it multiplies in bf16, not in f32 (%x_dq)"}
