"""The torch operators on a CPU: equal to numerics, with correct fakes, opaque to torch.compile and torch.export."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen import torch_ops
from codegen.operators.quantize import SCALE_LAYOUTS
from qcompiler import numerics
from qcompiler.errors import CodegenError, QCompilerError

# torch.compile loads parts of torch that use deprecated parts of torch on newer Pythons.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

E4M3 = torch.float8_e4m3fn
LAYOUTS = SCALE_LAYOUTS
quantize = torch.ops.qcompiler.quantize
quantize_static = torch.ops.qcompiler.quantize_static
scaled_linear = torch.ops.qcompiler.scaled_linear
# opcheck compares inputs before and after with allclose, which FP8 tensors lack; all other checks run.
CHECKS_OF_FP8 = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


class Layer(torch.nn.Module):
    """A quantized linear layer as written by code generation."""

    def __init__(self, layout: str = "row_major") -> None:
        super().__init__()
        w, ws = quantize(torch.randn(96, 320), [128, 128], E4M3, "deepseek", "row_major")
        self.w, self.ws = torch.nn.Buffer(w), torch.nn.Buffer(ws)
        self.bias = torch.nn.Buffer(torch.randn(96))
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        q, s = quantize(x, [1, 128], E4M3, "deepseek", self.layout)
        result: Tensor = scaled_linear(q, s, self.w, self.ws, self.bias, [1, 128], [128, 128], torch.bfloat16)
        return result


@pytest.mark.parametrize("shape", [(5, 320), (2, 3, 5, 256), (320,), (0, 128), (7, 100), (2, 0, 128)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantize_matches_numerics(shape: tuple[int, ...], layout: str) -> None:
    x = torch.randn(shape, dtype=torch.bfloat16)
    q, scale = quantize(x, [1, 128], E4M3, "deepgemm", layout)
    want_q, want_scale = numerics.quantize(x, numerics.format_of((1, 128), profile="deepgemm"))
    assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8)) and torch.equal(scale, want_scale)


def test_the_column_major_layout_fits_the_copy_engine() -> None:
    for rows, padded in ((1, 4), (4, 4), (5, 8), (130, 132)):
        _, scale = quantize(torch.randn(rows, 384), [1, 128], E4M3, "deepseek", "col_major")
        assert scale.shape == (rows, 3) and scale.stride() == (1, padded)
    _, batch = quantize(torch.randn(2, 5, 384), [1, 128], E4M3, "deepseek", "col_major")
    assert batch.shape == (2, 5, 3) and batch.stride() == (5, 1, 12)
    assert batch.reshape(10, 3).data_ptr() == batch.data_ptr(), "flattening must not copy"


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaled_linear_matches_numerics(lead: tuple[int, ...], layout: str) -> None:
    layer, x = Layer(layout), torch.randn(*lead, 320)
    x_q, x_s = numerics.quantize(x)
    want = numerics.scaled_linear(x_q, x_s, layer.w, layer.ws, layer.bias)
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 320), (2, 3, 256), (0, 128), (300,)])
def test_opcheck_of_quantize(layout: str, shape: tuple[int, ...]) -> None:
    torch.library.opcheck(quantize, (torch.randn(shape), [1, 128], E4M3, "deepseek", layout))


def test_opcheck_of_weight_blocks() -> None:
    torch.library.opcheck(quantize, (torch.randn(200, 300), [128, 128], E4M3, "ue8m0", "row_major"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_scaled_linear(layout: str) -> None:
    layer = Layer()
    for x in (torch.randn(5, 320), torch.randn(2, 3, 320)):
        q, s = quantize(x, [1, 128], E4M3, "deepseek", layout)
        arguments = (q, s, layer.w, layer.ws, layer.bias, [1, 128], [128, 128], torch.bfloat16)
        before = [t.view(torch.uint8).clone() for t in (q, layer.w)]
        torch.library.opcheck(scaled_linear, arguments, test_utils=CHECKS_OF_FP8)
        assert all(torch.equal(t.view(torch.uint8), b) for t, b in zip((q, layer.w), before, strict=True))


GRANULARITIES = ([1, 64], [1, -1], [-1, -1])
SHAPES = ((5, 320), (2, 3, 256), (0, 128), (7, 0), (300,))


@pytest.mark.parametrize("block", GRANULARITIES)
@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_granularity_matches_numerics(block: list[int], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for prescale in (None, torch.rand(shape[-1]) + 0.5):
        want_q, want_scale = numerics.quantize(x, numerics.format_of(block, dtype, "deepseek"), prescale)
        for layout in LAYOUTS if block[0] == 1 else ("row_major",):
            q, scale = quantize(x, block, dtype, "deepseek", layout, prescale)
            assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8)) and torch.equal(scale, want_scale)
        q = quantize_static(x, want_scale, block, dtype, "deepseek", prescale)
        assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8))


@pytest.mark.parametrize("block", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck_of_every_granularity(block: list[int], shape: tuple[int, ...]) -> None:
    x, prescale = torch.randn(shape), torch.rand(shape[-1]) + 0.5
    layout = "col_major" if block[0] == 1 else "row_major"
    torch.library.opcheck(quantize, (x, block, torch.int8, "deepseek", layout, prescale))
    _, scale = numerics.quantize(x, numerics.format_of(block, torch.int8))
    torch.library.opcheck(quantize_static, (x, scale, block, torch.int8, "deepseek", prescale))
    torch.library.opcheck(quantize_static, (x, scale, block, torch.int8, "deepseek"))


@pytest.mark.parametrize("block", GRANULARITIES)
def test_fakes_have_the_shapes_and_strides_of_the_results(block: list[int]) -> None:
    for shape in SHAPES:
        x = torch.randn(shape)
        for layout in LAYOUTS if block[0] == 1 else ("row_major",):
            real = quantize(x, block, torch.int8, "deepseek", layout)
            fake = quantize(x.to("meta"), block, torch.int8, "deepseek", layout)
            for mine, theirs in zip(fake, real, strict=True):
                assert (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


@pytest.mark.parametrize("w_block", [[1, -1], [-1, -1], [128, 128]])
@pytest.mark.parametrize("x_block", [[1, -1], [-1, -1]])
def test_gemms_with_row_scales_match_numerics(x_block: list[int], w_block: list[int]) -> None:
    for dtype in (E4M3, torch.int8):
        x, xs = numerics.quantize(torch.randn(2, 3, 320), numerics.format_of(x_block, dtype))
        w, ws = numerics.quantize(torch.randn(96, 320), numerics.format_of(w_block, dtype))
        got = scaled_linear(x, xs, w, ws, None, x_block, w_block, torch.float16)
        assert torch.equal(
            got,
            numerics.scaled_linear(
                x,
                xs,
                w,
                ws,
                None,
                x_format=numerics.format_of(x_block, x.dtype),
                w_format=numerics.format_of(w_block, w.dtype),
                out_dtype=torch.float16,
            ),
        )


@pytest.mark.parametrize("block", GRANULARITIES)
def test_one_graph_for_any_number_of_rows_of_every_granularity(block: list[int]) -> None:
    w, ws = numerics.quantize(torch.randn(96, 320), numerics.format_of([1, -1], torch.int8))
    prescale = torch.rand(320) + 0.5

    def layer(x: Tensor) -> tuple[Tensor, Tensor]:
        q, s = quantize(x, block, torch.int8, "deepseek", "row_major", prescale)
        again = quantize_static(x, s, block, torch.int8, "deepseek", prescale)
        return scaled_linear(q, s, w, ws, None, block, [1, -1], torch.bfloat16), again

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    rows = torch.export.Dim("rows", min=2, max=4096)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return layer(x)

    exported = torch.export.export(Module(), (torch.randn(6, 320),), dynamic_shapes={"x": {0: rows}}).module()
    for count in (7, 2, 300):
        x = torch.randn(count, 320)
        for mine, other, theirs in zip(compiled(x), exported(x), layer(x), strict=True):
            assert torch.equal(mine, theirs) and torch.equal(other, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_graph_for_any_number_of_rows(layout: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    layer = Layer(layout)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for rows in (7, 2, 300, 64, 129):
        x = torch.randn(rows, 320)
        assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_with_a_symbolic_number_of_rows(layout: str) -> None:
    layer = Layer(layout)
    rows = torch.export.Dim("rows", min=2, max=4096)
    exported = torch.export.export(layer, (torch.randn(6, 320),), dynamic_shapes={"x": {0: rows}})
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count("qcompiler.quantize.default") == 1 and targets.count("qcompiler.scaled_linear.default") == 1
    run = exported.module()
    for count in (2, 5, 700):
        x = torch.randn(count, 320)
        assert torch.equal(run(x), layer(x))


def test_importing_twice_changes_nothing() -> None:
    before = torch_ops._LIBRARY
    again = importlib.reload(torch_ops)
    assert again._LIBRARY is before
    assert quantize(torch.ones(1, 128), [1, 128], E4M3, "deepseek", "row_major")[0].shape == (1, 128)


def test_errors_name_the_value() -> None:
    x = torch.ones(2, 128)
    with pytest.raises(CodegenError, match=r"unknown scale layout: got 'col_mayor'\. Did you mean 'col_major'"):
        quantize(x, [1, 128], E4M3, "deepseek", "col_mayor")
    with pytest.raises(CodegenError, match=r"for blocks of 1 row: got \[128, 128\]; need \[1, columns\]"):
        quantize(x, [128, 128], E4M3, "deepseek", "col_major")
    with pytest.raises(CodegenError, match=r"for blocks of 1 row: got \[-1, -1\]"):
        quantize(x, [-1, -1], E4M3, "deepseek", "col_major")
    with pytest.raises(QCompilerError, match="one entry for each"):
        quantize_static(x, torch.ones(2, 2), [1, -1], E4M3, "deepseek")
    with pytest.raises(QCompilerError, match="one number for each channel"):
        quantize(x, [1, -1], E4M3, "deepseek", "row_major", torch.ones(127))
    with pytest.raises(QCompilerError, match="Did you mean 'vllm'"):
        quantize(x, [1, 128], E4M3, "vlm", "row_major")
    with pytest.raises(QCompilerError, match="the dtype is not an 8-bit code type"):
        quantize(x, [1, 128], torch.float16, "deepseek", "row_major")
