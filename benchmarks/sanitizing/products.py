"""Families of GEMMs: every configuration that can be chosen, at sizes that no tile divides."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.sanitizing.place import TOLERANCE, Place, draw
from codegen.epilogues import handed_over
from codegen.operators.operator import OPERATORS
from codegen.targets.hopper import HOPPER
from codegen.templates.fused import FUSED_GEMM, FusedGemmConfig, FusedGemmProblem, FusedOperands
from codegen.templates.gemm import GEMM, GemmOperands, GemmProblem, Kind
from codegen.templates.grouped import GROUPED_GEMM, GroupedOperands, GroupedProblem
from qcompiler import numerics

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
TILE, BLOCK, TOKEN = [1, 128], [128, 128], [1, -1]
M, N, K = 130, 272, 400
DEEP = 2064
"""A depth at which K is split, and a team takes several turns."""

EPILOGUES = ("x0 + bf16(y0)", "x0 + bf16(y0 * 0.5)", "bf16(silu(bf16(y0))) * bf16(y1)")

CODES = 1e-2
"""Relative error of FP8 codes: sums in a different order move one code in a hundred to the next one."""

COUNTS = (0, 70, 1, 59)
"""Rows of each group."""


def quantized(
    rows: int, columns: int, block: list[int], dtype: torch.dtype = E4M3, layout: str = "row_major", seed: int = 0
) -> Any:
    """Codes and scales from the CPU."""
    return OPERATORS["quantize"].on_cpu(draw(rows, columns, seed=seed), block, dtype, "deepseek", layout)


def products(x_block: int, place: Place) -> Iterator[str]:
    """Scales inside the sum, one for `x_block` columns of the activation; the whole depth, and one that is split."""
    for m, k in ((M, K), (65, DEEP)):
        x, xs = quantized(m, k, [1, x_block], layout="col_major")
        w, ws = quantized(N, k, BLOCK)
        bias = draw(N, 1)[:, 0].contiguous()
        format = numerics.format_of((1, x_block))
        want = numerics.scaled_linear(x, xs, w, ws, bias, x_format=format, out_dtype=BF16)
        problem, family = GemmProblem(m, N, k, x_block=x_block), GEMM.family(HOPPER)
        for config in family.configs(problem):
            if family.why_not(config, problem) is None:
                out = torch.full((m, N), math.nan, dtype=BF16)
                place.close(place.launch(family, config, GemmOperands(x, w, out, xs, ws, bias, x_block)).out, want)
                yield f"{m} x {N} x {k}, x_block {x_block}: {config}"


def chosen_products(place: Place) -> Iterator[str]:
    """The operator: K that is split, and operands that the copy engine cannot address."""
    for m, n, k in ((1, N, DEEP), (17, N, DEEP), (64, N, DEEP), (33, N - 1, K - 1), (M, N - 1, K - 1)):
        x, xs = quantized(m, k, TILE, layout="col_major")
        place.compare("scaled_linear", x, xs, *quantized(n, k, BLOCK), None, TILE, BLOCK, BF16)
        yield f"{m} x {n} x {k}"


def row_products(kind: Kind, place: Place) -> Iterator[str]:
    """Scales at the end of the sum."""
    dtype = torch.int8 if kind == "rows_i8" else E4M3
    rows = numerics.format_of((1, -1), dtype)
    for m, k in ((M, K), (17, DEEP)):
        x, xs = quantized(m, k, TOKEN, dtype)
        w, ws = quantized(N, k, TOKEN, dtype)
        want = numerics.scaled_linear(x, xs, w, ws, x_format=rows, w_format=rows, out_dtype=BF16)
        problem, family = GemmProblem(m, N, k, kind=kind), GEMM.family(HOPPER)
        for config in family.configs(problem):
            if family.why_not(config, problem) is None:
                out = torch.full((m, N), math.nan, dtype=BF16)
                place.close(place.launch(family, config, GemmOperands(x, w, out, xs, ws, x_block=None)).out, want)
                yield f"{kind}, {m} x {N} x {k}: {config}"


def fused_products(place: Place) -> Iterator[str]:
    """The operator, which may use two kernels for such small problems, and each form of the single kernel."""
    one, half, two = (f"bf16({text})" for text in EPILOGUES)
    n, family = 512, FUSED_GEMM.family(HOPPER)
    for m in (M, 16):
        x, xs = quantized(m, K, TILE, layout="col_major")
        w, ws = quantized(n, K, BLOCK)
        for expression, parts in ((one, 1), (half, 1), (two, 2)):
            others = [draw(m, n)] if parts == 1 else []
            plain: dict[FusedGemmConfig, Tensor] = {}
            for quantize in ((), (TILE, E4M3, "deepseek", "row_major")):
                rest: Any = (None, others, expression, parts, TILE, BLOCK, *quantize)
                place.compare("fused_linear", x, xs, w, ws, *rest, tolerance=CODES if quantize else TOLERANCE)
                yield f"{expression}, quantized: {bool(quantize)}"
                want = OPERATORS["fused_linear"].on_cpu(x, xs, w, ws, *rest)
                handed = handed_over(expression)[0].itemsize
                problem = FusedGemmProblem(m, n // parts, K, parts, handed, others=len(others))
                for config in family.configs(problem):
                    if not isinstance(config, FusedGemmConfig) or family.why_not(config, problem) is not None:
                        continue
                    out, scale = torch.zeros_like(want[0]), torch.zeros_like(want[1]) if quantize else None
                    operands = FusedOperands(expression, GemmOperands(x, w, out, xs, ws), others, scale)
                    done = place.launch(family, config, operands)
                    if done.out_scale is None:
                        plain[config] = done.gemm.out
                        place.close(done.gemm.out, want[0])
                    else:
                        codes = numerics.quantize(plain[config], numerics.format_of(TILE, E4M3))
                        place.close(done.gemm.out, codes[0], 0.0)
                        place.close(done.out_scale, codes[1], 0.0)
                    yield f"{config}: {expression}, quantized: {bool(quantize)}"
    x, xs = quantized(33, K - 1, TILE)
    w, ws = quantized(N, K - 1, BLOCK)
    for expression, others in ((one, [draw(33, N)]), ("bf16(silu(bf16(y0)))", [])):
        place.compare("fused_linear", x, xs, w, ws, None, others, expression, 1, TILE, BLOCK)
        yield f"{expression} in a kernel of its own"


def grouped_products(place: Place) -> Iterator[str]:
    """Contiguous groups in every configuration, and the operators, with empty groups."""
    counts = torch.tensor(COUNTS, dtype=torch.int32)
    offsets = counts.cumsum(0).to(torch.int32)
    x, xs = quantized(M, K, TILE, layout="col_major")
    w, ws = stacked([quantized(N, K, BLOCK, seed=seed) for seed in range(len(COUNTS))])
    rest: Any = (TILE, BLOCK, BF16)
    want = OPERATORS["grouped_linear"].on_cpu(x, xs, w, ws, offsets, *rest)
    place.compare("grouped_linear", x, xs, w, ws, offsets, *rest)
    yield "contiguous groups"
    family, problem = GROUPED_GEMM.family(HOPPER), GroupedProblem(M / len(COUNTS), len(COUNTS))
    for config in family.configs(problem):
        if family.why_not(config, problem) is not None:
            continue
        out = torch.full((M, N), math.nan, dtype=BF16)
        place.close(place.launch(family, config, GroupedOperands(x, w, out, xs, ws, offsets)).out, want)
        yield f"{config}"
    x, xs = stacked([quantized(max(COUNTS), K, TILE, seed=seed) for seed in range(len(COUNTS))])
    got, want = (
        each("grouped_linear_masked", x, xs, w, ws, counts, *rest)
        for each in (place.run, lambda name, *given: OPERATORS[name].on_cpu(*given))
    )
    for index, count in enumerate(COUNTS):
        if count:
            place.close(got[index, :count], want[index, :count])
    yield "masked groups"


def stacked(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Codes and scales of several matrices."""
    codes = torch.stack([each.view(torch.uint8) for each, _ in pairs]).view(pairs[0][0].dtype)
    return codes, torch.stack([scale for _, scale in pairs])
