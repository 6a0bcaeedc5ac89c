"""A graph to which cases of the tables along the sequence add their operations, and how a case is run."""

import re

import torch
from token_lanes import wrong_values

from passes.analyses.sequence import Refused, Sequence, analyze
from qcompiler.ir import Graph

HEAD = """
func @m(%input_ids: i64[s0, s1]) -> (f32[]) where s0 in 1.., s1 in 1.. {
  %table = core.param() {name = "table"} : f32[64, 8]
  %w = core.param() {name = "w"} : f32[8, 8]
  %n0 = aten.sym_size.int(%input_ids, 0) : int(s0)
  %n1 = aten.sym_size.int(%input_ids, 1) : int(s1)
  %nt = core.mul(%n0, %n1) : int(s0*s1)
  %n2 = core.mul(%nt, 2) : int(2*s0*s1)
  %x = aten.embedding(%table, %input_ids) : f32[s0, s1, 8]
  %p = aten.arange(%n1) : i64[s1]
  %c = aten.transpose.int(%x, 1, 2) : f32[s0, 8, s1]
  %h = aten.view(%x, [%n0, %n1, 4, 2]) : f32[s0, s1, 4, 2]
  %t = aten.view(%x, [-1, 8]) : f32[s0*s1, 8]
"""
ROUTED = """
  %best.0, %best.1 = aten.topk(%t, 2) : f32[s0*s1, 2], i64[s0*s1, 2]
  %expert = aten.view(%best.1, [-1]) : i64[2*s0*s1]
  %key, %order = aten.sort(%expert) : i64[2*s0*s1], i64[2*s0*s1]
  %token = aten.floor_divide(%order, 2) : i64[2*s0*s1]
  %sorted = aten.index.Tensor(%t, [%token]) : f32[2*s0*s1, 8]
"""
GROUPS = """
  %experts = core.param() {name = "experts"} : f32[8, 8, 8]
  %float = aten._to_copy(%key) {dtype = f32} : f32[2*s0*s1]
  %count = aten.histc(%float, 8, 0, 7) : f32[8]
  %ends = aten.cumsum(%count, 0) {dtype = i32} : i32[8]
"""
PLACES = """
  %empty = aten.empty_like(%order) : i64[2*s0*s1]
  %iota = aten.arange(%n2) : i64[2*s0*s1]
  %place = aten.index_put(%empty, [%order], %iota) : i64[2*s0*s1]
"""
TILES = "  %q, %s = quant.quantize(%x) {format = #fp8_tile} : f8e4m3fn[s0, s1, 8], f32[s0, s1, 1]\n"
TERMS = (
    "  %u = aten.unsqueeze(%x, 0) : f32[1, s0, s1, 8]\n  %e = aten.expand(%u, [2, -1, -1, -1]) : f32[2, s0, s1, 8]\n"
    "  %q, %s = quant.quantize(%e) {format = #fp8_tile} : f8e4m3fn[2, s0, s1, 8], f32[2, s0, s1, 1]\n"
)
BLOCKS = "  %wq, %ws = quant.quantize(%w) {format = #fp8_block} : f8e4m3fn[8, 8], f32[1, 1]\n"
SORTED_TILES = (
    "  %q, %s = quant.quantize(%sorted) {format = #fp8_tile} : f8e4m3fn[2*s0*s1, 8], f32[2*s0*s1, 1]\n"
    "  %wq, %ws = quant.quantize(%experts) {format = #fp8_block} : f8e4m3fn[8, 8, 8], f32[8, 1, 1]\n"
)
ONE = "%one = aten.ones([%n0, %n1]) : f32[s0, s1]\n"
B_P_8, POSITIONS, HEADS = "[batch, positions, 8]", "[positions]", "[batch, positions, 4, 2]"
"""Labels."""
LAYOUT = "{out_dtype = f32, w_format = #fp8_block, x_format = #fp8_tile}"


def case(body: str) -> Graph:
    """HEAD, the lines of a case, and a return of %r, with small integers as weights: sums of them are exact."""
    kind = re.search(r"%r(?:, %\w+)* = .*? : (\S+\[[^\]]*\])", body)
    assert kind is not None, body
    graph = Graph.parse(HEAD.replace("(f32[])", f"({kind[1]})") + body + "\n  return %r\n}")
    torch.manual_seed(0)
    for op in graph.ops("core.param"):
        shape = op.result.tensor.shape
        graph.weights[str(op.attrs["name"])] = torch.randint(-3, 4, [int(str(size)) for size in shape]).float()
    return graph


def check_legal(body: str, label: str, *, causal: bool = False) -> None:
    """Checks the label of %r, and on numbers that no value changes with a token that its label excludes."""
    graph = case(body)
    found = analyze(graph)
    assert isinstance(found, Sequence), found
    assert str(found.labels[graph["r"]]) == label
    ids = torch.randint(0, 64, (2, 5))
    assert not wrong_values(graph, found, ids, 1, 2, causal=causal)


def check_refused(body: str, why: str) -> None:
    """Checks the reason."""
    found = analyze(case(body))
    assert isinstance(found, Refused), found.labels
    assert why in found.why, found.why
