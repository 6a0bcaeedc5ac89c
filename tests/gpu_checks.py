"""Comparisons and checks that several `gpu` test files use."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction


def relative_error(got: Tensor, want: Tensor) -> float:
    """The norm of the difference, relative to the expected norm."""
    return float((got.double() - want).norm() / want.norm())


def assert_same_codes(got: Tensor, want: Tensor) -> None:
    """Compares bits; any NaN equals any other NaN."""
    codes, expected = got.cpu().view(torch.uint8), want.cpu().view(torch.uint8)
    nan, expected_nan = got.cpu().float().isnan(), want.cpu().float().isnan()
    wrong = torch.where(nan | expected_nan, nan != expected_nan, codes != expected).nonzero()
    first = wrong[0].tolist() if len(wrong) else []
    assert not first, (
        f"{len(wrong)} of {codes.numel()} codes differ; the first at {first}: got {float(got[tuple(first)])}, "
        f"need {float(want[tuple(first)])}"
    )


def assert_compiled_and_captured(layer: Callable[[Tensor], Tensor], columns: int, rows: Sequence[int]) -> None:
    """A layer on bf16[rows, columns] gives equal bits under `torch.compile` and in a CUDA graph."""
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for count in rows:
        x = torch.randn(count, columns, dtype=torch.bfloat16, device="cuda")
        assert torch.equal(compiled(x), layer(x))
    still = torch.randn(64, columns, dtype=torch.bfloat16, device="cuda")
    layer(still)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(still)
    still.normal_()
    graph.replay()
    assert torch.equal(captured, layer(still))


def assert_compiles_nothing_new(call: Callable[[int], object], kernels: Sequence[JITFunction]) -> None:
    """Calls with different numbers of rows, all above 512, share the compiled kernels of the first."""
    device, counts = torch.cuda.current_device(), []
    for rows in (600, 601, 608, 640, 768, 1000):
        call(rows)
        counts.append(sum(len(kernel.device_caches[device][0]) for kernel in kernels))
    assert len(set(counts)) == 1, counts
