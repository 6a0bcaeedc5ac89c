"""The grouped operators on a CPU: equal to a dense loop, honest fakes, opaque to compile and export."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import codegen.torch_ops  # noqa: F401  (registers the operators)
from qcompiler import numerics
from qcompiler.dialects.grouped import grouped_linear as meaning
from qcompiler.errors import CodegenError, QCompilerError, VerifyError
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph

# Parts of torch that torch.compile loads call other parts of torch deprecated, on newer Pythons.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

E4M3 = torch.float8_e4m3fn
TILES = ([1, 128], [128, 128])
grouped_linear = torch.ops.qcompiler.grouped_linear
masked = torch.ops.qcompiler.grouped_linear_masked
# Torch compares inputs before and after with allclose, which FP8 tensors do not have; the rest of the checks.
CHECKS_OF_FP8 = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def operands(rows: int, groups: int, n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, xs = numerics.quantize(torch.randn(rows, k, generator=generator))
    spread = torch.rand(groups, 1, 1, generator=generator).mul(4).exp()
    w, ws = numerics.quantize(torch.randn(groups, n, k, generator=generator) * spread, numerics.format_of((128, 128)))
    return x, xs, w, ws


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@settings(max_examples=50)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    tail=st.integers(0, 3),
    n=st.sampled_from([8, 96, 136]),
    k=st.sampled_from([16, 128, 272]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_each_group_is_a_dense_product(counts: list[int], tail: int, n: int, k: int, dtype: torch.dtype) -> None:
    rows, groups = sum(counts) + tail, len(counts)
    x, xs, w, ws = operands(rows, groups, n, k)
    got = grouped_linear(x, xs, w, ws, ends_of(counts), *TILES, dtype)
    assert got.shape == (rows, n) and got.dtype == dtype
    # Every row by itself, from the dequantized operands, in float64.
    left, right = (
        numerics.dequantize(x, xs).double(),
        numerics.dequantize(w, ws, format=numerics.format_of((128, 128), w.dtype)).double(),
    )
    group_of = [group for group, count in enumerate(counts) for _ in range(count)]
    want = torch.zeros(rows, n, dtype=torch.float64)
    for row, group in enumerate(group_of):
        want[row] = right[group] @ left[row]
    tight = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}[dtype]
    assert bool(((got - want).abs() <= tight * want.abs() + 1e-6 * (left.abs().sum() + 1)).all())
    assert bool((got[len(group_of) :] == 0).all()), "rows after the last group are zero"


@settings(max_examples=30)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_masked_is_grouped_with_room_between_the_groups(counts: list[int]) -> None:
    groups, capacity = len(counts), 6
    x, xs, w, ws = operands(groups * capacity, groups, 24, 144)
    there = torch.tensor(counts, dtype=torch.int32)
    got = masked(x.view(groups, capacity, -1), xs.view(groups, capacity, -1), w, ws, there, *TILES, torch.float32, None)
    kept = torch.cat([torch.arange(c) + g * capacity for g, c in enumerate(counts)])
    want = grouped_linear(x[kept], xs[kept], w, ws, ends_of(counts), *TILES, torch.float32)
    assert torch.equal(got.view(-1, 24)[kept], want)


def test_offsets_that_decrease_or_leave_the_tensor_are_clamped() -> None:
    x, xs, w, ws = operands(5, 3, 16, 128)
    got = meaning(x, xs, w, ws, torch.tensor([-2, 9, 1], dtype=torch.int32), out_dtype=torch.float32)
    want = numerics.scaled_linear(x, xs, w[1], ws[1], out_dtype=torch.float32)
    assert torch.equal(got, want)


def test_a_group_reads_its_own_scales_and_no_other_rows() -> None:
    x, xs, w, ws = operands(6, 2, 16, 128)
    ends = ends_of([2, 3])
    want = grouped_linear(x, xs, w, ws, ends, *TILES, torch.float32)
    xs[5], ws[0] = math.nan, math.nan
    got = grouped_linear(x, xs, w, ws, ends, *TILES, torch.float32)
    assert bool(got[:2].isnan().all()) and torch.equal(got[2:], want[2:])


@pytest.mark.parametrize("rows", [5, 0])
def test_opcheck(rows: int) -> None:
    x, xs, w, ws = operands(rows, 3, 24, 256)
    ends = ends_of([rows // 2, 0, rows - rows // 2])
    torch.library.opcheck(grouped_linear, (x, xs, w, ws, ends, *TILES, torch.bfloat16), test_utils=CHECKS_OF_FP8)
    x, xs = x.view(1, rows, 256).expand(3, rows, 256), xs.view(1, rows, 2).expand(3, rows, 2)
    arguments = (x, xs, w, ws, ends.clamp(max=rows), *TILES, torch.bfloat16, 2)
    torch.library.opcheck(masked, arguments, test_utils=CHECKS_OF_FP8)


def test_export_with_a_symbolic_number_of_rows() -> None:
    _, _, w, ws = operands(1, 3, 24, 128)

    class Experts(torch.nn.Module):
        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            q, s = torch.ops.qcompiler.quantize(x, [1, 128], E4M3, "deepseek", "col_major")
            result: Tensor = grouped_linear(q, s, w, ws, ends, *TILES, torch.bfloat16)
            return result

    rows = torch.export.Dim("rows", min=2, max=4096)
    example = (torch.randn(6, 128), ends_of([1, 2, 3]))
    exported = torch.export.export(Experts(), example, dynamic_shapes={"x": {0: rows}, "ends": None}).module()
    for counts in ([1, 2, 3], [0, 9, 0], [100, 1, 0]):
        x = torch.randn(sum(counts), 128)
        assert torch.equal(exported(x, ends_of(counts)), Experts()(x, ends_of(counts)))


TEXT = """
func @experts(%x: f32[s0, 256], %ends: i32[4]) -> (bf16[s0, 136]) where s0 in 0.. {{
  %w = core.param() {{name = "w"}} : f32[4, 136, 256]
  %x_q, %x_s = quant.quantize(%x) {{format = #fp8_tile}} : f8e4m3fn[s0, 256], f32[s0, 2]
  %w_q, %w_s = quant.quantize(%w) {{format = {format}}} : f8e4m3fn[4, 136, 256], f32[{scales}]
  %y = quant.grouped_linear(%x_q, %x_s, %w_q, %w_s, {ends}) {{out_dtype = bf16, w_format = {format}, x_format = #fp8_tile}} : bf16[s0, 136]
  return %y
}}
"""  # noqa: E501


def test_the_operation_in_the_graph_has_the_same_numbers() -> None:
    graph = Graph.parse(TEXT.format(format="#fp8_block", scales="4, 2, 2", ends="%ends"))
    graph.verify()
    assert str(Graph.parse(str(graph))) == str(graph)
    x, w, ends = torch.randn(7, 256), torch.randn(4, 136, 256), ends_of([3, 0, 2, 1])
    (got,) = interpret(graph, [x, ends], {"w": w})
    (x_q, x_s), (w_q, w_s) = numerics.quantize(x), numerics.quantize(w, numerics.format_of((128, 128)))
    want = meaning(x_q, x_s, w_q, w_s, ends)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ends": "%w_s"}, r"the offsets are f32\[4, 2, 2\], but the weights .* need i32\[4\]"),
        ({"format": "#format<f8e4m3fn, block = [-1, 128]>", "scales": "1, 2"}, "its scales would span groups"),
    ],
)
def test_the_verifier_names_what_does_not_fit(changes: dict[str, str], message: str) -> None:
    graph = Graph.parse(TEXT.format(**{"format": "#fp8_block", "scales": "4, 2, 2", "ends": "%ends", **changes}))
    with pytest.raises(VerifyError, match=message):
        graph.verify()


def test_errors_name_the_value() -> None:
    x, xs, w, ws = operands(4, 2, 16, 128)
    ends = ends_of([2, 2])
    with pytest.raises(QCompilerError, match=r"do not match: got x \[4, 128\] and w \[16, 128\]"):
        grouped_linear(x, xs, w[0], ws[0], ends, *TILES, torch.bfloat16)
    with pytest.raises(QCompilerError, match=r"got torch.int64 \[2\]; need torch.int32 \[2\]"):
        grouped_linear(x, xs, w, ws, ends.long(), *TILES, torch.bfloat16)
    with pytest.raises(QCompilerError, match="would span groups: got x_block"):
        grouped_linear(x, xs, w, ws, ends, [-1, -1], [128, 128], torch.bfloat16)
    with pytest.raises(CodegenError, match=r"masked grouped linear do not fit.*need x \[E, capacity, K\]"):
        masked(x, xs, w, ws, ends, *TILES, torch.bfloat16, None)
