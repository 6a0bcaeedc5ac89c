"""A bf16 linear of one row on a CPU is a matrix times a vector, as exact as torch's linear."""

import pytest
import torch
from torch.nn import functional

from codegen.cpu.linear import linear
from codegen.host import emit_host_module
from qcompiler.ir import Graph

TEXT = """
func @m(%x: {kind}[s0, 64]) -> ({kind}[s0, 96]) where s0 in 1.. {{
  %w = core.param() {{name = "w"}} : {kind}[96, 64]
  %b = core.param() {{name = "b"}} : {kind}[96]
  %y = aten.linear(%x, %w{bias}) : {kind}[s0, 96]
  return %y
}}
"""


@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 1, 64)])
def test_one_row(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(shape).bfloat16(), torch.randn(3000, 64).bfloat16()
    got, want = linear(x, w), functional.linear(x, w)
    exact = functional.linear(x.double(), w.double())
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got, exact.float().bfloat16()) or (got - exact).norm() <= 1.001 * (want - exact).norm()


def test_columns_of_a_larger_tensor_and_no_columns_of_the_weight() -> None:
    x, w = torch.randn(3, 128).bfloat16(), torch.randn(5, 64).bfloat16()
    assert torch.equal(linear(x[1:2, ::2], w), linear(x[1:2, ::2].contiguous(), w))
    assert linear(x[:1, :64], w[:0]).shape == (1, 0)


def test_several_rows_are_torchs_linear() -> None:
    x, w = torch.randn(2, 3, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    assert torch.equal(linear(x, w), functional.linear(x, w))
    assert linear(x[:0], w).shape == (0, 3, 5)


def test_only_bf16_weights_without_a_bias_on_a_cpu() -> None:
    def calls(kind: str = "bf16", bias: str = "", target: str = "cpu") -> bool:
        graph = Graph.parse(TEXT.format(kind=kind, bias=bias))
        return "linear_of_rows(x, weights.w)" in emit_host_module(graph, target).source

    assert calls()
    assert not calls("f32") and not calls("f16") and not calls(bias=", %b") and not calls(target="sm_90a")


def test_tracing_does_not_specialize_on_one_row() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return linear(x, w)

    x, w = torch.randn(4, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    traced = torch.export.export(Model(), (x, w), dynamic_shapes=({0: torch.export.Dim("rows", max=9)}, None))
    assert torch.equal(traced.module()(x[:1], w), functional.linear(x[:1], w))
