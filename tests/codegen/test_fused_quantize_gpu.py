"""Fused quantization on a Hopper GPU: values match torch; codes and scales match `numerics` bit for bit."""

import math
from collections.abc import Sequence

import pytest
import torch
import triton
import triton.language as tl
from gpu_checks import assert_same_codes
from torch import Tensor

from codegen.fused_expressions import triton_function
from codegen.kernels.encoding import reciprocal_of, scale_of
from codegen.kernels.fused_quantize import fused_quantize as kernel
from codegen.operators.fused_quantize import why_not_fused
from codegen.operators.quantize import SCALE_LAYOUTS
from qcompiler import numerics
from qcompiler.dialects.fused_expression import parse
from qcompiler.dialects.terms import sum_terms

pytestmark = pytest.mark.gpu

E4M3, E5M2, I8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ROWS = (0, 1, 2, 3, 15, 63, 65, 129, 4095)

EXACT = {
    "sum": ("r = bf16(x0 + x1); r", ()),
    "sum and product": ("h = bf16(x0 * x1 + x2); r = h * x3 - x0; r", (3,)),
    "quotient": ("h = f16(1 / (x0 * x0 + 2)); r = f16(h / 3); r", ()),
    "roots": ("r = sqrt(x0 * x0 + 1) * sqrt(x1 * x1); r", ()),
    "far from zero": ("r = bf16(relu(2 - x0) + 3); r", ()),
    "prescaled": ("h = bf16(x0 + x1); r = neg(h) * x2; r", (2,)),
}
"""Pure arithmetic, so values match torch bit for bit; and which operands are vectors."""

CLOSE = {
    "norm": ("n = rsqrt(mean(x0 * x0) + 1e-06); r = bf16(x1 * bf16(x0 * n)); r", (1,)),
    "sum, norm": ("h = bf16(x0 + x1); n = rsqrt(mean(h * h) + 1e-06); r = bf16(x2 * bf16(h * n)); r", (2,)),
    "layer norm": ("r = bf16(standardize(x0, 1e-05) * x1 + x2); r", (1, 2)),
    "prescaled norm": ("n = rsqrt(mean(x0 * x0) + 1e-06); r = bf16(bf16(x0 * n) * x1) * x2; r", (1, 2)),
    "swiglu": ("r = bf16(bf16(silu(x0)) * x1); r", ()),
    "geglu": ("r = bf16(bf16(gelu(x0)) * x1); r", ()),
    "tanh": ("r = bf16(bf16(gelu_tanh(x0)) + tanh(x1)); r", ()),
    "roots": ("r = bf16(rsqrt(x0 * x0 + 0.5) - x1); r", ()),
    "exponentials": ("r = bf16(exp(x0) * sigmoid(x1)); r", ()),
}
"""Sums in a different order, or functions with their own error."""


def fused(
    operands: Sequence[Tensor], expression: str, layout: str = "row_major", profile: str = "deepseek",
    dtype: torch.dtype = E4M3, block: Sequence[int] = (1, 128), keep: Sequence[str] = ("r",),
) -> list[Tensor]:  # fmt: skip
    assert why_not_fused(operands, parse(expression), keep, block) is None
    result: list[Tensor] = torch.ops.qcompiler.fused_quantize(
        operands, expression, list(keep), list(block), dtype, profile, layout
    )
    return result


def operands_of(
    expression: str, vectors: Sequence[int], rows: int, columns: int, dtypes: Sequence[torch.dtype] = (B16,)
) -> list[Tensor]:
    seed = torch.Generator().manual_seed(rows + columns)
    return [
        torch.randn((columns,) if place in vectors else (rows, columns), generator=seed)
        .mul(1.0 + place)
        .to(dtypes[place % len(dtypes)])
        for place in range(len(parse(expression).operands))
    ]


def reference(
    expression: str, operands: Sequence[Tensor], keep: Sequence[str] = ("r",), device: str = "cpu"
) -> list[Tensor]:
    return list(parse(expression).run({f"x{place}": x.to(device) for place, x in enumerate(operands)}, keep)[1:])


def assert_quantized(q: Tensor, scale: Tensor, result: Tensor, block: Sequence[int], profile: str) -> None:
    """Checks that the codes and scales are the quantization of exactly the values that the kernel returned."""
    want_q, want_scale = numerics.quantize(result.cpu(), numerics.format_of(block, q.dtype, profile))
    torch.testing.assert_close(scale.cpu(), want_scale, rtol=0, atol=0, equal_nan=True)
    assert_same_codes(q, want_q)


def assert_close(got: Tensor, want: Tensor) -> None:
    """Nearly all values are equal; the others differ by the effect of one bfloat16 ulp in an intermediate value."""
    assert got.shape == want.shape and got.dtype == want.dtype
    ours, theirs = got.cpu().float(), want.float()
    assert torch.equal(ours.isnan(), theirs.isnan())
    both = torch.stack([ours, theirs]).nan_to_num(0.0)
    assert bool(((both[0] - both[1]).abs() <= 2.0**-6 * both[1].abs() + 1e-5).all())
    assert float((both[0] == both[1]).float().mean()) > (0.995 if want.dtype == B16 else 0.05)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtypes", [(B16,), (F32, B16, F16), (F16, F32)])
def test_arithmetic_matches_torch_bit_for_bit(name: str, dtypes: Sequence[torch.dtype]) -> None:
    expression, vectors = EXACT[name]
    for rows, columns in ((37, 384), (3, 77), (700, 1000)):
        operands = operands_of(expression, vectors, rows, columns, dtypes)
        q, scale, kept = fused([x.cuda() for x in operands], expression)
        # On the GPU, because some of torch's square roots on a CPU are off by an ulp.
        assert torch.equal(kept, reference(expression, operands, device="cuda")[0])
        assert_quantized(q, scale, kept, (1, 128), "deepseek")


@pytest.mark.parametrize("name", CLOSE)
@pytest.mark.parametrize("dtypes", [(B16,), (B16, F32)])
def test_reductions_and_functions_are_within_a_rounding(name: str, dtypes: Sequence[torch.dtype]) -> None:
    expression, vectors = CLOSE[name]
    for rows, columns in ((37, 384), (3, 77), (700, 1000), (5, 7168), (2, 16384), (600, 4096)):
        operands = operands_of(expression, vectors, rows, columns, dtypes)
        q, scale, kept = fused([x.cuda() for x in operands], expression, "col_major")
        assert_close(kept, reference(expression, operands)[0])
        assert_quantized(q, scale, kept, (1, 128), "deepseek")


SUMS = {
    "residual": "r = bf16(x0 + bf16(y0)); r * x1",
    "residual, norm": "h = bf16(x0 + bf16(y0)); r = h * rsqrt(mean(h * h)); r * x1",
}
"""Expressions of a sum of terms; only the first has exact values."""


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("dtype", [E4M3, E5M2, I8])
@pytest.mark.parametrize(("terms", "group"), [(1, 128), (2, 128), (4, 32), (8, 128), (3, numerics.ALL)])
def test_sums_of_terms(name: str, dtype: torch.dtype, terms: int, group: int) -> None:
    """The sum has the bits of its definition; codes and scales are the quantization of what the kernel returns."""
    expression, format = SUMS[name], numerics.format_of((1, group), dtype)
    for rows, columns in ((0, 256), (1, 256), (37, 384), (3, 77), (700, 1000), (5, 8192), (600, 4096)):
        codes, scales = numerics.quantize(torch.randn(terms, rows, columns), format)
        x, gain = torch.randn(rows, columns).bfloat16(), torch.randn(columns).bfloat16()
        total = sum_terms(codes, scales, format=format, out_dtype=F32)
        want = parse(expression).run({"y0": total, "x0": x, "x1": gain}, ["r"])[1]
        codes, scales, x, gain = (each.cuda() for each in (codes, scales, x, gain))
        rest = (["r"], [1, group], [1, 128], E4M3, "deepseek", "col_major")
        for _ in range(3):  # the third call is replayed
            q, scale, kept = torch.ops.qcompiler.fused_sum_quantize(codes, scales, [x, gain], expression, *rest)
            exact = name == "residual"
            torch.testing.assert_close(kept.cpu(), want, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
            assert_quantized(q, scale, kept.float() * gain.float(), (1, 128), "deepseek")


@pytest.mark.parametrize("profile", sorted(numerics.PROFILES))
@pytest.mark.parametrize("dtype", [E4M3, E5M2, I8])
@pytest.mark.parametrize("block_k", [32, 128, 512, numerics.ALL])
def test_profiles_formats_and_blocks(profile: str, dtype: torch.dtype, block_k: int) -> None:
    for at, (rows, columns) in enumerate(((5, 1056), (513, 320), (2, 4000))):
        for expression, vectors in (EXACT["far from zero"], CLOSE["sum, norm"], CLOSE["prescaled norm"]):
            operands = [x.cuda() for x in operands_of(expression, vectors, rows, columns)]
            block, layout = (1, block_k), SCALE_LAYOUTS[at % 2]
            q, scale, kept = fused(operands, expression, layout, profile, dtype, block)
            assert_quantized(q, scale, kept, block, profile)


def test_nonfinite_values() -> None:
    kinds = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-44, 3e38, 88.0, -88.0, -104.0, 1.0625)
    x = torch.tensor(kinds).repeat(20, 32)
    x[3:] *= torch.randn(17, 384)
    x[10:] = x[10:].nan_to_num(nan=0.5, posinf=3.0, neginf=-3.0).clamp(-1e18, 1e18)  # these tiles have finite scales
    for expression in (
        "r = x0; r",
        "r = silu(x0); r",
        "r = gelu_tanh(x0); r",
        "r = gelu_tanh(x0 * x0); r",
        "r = gelu(x0 * x0); r",
        "r = relu(x0) * x0; r",
        "r = at_most(at_least(x0, -0.5), 0.75) * x0; r",
        "r = x0 / (1 + x0); r",
        "r = exp(x0); r",
    ):
        q, scale, kept = fused([x.cuda()], expression, profile="deepgemm")
        # On the GPU, because torch's GELU of infinity is NaN on some CPUs.
        want = reference(expression, [x], device="cuda")[0].cpu()
        assert torch.equal(kept.cpu().isnan(), want.isnan()), expression
        assert torch.equal(kept.cpu().isinf(), want.isinf()), expression
        assert torch.allclose(
            kept.cpu(), want, rtol=1e-5, atol=2e-7 if "gelu" in expression else 1e-35, equal_nan=True
        ), expression
        assert_quantized(q, scale, kept, (1, 128), "deepgemm")
        q, scale, kept = fused([x.cuda()], expression, dtype=I8)
        assert_quantized(q, scale, kept, (1, 128), "deepseek")
    q, scale, kept = fused([x.cuda()], "r = x0 * rsqrt(mean(x0 * x0) + 1e-06); r")
    assert kept[:10].isnan().all() and q[:10].float().isnan().all() and scale[:10].isnan().all()
    assert kept[10:].isfinite().all() and scale[10:].isfinite().all()


@triton.jit  # type: ignore[untyped-decorator]
def divisions(starts, differences, TOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Counts kernel scales and reciprocals that are not correctly rounded."""
    bits = tl.load(starts + tl.program_id(0)) + tl.program_id(1) * 1024 + tl.arange(0, 1024)
    value = bits.to(tl.float32, bitcast=True)
    scales = tl.sum((scale_of(value, 1e-37, TOP, False) != tl.div_rn(value, TOP)).to(tl.int32), axis=0)
    tl.atomic_add(differences, scales)
    tl.atomic_add(differences + 1, tl.sum((reciprocal_of(value) != tl.div_rn(1.0, value)).to(tl.int32), axis=0))


@pytest.mark.parametrize("top", sorted(numerics.FORMAT_MAX.values()))
def test_scales_and_reciprocals_are_correctly_rounded(top: float) -> None:
    # Every significand at some exponents: both are computed without a division.
    exponents = torch.tensor([127 - 100, 127 - 60, 127 - 13, 126, 127, 128, 127 + 100, 127 + 120], device="cuda")
    differences = torch.zeros(2, dtype=torch.int32, device="cuda")
    divisions[(len(exponents), 2**23 // 1024)]((exponents * 2**23).int(), differences, TOP=top)
    assert differences.tolist() == [0, 0]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_any_number_of_rows(rows: int, layout: str) -> None:
    for expression, vectors in (EXACT["sum"], CLOSE["norm"]):
        operands = operands_of(expression, vectors, rows, 512)
        q, scale, kept = fused([x.cuda() for x in operands], expression, layout)
        assert q.shape == (rows, 512) and scale.shape == (rows, 4)
        assert rows == 0 or (scale.stride() == ((4, 1) if layout == "row_major" else (1, (rows + 3) // 4 * 4)))
        assert_quantized(q, scale, kept, (1, 128), "deepseek")
        assert rows == 0 or bool((kept.cpu() == reference(expression, operands)[0]).float().mean() > 0.995)


def test_slices_views_and_batches() -> None:
    whole = torch.randn(6, 50, 1024, dtype=B16, device="cuda")
    wide = torch.randn(96, 1536, dtype=B16, device="cuda")
    pairs = [
        (whole[..., :512], whole[..., 512:]),
        (wide[:, 3:515], wide[:, 1000:1512]),
        (wide[::3, ::2], wide[1::3, ::2]),
        (wide.T, wide.T),
        (whole.transpose(0, 1), whole.transpose(0, 1)),
        (whole[0, :1].expand(7, 1024), whole[0, :7]),
        (wide[0], wide[1]),
        (wide[:0], wide[:0]),
        (wide[:, :0], wide[:, :0]),
        (torch.randn(2, 3, 5, 256, dtype=B16, device="cuda"),) * 2,
    ]
    for pair in pairs:
        for layout in SCALE_LAYOUTS:
            q, scale, kept = fused(pair, "r = bf16(x0 - 2 * x1); r", layout)
            assert q.is_contiguous() and q.shape == pair[0].shape and kept.is_contiguous()
            assert torch.equal(kept.cpu(), reference("r = bf16(x0 - 2 * x1); r", pair)[0])
            assert_quantized(q, scale, kept, (1, 128), "deepseek")


def test_six_operands_and_two_residual_outputs() -> None:
    expression = "h = bf16(x0 + x1); g = h * x2 - x3; bf16(standardize(g, 1e-05) * x4) * x5"
    operands = operands_of(expression, (4, 5), 70, 600, (B16, F32, F16))
    q, scale, h, g = fused([x.cuda() for x in operands], expression, keep=("h", "g"))
    want_h, want_g = reference(expression, operands, ("h", "g"))
    assert torch.equal(h.cpu(), want_h) and torch.equal(g.cpu(), want_g)
    result = parse(expression).run({f"x{place}": x for place, x in enumerate(operands)})[0]
    _, want_scale = numerics.quantize(result)
    assert torch.allclose(scale.cpu(), want_scale, rtol=1e-2)
    assert torch.allclose(numerics.dequantize(q.cpu(), scale.cpu()), result, rtol=0.07, atol=0.05)


def test_problems_that_the_kernel_refuses_are_still_computed() -> None:
    def check(operands: list[Tensor], expression: str, block: list[int], keep: Sequence[str] = ("r",)) -> None:
        assert why_not_fused(operands, parse(expression), keep, block) is not None
        q, scale, *kept = torch.ops.qcompiler.fused_quantize(
            operands, expression, keep, block, E4M3, "deepseek", "row_major"
        )
        for got, want in zip(kept, reference(expression, operands, keep), strict=True):
            assert torch.allclose(got.cpu().float(), want.float(), rtol=1e-2, atol=1e-2)
        assert_quantized(q, scale, kept[-1], block, "deepseek")

    x = torch.randn(20, 256, dtype=B16, device="cuda")
    check([x] * 7, "r = x0 + x1 + x2 + x3 + x4 + x5 + x6; r", [1, 128])
    check([x], "a = 2 * x0; b = 3 * x0; r = 4 * x0; r", [1, 128], ("a", "b", "r"))
    check([x], "r = bf16(x0 * x0); r", [-1, -1])
    check([x], "r = bf16(x0 * x0); r", [128, 128])
    check([torch.randn(3, 20000, device="cuda")], "r = bf16(x0 - mean(x0)); r", [1, 128])
    check([torch.randn(3, 20000, device="cuda")], "r = bf16(x0 * x0); r", [1, -1])
    check([x.double()], "r = bf16(x0 * x0); r", [1, 128])


def test_offsets_beyond_32_bits() -> None:
    rows, columns = 2**19 + 3, 4096 + 128
    x = torch.randn(64, columns, dtype=B16, device="cuda").repeat(rows // 64 + 1, 1)[:rows]
    assert x.numel() > 2**31
    for expression in ("r = bf16(x0 * 2 - x1); r", "n = rsqrt(mean(x0 * x0) + 1e-06); r = bf16(x0 * n * x1); r"):
        q, scale, kept = fused([x, x[0]], expression, "col_major")
        assert_quantized(q[-67:], scale[-67:], kept[-67:], (1, 128), "deepseek")
        assert_close(kept[-67:], reference(expression, [x[-67:], x[0]])[0])
        del q, scale, kept


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch uses its own deprecated functions
def test_cuda_graph_capture_and_repeatable_results() -> None:
    expression, vectors = CLOSE["sum, norm"]
    operands = [x.cuda() for x in operands_of(expression, vectors, 64, 1024)]
    first = fused(operands, expression)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused(operands, expression)
    operands[0].normal_()
    graph.replay()
    again = fused(operands, expression)
    for got, want, old in zip(captured, again, first, strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
        assert not torch.equal(got.view(torch.uint8), old.view(torch.uint8))


def test_a_new_number_of_rows_compiles_nothing() -> None:
    expression, vectors = CLOSE["norm"]
    assert triton_function(expression, ("r",)) is not None
    counts = []
    for rows in (600, 601, 608, 640, 1000):
        for layout in SCALE_LAYOUTS:
            fused([x.cuda() for x in operands_of(expression, vectors, rows, 384)], expression, layout)
        counts.append(len(kernel.device_caches[torch.cuda.current_device()][0]))
    assert len(set(counts)) == 1, counts
