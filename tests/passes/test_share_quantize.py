"""share-quantize: one quantize per value, with equal bits, and never two outputs in one tensor."""

import torch

from passes.quantizing.fp8_tile import Fp8Tile
from passes.quantizing.share_quantize import ShareQuantize
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.testing import random_inputs

Q = "{format = #fp8_tile} : f8e4m3fn[4, 128], f32[4, 1]"

TWO = """
func @m(%x: f32[4, 128]) -> (f32[4, 64], f32[4, 64]) {
  %w = core.param() {name = "w"} : f32[128, 64]
  %v = core.param() {name = "v"} : f32[64, 128]
  %a = aten.mm(%x, %w) : f32[4, 64]
  %b = aten.linear(%x, %v) : f32[4, 64]
  %c = aten.mm(%x, %w) : f32[4, 64] loc("m.py":9)
  %d = aten.add.Tensor(%a, %c) : f32[4, 64]
  return %b, %d
}
"""


def test_one_quantize_per_value_even_if_each_user_transposes_the_weight() -> None:
    graph = Graph.parse(TWO)
    for step in Pipeline.parse("canonicalize; fp8-tile"):
        step.run(graph)
    inputs, weights = random_inputs(graph, 0)
    before = interpret(graph, inputs, weights)
    assert len(graph.ops("quant.quantize")) == 6
    assert ShareQuantize().run(graph)
    graph.verify()
    assert len(graph.ops("quant.quantize")) == len(graph.ops("quant.dequantize")) == 3
    assert len(graph.ops("aten.t")) == 1
    assert all(map(torch.equal, interpret(graph, inputs, weights), before))
    assert not ShareQuantize().run(graph)
    assert ShareQuantize().explain(graph) == {}


def test_quantizations_with_different_attributes_are_not_shared() -> None:
    graph = Graph.parse(
        f"func @m(%x: f32[4, 128]) -> (f32[4, 1], f32[4, 1]) {{\n  %a, %s = quant.quantize(%x) {Q}\n"
        f"  %b, %t = quant.quantize(%x) {Q.replace('deepseek', 'vllm')}\n  return %s, %t\n}}"
    )
    assert not ShareQuantize().run(graph)


def test_two_outputs_stay_two_tensors() -> None:
    graph = Graph.parse(
        f"func @m(%x: f32[4, 128]) -> (f32[4, 1], f32[1, 4]) {{\n  %a, %s = quant.quantize(%x) {Q}\n"
        f"  %b, %t = quant.quantize(%x) {Q}\n  %v = aten.t(%t) : f32[1, 4]\n  return %s, %v\n}}"
    )
    assert not ShareQuantize().run(graph)


def test_activations_are_not_shared_before_they_are_quantized() -> None:
    graph = Graph.parse(
        "func @m(%x: f32[4, 4]) -> (f32[4, 4]) {\n  %a = aten.t(%x) : f32[4, 4]\n  %b = aten.t(%x) : f32[4, 4]\n"
        "  %c = aten.mm(%a, %b) : f32[4, 4]\n  return %c\n}"
    )
    assert not ShareQuantize().run(graph)


def test_the_second_fp8_tile_finds_nothing_to_do() -> None:
    graph = Graph.parse(TWO)
    for step in Pipeline.parse("canonicalize; fp8-tile; share-quantize"):
        step.run(graph)
    text = str(graph)
    assert not Fp8Tile().run(graph)
    assert str(graph) == text


STATIC = """
func @m(%x: f32[4, 128], %s: f32[1, 1], %t: f32[1, 1]) -> (f32[4, 128], f32[4, 128], f32[4, 128], f32[4, 128]) {
  %f = core.param() {name = "f"} : f32[128]
  %a = quant.quantize_static(%x, %s) {A}
  %b = quant.quantize_static(%x, %s) {A}
  %c = quant.quantize_static(%x, %t) {A}
  %d = quant.quantize_static(%x, %s, %f) {A}
  %a_dq = quant.dequantize(%a, %s) {format = #int8_tensor, out_dtype = f32} : f32[4, 128]
  %b_dq = quant.dequantize(%b, %s) {format = #int8_tensor, out_dtype = f32} : f32[4, 128]
  %c_dq = quant.dequantize(%c, %t) {format = #int8_tensor, out_dtype = f32} : f32[4, 128]
  %d_dq = quant.dequantize(%d, %s) {format = #int8_tensor, out_dtype = f32} : f32[4, 128]
  %b_neg = aten.neg(%b_dq) : f32[4, 128]
  return %a_dq, %b_neg, %c_dq, %d_dq
}
""".replace("{A}", '{format = #int8_tensor<profile = "vllm">} : i8[4, 128]')


def test_static_quantizations_are_shared_if_scale_and_prescale_are_equal() -> None:
    graph = Graph.parse(STATIC)
    graph.verify()
    inputs, weights = random_inputs(graph, 0)
    before = interpret(graph, inputs, weights)
    assert ShareQuantize().run(graph)
    graph.verify()
    assert [op.result.name for op in graph.ops("quant.quantize_static")] == ["a", "c", "d"]
    assert [op.result.name for op in graph.ops("quant.dequantize")] == ["a_dq", "c_dq", "d_dq"]
    assert all(map(torch.equal, interpret(graph, inputs, weights), before)) and not ShareQuantize().run(graph)


def test_equal_quantizations_of_two_passes_are_shared_in_either_order() -> None:
    for first in ("a", "b"):
        graph = Graph.parse(
            "func @m(%x: f32[4, 16]) -> (f32[4, 32], f32[4, 32]) {\n"
            '  %a = core.param() {name = "a"} : f32[32, 16]\n  %b = core.param() {name = "b"} : f32[32, 16]\n'
            "  %y = aten.linear(%x, %a) : f32[4, 32]\n  %z = aten.linear(%x, %b) : f32[4, 32]\n  return %y, %z\n}"
        )
        for step in Pipeline.parse(f'quantize{{layers=["{first}"]}}; quantize{{w_format=#fp8_tensor}}; share-quantize'):
            assert step.run(graph)
            graph.verify()
        assert len(graph.ops("quant.quantize")) == 3 and len(graph.ops("quant.dequantize")) == 3
