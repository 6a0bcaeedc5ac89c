"""The analysis along the sequence: whole graphs that are causal, and whole graphs that are not."""

from passes.analyses.sequence import Refused, Sequence, analyze
from qcompiler.ir import Graph

LAYER = """
func @m(%input_ids: i64[s0, s1]) -> (f32[s0, s1, 64]) where s0 in 1.., s1 in 1.. {
  %table = core.param() {name = "table"} : f32[64, 32]
  %wq = core.param() {name = "wq"} : f32[32, 32]
  %wk = core.param() {name = "wk"} : f32[16, 32]
  %wv = core.param() {name = "wv"} : f32[16, 32]
  %frequency = core.param() {name = "frequency"} : f32[4]
  %gain = core.param() {name = "gain"} : f32[32]
  %n0 = aten.sym_size.int(%input_ids, 0) : int(s0)
  %n1 = aten.sym_size.int(%input_ids, 1) : int(s1)
  %x = aten.embedding(%table, %input_ids) : f32[s0, s1, 32]
  %place = aten.arange(%n1) : i64[s1]
  %row = aten.unsqueeze(%place, 0) : i64[1, s1]
  %column = aten.unsqueeze(%row, 2) : i64[1, s1, 1]
  %angle = aten.mul.Tensor(%column, %frequency) : f32[1, s1, 4]
  %cos = aten.cos(%angle) : f32[1, s1, 4]
  %turn = aten.cat([%cos, %cos], -1) : f32[1, s1, 8]
  %turn1 = aten.unsqueeze(%turn, 1) : f32[1, 1, s1, 8]
  %q = aten.linear(%x, %wq) : f32[s0, s1, 32]
  %k = aten.linear(%x, %wk) : f32[s0, s1, 16]
  %v = aten.linear(%x, %wv) : f32[s0, s1, 16]
  %q1 = aten.view(%q, [%n0, %n1, -1, 8]) : f32[s0, s1, 4, 8]
  %k1 = aten.view(%k, [%n0, %n1, -1, 8]) : f32[s0, s1, 2, 8]
  %v1 = aten.view(%v, [%n0, %n1, -1, 8]) : f32[s0, s1, 2, 8]
  %q2 = aten.transpose.int(%q1, 1, 2) : f32[s0, 4, s1, 8]
  %k2 = aten.transpose.int(%k1, 1, 2) : f32[s0, 2, s1, 8]
  %v2 = aten.transpose.int(%v1, 1, 2) : f32[s0, 2, s1, 8]
  %q3 = aten.mul.Tensor(%q2, %turn1) : f32[s0, 4, s1, 8]
  %k3 = aten.mul.Tensor(%k2, %turn1) : f32[s0, 2, s1, 8]
  %o = attention.causal(%q3, %k3, %v2) {scale = 0.35} : f32[s0, 4, s1, 8]
  %o1 = aten.transpose.int(%o, 1, 2) : f32[s0, s1, 4, 8]
  %o2 = aten.view(%o1, [%n0, %n1, -1]) : f32[s0, s1, 32]
  %h = aten.add.Tensor(%x, %o2) : f32[s0, s1, 32]
  %norm = aten.rms_norm(%h, [32], %gain, 1e-06) : f32[s0, s1, 32]
  %logits = aten.linear(%norm, %table) : f32[s0, s1, 64]
  return %logits
}
"""


def test_a_layer_is_causal() -> None:
    graph = Graph.parse(LAYER)
    found = analyze(graph)
    assert isinstance(found, Sequence)
    labels = {name: str(found.labels[graph[name]]) for name in ("x", "column", "turn1", "k3", "o2", "logits")}
    assert labels == {
        "x": "[batch, positions, 32]",
        "column": "[1, positions, 1]",
        "turn1": "[1, 1, positions, 8]",
        "k3": "[batch, 2, positions, 8]",
        "o2": "[batch, positions, 32]",
        "logits": "[batch, positions, 64]",
    }
    assert found.positions == {graph["place"]: 0, graph["row"]: 0, graph["column"]: 0}
    assert found.labels[graph["turn1"]].numbers == {graph["place"]} and not found.labels[graph["turn1"]].content
    assert found.tokens == (graph["norm"],)


def test_one_scale_for_all_tokens_is_refused() -> None:
    before, after = "%norm = aten.rms_norm", "  %logits = aten.linear(%norm, %table)"
    quantized = """
  %codes, %scale = quant.quantize(%norm) {format = #fp8_tensor} : f8e4m3fn[s0, s1, 32], f32[1, 1]
  %dequantized = quant.dequantize(%codes, %scale) {format = #fp8_tensor, out_dtype = f32} : f32[s0, s1, 32]
  %logits = aten.linear(%dequantized, %table)"""
    assert before in LAYER
    found = analyze(Graph.parse(LAYER.replace(after, quantized)))
    assert isinstance(found, Refused)
    assert found.why.startswith("quant.quantize is not causal: each scale of #fp8_tensor is computed from all tokens")
    assert found.op.name == "quant.quantize"
