"""Compiled models on a Hopper GPU: the kernels in whole models, under torch.compile and in CUDA graphs."""

from typing import Any

import pytest
import torch

import qcompiler
from qcompiler.pass_manager.instruments import Validate, relative_error

pytestmark = pytest.mark.gpu


class Block(torch.nn.Module):
    """Attention and a gated MLP, at sizes that are and are not multiples of 128."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(width)
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width, bias=False)
        self.gate, self.up = torch.nn.Linear(width, hidden), torch.nn.Linear(width, hidden)
        self.down = torch.nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y: torch.Tensor = self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return x + y


def example(width: int, hidden: int, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Block(width, hidden).eval().to("cuda", dtype), torch.randn(2, 65, width, device="cuda", dtype=dtype)


SIZES = [(256, 512), (320, 1000)]

# A kernel's sums differ from the reference's by 1.3e-4 (the tensor core's accumulator, within 128 products). Behind the
# next quantization that moves about one code in 300 to its neighbour, 6% away: sqrt(1 / 300) * 0.06 = 3.5e-3.
FLIPS = {torch.float32: 6e-3, torch.float16: 6e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("width", "hidden"), SIZES)
def test_kernels_agree_with_the_interpreter(width: int, hidden: int, dtype: torch.dtype) -> None:
    model, x = example(width, hidden, dtype)
    fast = qcompiler.compile(model, example_inputs=(x,), instruments=[Validate()])
    assert len(fast.report.quantized) == 5
    for sample in (
        x,
        torch.randn(3, 1, width, device="cuda", dtype=dtype),
        torch.randn(1, 200, width, device="cuda", dtype=dtype),
    ):
        (want,) = qcompiler.interpret(fast.graph, [sample])
        assert relative_error(want, fast(sample)) < FLIPS[dtype]
        with torch.no_grad():
            assert relative_error(model(sample), fast(sample)) < 0.06


def check_kernels_one_by_one(graph: qcompiler.Graph, inputs: list[torch.Tensor]) -> None:
    """Each kernel on the very operands that the interpreter had: equal bits where it quantizes, tight where it sums."""
    seen: dict[qcompiler.Value, Any] = dict(zip(graph.inputs, inputs, strict=True))
    kernels = 0

    def observe(op: qcompiler.Op, results: tuple[Any, ...]) -> None:
        nonlocal kernels
        seen.update(zip(op.results, results, strict=True))
        operands = [seen[arg] for arg in op.args if isinstance(arg, qcompiler.Value)]
        if op.name == "kernel.quantize":
            q, scale = torch.ops.qcompiler.quantize(*operands, [1, 128], torch.float8_e4m3fn, "deepseek", "col_major")
            assert torch.equal(q.view(torch.uint8), results[0].view(torch.uint8))
            assert torch.equal(scale, results[1])
        elif op.name == "kernel.scaled_linear":
            bias = [None] * (5 - len(operands))
            y = torch.ops.qcompiler.scaled_linear(*operands, *bias, [1, 128], [128, 128], results[0].dtype)
            assert relative_error(results[0], y) < 2e-3
        kernels += op.name.startswith("kernel.")

    qcompiler.interpret(graph, inputs, observe=observe)
    assert kernels > 0


def test_a_hugging_face_model_runs_and_keeps_its_output_type() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().to("cuda", torch.bfloat16)
    ids = torch.randint(0, 320, (2, 33), device="cuda")
    fast = qcompiler.compile(model)
    with torch.no_grad():
        want = model(ids, use_cache=False)
    got = fast(ids)
    assert type(got) is type(want)
    assert len(fast.report.quantized) == 14
    assert relative_error(want.logits, got.logits) < 0.1  # FP8's own error, through two layers
    graph = fast.stages["to-kernels"].clone()  # the kernels of fused operations have tests of their own
    graph.weights = fast.graph.weights
    check_kernels_one_by_one(graph, [ids])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own imports, on Python 3.12
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_torch_compile_takes_a_compiled_model(backend: str) -> None:
    model, x = example(256, 512, torch.bfloat16)
    fast = qcompiler.compile(model, example_inputs=(x,))
    faster: Any = torch.compile(fast, fullgraph=True, dynamic=True, backend=backend)
    for rows in (65, 7):
        sample = torch.randn(2, rows, 256, device="cuda", dtype=torch.bfloat16)
        assert relative_error(fast(sample), faster(sample)) < 1e-2


def test_a_cuda_graph_replays_a_compiled_model() -> None:
    model, x = example(256, 512, torch.bfloat16)
    fast = qcompiler.compile(model, example_inputs=(x,))
    fast(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fast(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, fast(x))


def test_no_rows_and_rows_that_are_not_contiguous() -> None:
    model, x = example(256, 512, torch.bfloat16)
    fast = qcompiler.compile(model, example_inputs=(x,))
    wide = torch.randn(2, 65, 512, device="cuda", dtype=torch.bfloat16)[..., ::2]
    assert torch.equal(fast(wide), fast(wide.contiguous()))
    mlp = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 8)).eval().cuda()
    empty = qcompiler.compile(mlp, example_inputs=(torch.randn(4, 256, device="cuda"),))(
        torch.empty(0, 256, device="cuda")
    )
    assert empty.shape == (0, 8)
