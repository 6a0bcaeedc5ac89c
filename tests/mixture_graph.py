"""A layer with a mixture of experts as a text: an MLP, a norm, a router with a bias, experts, and a shared expert."""

from collections.abc import Sequence
from typing import Any

import torch

import qcompiler

LAYER = """
func @layer(%x: bf16[s0, 256]) -> (bf16[s0, 256]) where s0 in 1.. {
  %w1 = core.param() {name = "w1"} : bf16[512, 256]
  %w2 = core.param() {name = "w2"} : bf16[256, 512]
  %gain = core.param() {name = "gain"} : bf16[256]
  %gate = core.param() {name = "gate"} : bf16[8, 256]
  %bias = core.param() {name = "bias"} : bf16[8]
  %shared1 = core.param() {name = "shared1"} : bf16[256, 256]
  %shared2 = core.param() {name = "shared2"} : bf16[256, 256]
  %up = core.param() {name = "up"} : bf16[8, 256, 128]
  %down = core.param() {name = "down"} : bf16[8, 128, 256]
  %n = aten.sym_size.int(%x, 0) : int(s0)
  %g = aten.linear(%x, %w1) : bf16[s0, 512]
  %h = aten.silu(%g) : bf16[s0, 512]
  %y = aten.linear(%h, %w2) : bf16[s0, 256]
  %r = aten.add.Tensor(%x, %y) : bf16[s0, 256]
  %v = aten.rms_norm(%r, [256], %gain, 1e-06) : bf16[s0, 256]
  %l = aten.linear(%v, %gate, %bias) : bf16[s0, 8]
  %p = aten.softmax.int(%l, -1) : bf16[s0, 8]
  %best.0, %best.1 = aten.topk(%p, 2) : bf16[s0, 2], i64[s0, 2]
  %expert = aten.view(%best.1, [-1]) : i64[2*s0]
  %prob = aten.view(%best.0, [-1]) : bf16[2*s0]
  %key, %order = aten.sort(%expert) : i64[2*s0], i64[2*s0]
  %token = aten.floor_divide(%order, 2) : i64[2*s0]
  %rows = aten.index.Tensor(%v, [%token]) : bf16[2*s0, 256]
  %float = aten._to_copy(%key) {dtype = f32} : f32[2*s0]
  %counts = aten.histc(%float, 8, 0, 7) : f32[8]
  %ends = aten.cumsum(%counts, 0) {dtype = i32} : i32[8]
  %a = aten._grouped_mm(%rows, %up, %ends) : bf16[2*s0, 128]
  %b = aten.silu(%a) : bf16[2*s0, 128]
  %z = aten._grouped_mm(%b, %down, %ends) : bf16[2*s0, 256]
  %sorted = aten.index.Tensor(%prob, [%order]) : bf16[2*s0]
  %column = aten.unsqueeze(%sorted, 1) : bf16[2*s0, 1]
  %weighted = aten.mul.Tensor(%z, %column) : bf16[2*s0, 256]
  %place = aten.argsort(%order) : i64[2*s0]
  %back = aten.index.Tensor(%weighted, [%place]) : bf16[2*s0, 256]
  %each = aten.view(%back, [%n, 2, 256]) : bf16[s0, 2, 256]
  %sum = aten.sum.dim_IntList(%each, [1]) : bf16[s0, 256]
  %c = aten.linear(%v, %shared1) : bf16[s0, 256]
  %d = aten.silu(%c) : bf16[s0, 256]
  %e = aten.linear(%d, %shared2) : bf16[s0, 256]
  %both = aten.add.Tensor(%sum, %e) : bf16[s0, 256]
  %o = aten.add.Tensor(%r, %both) : bf16[s0, 256]
  return %o
}
"""

ROUTER = """
  %p = aten.softmax.int(%l, -1) : bf16[s0, 8]
  %best.0, %best.1 = aten.topk(%p, 2) : bf16[s0, 2], i64[s0, 2]
"""
LIMITED = """
  %p = aten.sigmoid(%l) : bf16[s0, 8]
  %grouped = aten.view(%p, [-1, 4, 2]) : bf16[s0, 4, 2]
  %top.0, %top.1 = aten.topk(%grouped, 1) : bf16[s0, 4, 1], i64[s0, 4, 1]
  %scores = aten.sum.dim_IntList(%top.0, [-1]) : bf16[s0, 4]
  %group.0, %group.1 = aten.topk(%scores, 1, -1, true, false) : bf16[s0, 1], i64[s0, 1]
  %none = aten.zeros_like(%scores) : bf16[s0, 4]
  %one = aten.scatter.value(%none, 1, %group.1, 1) : bf16[s0, 4]
  %column2 = aten.unsqueeze(%one, -1) : bf16[s0, 4, 1]
  %wide = aten.expand(%column2, [-1, 4, 2]) : bf16[s0, 4, 2]
  %mask = aten.reshape(%wide, [%n, 8]) : bf16[s0, 8]
  %allowed = aten._to_copy(%mask) {dtype = b8} : b8[s0, 8]
  %others = aten.bitwise_not(%allowed) : b8[s0, 8]
  %left = aten.masked_fill.Scalar(%p, %others, -inf) : bf16[s0, 8]
  %values, %best.1 = aten.topk(%left, 2, -1, true, false) : bf16[s0, 2], i64[s0, 2]
  %best.0 = aten.gather(%p, 1, %best.1) : bf16[s0, 2]
"""
"""A router as in DeepSeek-V3: each token chooses one of four groups, then experts of this group."""


def mixture(favorites: Sequence[int] = (), *, limited: bool = False) -> qcompiler.Graph:
    """The layer.

    Args:
        favorites: Two experts that all tokens choose.
        limited: Whether the experts of a token are in one group.
    """
    graph = qcompiler.Graph.parse(LAYER.replace(ROUTER, LIMITED) if limited else LAYER)
    torch.manual_seed(0)
    for op in graph.ops("core.param"):
        shape = [int(str(size)) for size in op.result.tensor.shape]
        graph.weights[str(op.attrs["name"])] = (0.05 * torch.randn(shape)).bfloat16()
    bias = torch.zeros(8)
    bias[list(favorites)] = 100
    graph.weights.update(bias=bias.bfloat16(), gain=torch.ones(256).bfloat16())
    return graph


def mixture_on(mesh: Any, sharding: str, favorites: Sequence[int] = (), *, limited: bool = False) -> Any:
    """The compiled layer, not quantized."""
    graph = mixture(favorites, limited=limited)
    return qcompiler.compile(
        graph, pipeline="dead-code", strict=False, mesh=mesh, sharding=sharding, progress=False
    )  # fmt: skip
