"""Fused quantization in Triton's interpreter on a CPU: indexing, masks, reductions, scales and INT8 codes.

The interpreter is chosen when Triton is imported, so all cases run in a separate process. It has no exponential
functions and rounds to FP8 and bfloat16 incorrectly; so expressions round to float16 here, and codes are INT8.
"""

import math

import pytest
from triton_interpreter import needs_interpreter, prepare_interpreter, run_interpreted

SUM = "r = f16(x0 + x1); r"
GATED = "g = f16(x0 / (1 + x1 * x1)); r = g * x2 - 1; r"
NORM = "h = f16(x0 + x1); n = rsqrt(mean(h * h) + 1e-06); r = f16(x2 * f16(h * n)); r"
LAYER_NORM = "r = standardize(x0, 1e-05) * x1 + 0.5; r"
FAR = "r = relu(1 - x0) + 3; r"  # zeros beyond the last column become 4


def _case(
    expression: str, vectors: tuple[int, ...], m: int, k: int, block_k: int, layout: str, spare: int = 0,
    odd: float = 0.0, terms: int = 0, group: int = 128,
) -> None:  # fmt: skip
    made = parse(expression)
    operands = []
    for place in range(len(made.operands) - (terms > 0)):
        dtype = (torch.float32, torch.float16)[place % 2]
        shape = (k,) if place in vectors else (m, k + spare)
        operands.append(torch.randn(shape).mul(1 + place).to(dtype)[..., :k])
    operands[0][m // 2, k - 1] = odd
    keep = tuple(name for name in ("h", "r") if name in dict(made.definitions))
    kept = [torch.full((m + 1, k), 7.0, dtype=made.dtype(name)) for name in keep]
    q = torch.full((m + 1, k), 7, dtype=torch.int8)
    scale = quantization.scale_like(operands[0], block_k, layout).fill_(-1.0)
    added = sums = None
    if terms:
        codes, scales = torch.randint(-127, 128, (terms, m, k)).to(torch.int8), torch.rand(terms, m, -(-k // group))
        added, format = Terms(codes, scales, group), numerics.format_of((1, group), torch.int8)
        sums = sum_terms(codes, scales, format=format, out_dtype=torch.float32)
    problem = FusedQuantizeProblem(m, k, (1, block_k), made.across, len(operands), 4, len(keep))
    tile = FUSED_QUANTIZE.family(HOPPER).choose(problem)
    given = FusedQuantizeOperands(expression, keep, operands, [each[:m] for each in kept], q[:m], scale, terms=added)
    FUSED_QUANTIZE.family(HOPPER).launch(tile, given)
    named = {f"x{place}": x for place, x in enumerate(operands)} | ({} if sums is None else {"y0": sums})
    want, *wanted = made.run(named, keep)
    label = (expression, m, k, block_k, layout, tile)
    for got, each in zip(kept, wanted, strict=True):
        assert bool((got[m:] == 7.0).all()), (label, "wrote beyond the last row")
        tolerance = (2e-3, 1e-3) if made.across and each.dtype == torch.float16 else (1e-5, 1e-5)
        rtol, atol = tolerance if made.across else (0, 0)
        assert torch.allclose(got[:m].float(), each.float(), rtol, atol, equal_nan=True), label
    result = kept[-1][:m] if keep and keep[-1] == "r" else want
    want_q, want_scale = numerics.quantize(result, numerics.format_of((1, block_k), torch.int8, "deepseek"))
    assert torch.allclose(scale, want_scale, rtol=0, atol=0, equal_nan=True), label
    assert want_scale.isnan().any(1).nonzero().flatten().tolist() == ([] if math.isfinite(odd) else [m // 2]), label
    assert torch.equal(q[:m], want_q), label
    assert bool((q[m:] == 7).all()), (label, "wrote beyond the last row")


def _run_all() -> None:
    for m, k, group in ((1, 128, 128), (5, 300, 128), (3, 300, 32), (2, 77, 512), (515, 24, 128), (4, 1100, 512)):
        _case("r = y0 - x0; r", (), m, k, 128, "row_major", terms=3, group=group)
        _case("h = f16(x0 + f16(y0)); r = f16(h * rsqrt(mean(h * h) + 1e-06)); r", (), m, k, 128, "col_major",
              terms=2, group=group)  # fmt: skip
    _case("r = relu(y0 - x0); r", (), 3, 5000, 32, "row_major", terms=1, group=128)
    for layout in quantization.SCALE_LAYOUTS:
        for m, k in ((1, 128), (5, 300), (3, 16), (2, 77), (15, 24)):
            _case(SUM, (), m, k, 128, layout)
            _case(FAR, (), m, k, 32, layout)
            _case(NORM, (2,), m, k, 128, layout)
        _case(NORM, (2,), 515, 24, 128, layout)  # more than 512: a program holds several rows
        _case(GATED, (2,), 5, 300, 64, layout, spare=21)
        _case(LAYER_NORM, (1,), 4, 1000, 256, layout, spare=3)
    for block_k in (-1, 32, 512):
        _case(NORM, (), 3, 300, block_k, "row_major")
        _case(FAR, (), 3, 300, block_k, "row_major")
        _case(LAYER_NORM, (), 513, 33, block_k, "row_major")
        _case(SUM, (1,), 1, 300, block_k, "row_major")
    _case(SUM, (1,), 2, 5000, 128, "col_major")
    _case(NORM, (2,), 2, 5000, 128, "col_major")
    _case("m = mean(x0); r = (x0 - m) * mean(m) + x1; r", (1,), 3, 100, 32, "row_major")
    for odd in (math.nan, math.inf, -math.inf):
        _case(SUM, (), 5, 300, 64, "row_major", odd=odd)
        _case(NORM, (2,), 3, 300, 128, "col_major", odd=odd)
        _case(GATED, (), 3, 77, -1, "row_major", odd=odd)
    print("all cases ran")


@needs_interpreter
@pytest.mark.timeout(240)
def test_the_kernel_under_the_interpreter() -> None:
    run_interpreted(__file__)


if __name__ == "__main__":
    import torch

    from codegen.operators import quantize as quantization
    from codegen.targets.hopper import HOPPER
    from codegen.templates.fused_quantize import FUSED_QUANTIZE, FusedQuantizeOperands, FusedQuantizeProblem, Terms
    from qcompiler import numerics
    from qcompiler.dialects.fused_expression import parse
    from qcompiler.dialects.terms import sum_terms

    prepare_interpreter()
    torch.manual_seed(0)
    _run_all()
