"""A causal language model of one layer as the text of a graph: learned and rotary positions, grouped queries."""

from typing import Any

import torch
from torch import Tensor

from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.testing import random_inputs

VOCABULARY = 32

TEXT = """\
func @tiny(%input_ids: i64[s0, s1]) -> (f32[s0, s1, 32]) where s0 in 1.., s1 in 1..64 {
  %words = core.param() {name = "words"} : f32[32, 16]
  %places = core.param() {name = "places"} : f32[66, 16]
  %turns = core.param() {name = "turns"} : f32[4]
  %wq = core.param() {name = "wq"} : f32[16, 16]
  %wk = core.param() {name = "wk"} : f32[8, 16]
  %wv = core.param() {name = "wv"} : f32[8, 16]
  %wo = core.param() {name = "wo"} : f32[16, 16]
  %b = aten.sym_size.int(%input_ids, 0) : int(s0)
  %n = aten.sym_size.int(%input_ids, 1) : int(s1)
  %place = aten.arange(%n) : i64[s1]
  %row = aten.unsqueeze(%place, 0) : i64[1, s1]
  %shifted = aten.add.Tensor(%row, 2) : i64[1, s1]
  %word = aten.embedding(%words, %input_ids) : f32[s0, s1, 16]
  %learned = aten.embedding(%places, %shifted) : f32[1, s1, 16]
  %x = aten.add.Tensor(%word, %learned) : f32[s0, s1, 16]
  %numbers = aten._to_copy(%row) {dtype = f32} : f32[1, s1]
  %column = aten.unsqueeze(%numbers, -1) : f32[1, s1, 1]
  %angles = aten.mul.Tensor(%column, %turns) : f32[1, s1, 4]
  %wide = aten.expand(%angles, [1, -1, 4]) : f32[1, s1, 4]
  %cos = aten.cos(%wide) : f32[1, s1, 4]
  %cos1 = aten.unsqueeze(%cos, 1) : f32[1, 1, s1, 4]
  %q = aten.linear(%x, %wq) : f32[s0, s1, 16]
  %q1 = aten.view(%q, [%b, %n, 4, 4]) : f32[s0, s1, 4, 4]
  %q2 = aten.transpose.int(%q1, 1, 2) : f32[s0, 4, s1, 4]
  %q3 = aten.mul.Tensor(%q2, %cos1) : f32[s0, 4, s1, 4]
  %k = aten.linear(%x, %wk) : f32[s0, s1, 8]
  %k1 = aten.view(%k, [%b, %n, 2, 4]) : f32[s0, s1, 2, 4]
  %k2 = aten.transpose.int(%k1, 1, 2) : f32[s0, 2, s1, 4]
  %k3 = aten.mul.Tensor(%k2, %cos1) : f32[s0, 2, s1, 4]
  %v = aten.linear(%x, %wv) : f32[s0, s1, 8]
  %v1 = aten.view(%v, [%b, %n, 2, 4]) : f32[s0, s1, 2, 4]
  %v2 = aten.transpose.int(%v1, 1, 2) : f32[s0, 2, s1, 4]
  %o = attention.causal(%q3, %k3, %v2) {scale = 0.5} : f32[s0, 4, s1, 4]
  %o1 = aten.transpose.int(%o, 1, 2) : f32[s0, s1, 4, 4]
  %o2 = aten.reshape(%o1, [%b, %n, 16]) : f32[s0, s1, 16]
  %y = aten.linear(%o2, %wo) : f32[s0, s1, 16]
  %h = aten.add.Tensor(%x, %y) : f32[s0, s1, 16]
  %flat = aten.view(%h, [-1, 16]) : f32[s0*s1, 16]
  %scores = aten.linear(%flat, %words) : f32[s0*s1, 32]
  %logits = aten.view(%scores, [%b, %n, 32]) : f32[s0, s1, 32]
  return %logits
}
"""


def tiny(text: str = TEXT) -> Graph:
    """The graph with random weights, for which logits are about 1."""
    graph = Graph.parse(text)
    _, weights = random_inputs(graph, 1, {"s0": 1, "s1": 1})
    graph.weights = {name: 0.4 * tensor for name, tensor in weights.items()}
    return graph


def ids(rows: int, length: int) -> Tensor:
    """Random token ids."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))


def whole(graph: Graph, tokens: Tensor) -> Tensor:
    """The logits of all tokens by the graph without caches."""
    (logits,) = interpret(graph, [tokens])
    return logits  # type: ignore[no-any-return]  # a graph's outputs have any type


def with_caches(graph: Graph, **options: Any) -> Graph:
    """A copy of the graph after the pass kv-cache."""
    step = graph.clone()
    shown = ", ".join(f"{name}={value}" for name, value in {"slots": 3, "capacity": 16, **options}.items())
    run_pipeline(Pipeline.parse(f"kv-cache{{{shown}}}"), step)
    return step
