"""A compiled model works with torch.compile and torch.export like any model."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import qcompiler
from qcompiler import CaptureError, CompiledModel

# Dynamo, when it is first loaded, imports parts of torch that torch itself deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Out(NamedTuple):
    hidden: Tensor
    pooled: dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(72), nn.Linear(72, 200), nn.Linear(200, 72)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Out:
        h = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        h = h if mask is None else h * mask.unsqueeze(-1)
        return Out(h, {"mean": h.mean(1)})


@pytest.fixture(scope="module")
def fast() -> CompiledModel:
    torch.manual_seed(0)
    return qcompiler.compile(Block().eval(), example_inputs=(torch.randn(2, 5, 72), torch.ones(2, 5)))


def inputs(rows: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, length, 72), (torch.rand(rows, length) > 0.3).float()


def same(got: Any, want: Out) -> None:
    assert type(got) is Out
    torch.testing.assert_close(got.hidden, want.hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.pooled, want.pooled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_without_breaks_and_with_one_graph_for_all_sizes(fast: CompiledModel, backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(fast, backend=counter, fullgraph=True, dynamic=True)
    for rows, length in ((2, 5), (3, 7), (6, 4)):
        x, mask = inputs(rows, length)
        same(compiled(x, mask), fast(x, mask))
        same(compiled(x, mask=mask.requires_grad_()), fast(x, mask))
    assert counter.frame_count <= 2, "one for each way to call it"


def test_torch_compile_of_a_pipeline_that_stays_in_plain_torch() -> None:
    torch._dynamo.reset()
    slow = qcompiler.compile(
        Block().eval(), example_inputs=inputs(2, 5), pipeline="canonicalize; fp8-tile; fuse-linear; fold-constants"
    )
    x, mask = inputs(3, 4)
    same(torch.compile(slow, backend="eager", fullgraph=True, dynamic=True)(x, mask), slow(x, mask))


def test_the_first_call_must_come_before() -> None:
    torch._dynamo.reset()
    lazy = qcompiler.compile(Block().eval())
    x, mask = inputs(3, 4)
    with pytest.raises(CaptureError, match=r"the model is not captured yet\. Call it once before torch\.export"):
        torch.export.export(lazy, (x, mask))
    lazy(x, mask)
    same(torch.compile(lazy, backend="eager", fullgraph=True)(x, mask), lazy(x, mask))


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_with_dynamic_sizes(fast: CompiledModel, strict: bool) -> None:
    rows, length = torch.export.Dim("rows", min=2), torch.export.Dim("length", min=2)
    shapes = {"x": {0: rows, 1: length}, "mask": {0: rows, 1: length}}
    program = torch.export.export(fast, inputs(3, 4), dynamic_shapes=shapes, strict=strict)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names.count("qcompiler.fused_linear.default") == 2
    assert strict or not [name for name in names if "wrap_with" in name], "no sub-graph for no_grad or autocast"
    for sizes in ((3, 4), (7, 2)):
        x, mask = inputs(*sizes)
        same(program.module()(x, mask), fast(x, mask))
    assert set(program.state_dict) == set(fast.state_dict())


def test_export_of_a_model_that_was_exported(fast: CompiledModel) -> None:
    """What torch.export yields of a compiled model is not quantized again, and still runs."""
    program = torch.export.export(fast, inputs(3, 4))
    again = qcompiler.compile(program, strict=False)
    x, mask = inputs(3, 4)
    same(again(x, mask), fast(x, mask))


def test_state_in_torch_compile() -> None:
    class Sum(nn.Module):
        total: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.register_buffer("total", torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            self.total.add_(self.linear(x).sum(0))
            return self.total * 1

    torch._dynamo.reset()
    x = torch.randn(3, 16)
    fast = qcompiler.compile(Sum().eval(), example_inputs=(x,))
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    first = compiled(x)
    torch.testing.assert_close(compiled(x), 2 * first)
    torch.testing.assert_close(fast(x), 3 * first)
