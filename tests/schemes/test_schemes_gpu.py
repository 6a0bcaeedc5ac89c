"""Every scheme on a Hopper GPU: what its kernels compute is what its graph says, and what cannot run says why."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler.errors import CodegenError
from qcompiler.pass_manager.instruments import relative_error
from qcompiler.schemes.named import SCHEMES

pytestmark = pytest.mark.gpu

RUN = [name for name in SCHEMES if not name.endswith("_reference")]
OPTIONS = [f"fp8_tile{{k_block={width}}}" for width in (32, 64, 256, 512, -1)] + [
    "fp8_tile{numerics=deepgemm}", "fp8_tile{scale=ue8m0}", "fp8_tensor{w=channel}", "smoothquant_o1{w=channel}",
    "smoothquant_o3{pow2=true}", "smoothquant_fp8{alpha=search}",
]  # fmt: skip

# A kernel's sums differ from the reference's by 1.3e-4, and the second linear's codes follow: see compiler/test_gpu.py.
FLIPS = 1e-2

RUINED = {"int8_row": 0.15, "int8_tensor": 0.4, "int8_tensor_static": 0.4}
"""What the outlier does to INT8 that is not smoothed."""


class Mlp(nn.Module):
    """A norm that takes a scale in, a GELU that does not, and outliers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)
        with torch.no_grad():
            self.norm.weight[3] *= 40
            self.up.weight[:, 3] /= 40

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return y


def example(width: int = 384, hidden: int = 1000, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Mlp(width, hidden).eval().to("cuda", dtype)
    return model, [torch.randn(2, 33, width, device="cuda", dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("scheme", [*RUN, *OPTIONS])
@torch.no_grad()
def test_kernels_agree_with_the_graph(scheme: str) -> None:
    model, batches = example()
    fast = qcompiler.compile(model, scheme=scheme, calibration=batches)
    assert len(fast.stages["to-kernels"].ops("kernel.scaled_linear")) == 2
    assert not [op for op in fast.graph.ops() if op.name.startswith("quant.")]
    for x in (batches[0], torch.randn(5, 1, 384, device="cuda", dtype=torch.bfloat16)):
        (want,) = qcompiler.interpret(fast.graph, [x])
        assert relative_error(want, fast(x)) < FLIPS
        assert relative_error(model(x), fast(x)) < RUINED.get(scheme, 0.08)
    rows = qcompiler.attribute_error(fast, batches[0]).rows
    assert all(row.kernel > 50 for row in rows)  # one matmul on equal operands: the rounding of bf16, or nothing


@pytest.mark.parametrize("scheme", ["fp8_channel_reference", "int8_channel_reference"])
def test_a_scale_for_each_channel_is_refused_with_the_reason(scheme: str) -> None:
    model, batches = example()
    with pytest.raises(CodegenError, match=r"varies along K, inside the accumulation.*SmoothQuant.*tiles") as error:
        qcompiler.compile(model, scheme=scheme, example_inputs=(batches[0],))
    assert 'target="cpu"' in str(error.value)


@torch.no_grad()
def test_schemes_for_some_layers_in_one_model() -> None:
    model, batches = example()
    fast = qcompiler.compile(model, scheme="fp8_tile", overrides={"down": "int8_row"}, example_inputs=(batches[0],))
    blocks = [op.format("w_format").block for op in fast.stages["to-kernels"].ops("kernel.scaled_linear")]
    assert blocks == [(128, 128), (1, -1)]
    (want,) = qcompiler.interpret(fast.graph, [batches[0]])
    assert relative_error(want, fast(batches[0])) < FLIPS


@torch.no_grad()
def test_static_schemes_run_in_a_cuda_graph() -> None:
    model, batches = example()
    fast = qcompiler.compile(model, scheme="smoothquant_o3", calibration=batches)
    x = batches[1].clone()
    want = fast(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fast(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)
