"""to-kernels: activations and matmuls move to the kernel dialect, with a scale layout that both sides know."""

import pytest
import torch

from passes.lowering.to_kernels import ToKernels
from qcompiler.errors import PassError
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pass, Pipeline
from qcompiler.testing import random_inputs

TEXT = """
func @m(%x: f32[3, 128], %v: f32[64, 128]) -> (f32[3, 64]) {
  %w = core.param() {name = "w"} : f32[64, 128]
  %y = aten.linear(%x, %w) : f32[3, 64] loc("m.py":2)
  return %y
}
"""


@pytest.mark.parametrize("layout", ["row_major", "col_major"])
@pytest.mark.parametrize("fold", ["", "fold-constants; "])
def test_equal_bits_and_one_layout(layout: str, fold: str) -> None:
    graph = Graph.parse(TEXT)
    inputs, graph.weights = random_inputs(graph, 0)
    for step in Pipeline.parse(f"fp8-tile; fuse-linear; {fold}"):
        step.run(graph)
    before = interpret(graph, inputs)
    step = Pass.parse(f"to-kernels{{scale_layout={layout}}}")
    assert step.run(graph)
    graph.verify()
    assert all(map(torch.equal, interpret(graph, inputs), before))
    assert graph["x_q"].op.format().scale_layout == graph["y"].op.format("x_format").scale_layout == layout
    # Scales of a weight always have the layout that numerics writes.
    assert len(graph.ops("quant.quantize")) == (0 if fold else 1)
    assert str(graph["y"].op.loc) == 'loc("m.py":2 by "to-kernels")'
    assert not step.run(graph)


def test_blocks_of_several_rows_are_row_major() -> None:
    graph = Graph.parse(TEXT)
    for step in Pipeline.parse("fp8-tile{x_format=#fp8_block}; fuse-linear; fold-constants; to-kernels"):
        step.run(graph)
    graph.verify()
    assert graph["x_q"].op.format().scale_layout == graph["y"].op.format("x_format").scale_layout == "row_major"


def test_scales_with_other_users_stay_in_the_quant_dialect() -> None:
    graph = Graph.parse(TEXT)
    for step in Pipeline.parse("fp8-tile; fuse-linear; fold-constants"):
        step.run(graph)
    graph.set_outputs((graph["y"], graph["x_s"]))
    ToKernels().run(graph)
    graph.verify()
    assert graph["x_q"].op.name == "quant.quantize"
    assert graph["y"].op.format("x_format").scale_layout == "row_major"
    assert ToKernels().explain(graph) == {
        "x_q": "its scales are also read by core.return, which supports one layout only (%x_s)"
    }


def test_a_weight_that_is_quantized_in_each_call() -> None:
    graph = Graph.parse(TEXT)
    for step in Pipeline.parse("fp8-tile; fuse-linear"):
        step.run(graph)
    ToKernels().run(graph)
    reason = "its scales are read as weight scales, which have one layout only (%w_s)"
    assert ToKernels().explain(graph) == {"w_q": reason}


def test_an_unknown_layout() -> None:
    with pytest.raises(PassError, match=r"got diagonal; need one of row_major, col_major\n"):
        Pass.parse("to-kernels{scale_layout=diagonal}")


SIMULATED = "its scales vary along K, the reduction dimension, where tensor cores cannot apply them"


@pytest.mark.parametrize(
    ("x_block", "layout"),
    [("[1, 128]", "col_major"), ("[1, 32]", "col_major"), ("[1, -1]", "row_major"), ("[-1, -1]", "row_major"),
     ("[4, -1]", "row_major"), ("[-1, 64]", "row_major"), ("[2, 64]", "row_major")],
)  # fmt: skip
def test_only_row_tiles_have_a_layout(x_block: str, layout: str) -> None:
    graph = Graph.parse(TEXT)
    inputs, graph.weights = random_inputs(graph, 0)
    for step in Pipeline.parse(
        f"quantize{{x_format=#format<f8e4m3fn, block = {x_block}>}}; fuse-linear; fold-constants"
    ):
        step.run(graph)
    before = interpret(graph, inputs)
    assert ToKernels().run(graph)
    graph.verify()
    assert graph["x_q"].op.format().scale_layout == graph["y"].op.format("x_format").scale_layout == layout
    assert all(map(torch.equal, interpret(graph, inputs), before)) and not ToKernels().run(graph)


STATIC = """
func @m(%x: f32[3, 128], %s: f32{scale}) -> (f32[3, 64]) {{
  %f = core.param() {{name = "f"}} : f32[128]
  %w = core.param() {{name = "w"}} : i8[64, 128]
  %t = core.param() {{name = "t"}} : f32[64, 1]
  %q = quant.quantize_static(%x, %s, %f) {{format = #format<i8, block = {block}, profile = "vllm">}} : i8[3, 128]
  %y = quant.linear(%q, %s, %w, %t)
    {{out_dtype = f32, w_format = #int8_row, x_format = #format<i8, block = {block}>}} : f32[3, 64]
  return %y
}}
"""


@pytest.mark.parametrize(("block", "scale"), [("[-1, -1]", "[1, 1]"), ("[1, -1]", "[3, 1]")])
def test_a_static_quantization_keeps_its_scale_and_prescale(block: str, scale: str) -> None:
    graph = Graph.parse(STATIC.format(block=block, scale=scale))
    graph.verify()
    inputs, graph.weights = random_inputs(graph, 0)
    graph.weights["w"] = torch.randint(-127, 128, (64, 128), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    before, attrs = interpret(graph, inputs), dict(graph["q"].op.attrs)
    assert ToKernels().run(graph)
    graph.verify()
    quantize, linear = graph["q"].op, graph["y"].op
    assert (quantize.name, linear.name) == ("kernel.quantize_static", "kernel.scaled_linear")
    assert quantize.args == (graph["x"], graph["s"], graph["f"]) and quantize.attrs == attrs
    assert linear.format("x_format").scale_layout == "row_major"
    assert all(map(torch.equal, interpret(graph, inputs), before)) and ToKernels().explain(graph) == {}


def test_channel_scales_stay_simulated() -> None:
    graph = Graph.parse(TEXT)
    for step in Pipeline.parse("quantize{x_format=#fp8_channel}; fuse-linear; fold-constants"):
        step.run(graph)
    text = str(graph)
    assert not ToKernels().run(graph) and str(graph) == text
    assert ToKernels().explain(graph) == {"x_q": SIMULATED, "y": SIMULATED}
    static = Graph.parse(STATIC.format(block="[-1, 1]", scale="[1, 128]"))
    assert not ToKernels().run(static)
    assert ToKernels().explain(static) == {"q": SIMULATED, "y": SIMULATED}
