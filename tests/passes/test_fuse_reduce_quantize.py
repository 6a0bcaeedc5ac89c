"""Sums over ranks in the operation that normalizes and quantizes them: equal bits on all ranks."""

import pytest
import torch
from sharded_graphs import rank_graphs, run_ranks

from qcompiler.ir import Graph
from qcompiler.testing import random_inputs

FORMATS = "x_format=#format<f8e4m3fn, block = [1, 32]>, w_format=#format<f8e4m3fn, block = [32, 32]>"
QUANTIZED = (
    f"fp8-tile{{{FORMATS}}}; share-quantize; fuse-linear; fold-constants; dead-code; to-kernels; fuse-norm-quantize"
)
LAYERS = """func @m(%x: TYPE[s0, 64]) -> (TYPE[s0, 64]) where s0 in 1..64 {
  %n = core.param() {name = "n"} : TYPE[64]
  %w1 = core.param() {name = "w1"} : TYPE[192, 64]
  %w2 = core.param() {name = "w2"} : TYPE[64, 192]
  %w3 = core.param() {name = "w3"} : TYPE[64, 64]
  %g1 = aten.linear(%x, %w1) : TYPE[s0, 192]
  %h1 = aten.silu(%g1) : TYPE[s0, 192]
  %y = aten.linear(%h1, %w2) : TYPE[s0, 64]
  %r = aten.add.Tensor(%x, %y) : TYPE[s0, 64]
  %m = aten.rms_norm(%r, [64], %n) : TYPE[s0, 64]
  %z = aten.linear(%m, %w3) : TYPE[s0, 64]
  %e = aten.add.Tensor(%r, %z) : TYPE[s0, 64]
  return %e
}"""


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_fused_sum_has_equal_bits(dtype: str, ranks: int) -> None:
    graph = Graph.parse(LAYERS.replace("TYPE", dtype))
    _, graph.weights = random_inputs(graph, 0)
    mesh = f"tp={ranks}"
    plain = rank_graphs(graph, mesh, QUANTIZED, "[32, 32]")
    fused = rank_graphs(graph, mesh, f"{QUANTIZED}; fuse-reduce-quantize", "[32, 32]")
    assert str(plain[0]).count("coll.all_reduce") == 1 and "coll.all_reduce" not in str(fused[0])
    assert "%m_q, %m_s, %r = coll.fused_reduce_quantize(%x, %y, %n)" in str(fused[0])
    for rows in (1, 7):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).to(graph.weights["n"].dtype)
        (outputs, values), (expected, whole) = run_ranks(fused, mesh, [x]), run_ranks(plain, mesh, [x])
        assert all(torch.equal(output, expected[0][0]) for (output,) in outputs)
        for name in ("m_q", "m_s", "r"):
            assert all(torch.equal(own[name].float(), whole[0][name].float()) for own in values)
