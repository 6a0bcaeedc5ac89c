"""Families of kernels over rows: quantization, fused expressions, gathers of codes, groups of entries, tokens."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.sanitizing.place import Place, draw
from codegen.operators.operator import OPERATORS
from qcompiler import numerics

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
TILE, BLOCK, TOKEN, TENSOR = [1, 128], [128, 128], [1, -1], [-1, -1]

NORM = "h = bf16(x0 + x1); n = bf16(h * rsqrt(mean(h * h) + 1e-06)); bf16(x2 * n)"
ROTARY = (
    "bf16(bf16(x0[i0, i2, 64*i1 + i3] * x1[i0, i2, i3])"
    " + bf16(where(i3 < 32, bf16(neg(x0[i0, i2, 64*i1 + i3 + 32])), x0[i0, i2, 64*i1 + i3 - 32]) * x2[i0, i2, i3]))"
)
"""Rotated heads of 64 columns from the first columns of a merged GEMM."""

FUNCTIONS = (
    "gelu(x0[i0, i1])", "gelu_tanh(x0[i0, i1])", "silu(x0[i0, i1])", "sigmoid(x0[i0, i1])", "tanh(x0[i0, i1])",
    "cos(x0[i0, i1])", "sin(x0[i0, i1])", "exp(at_most(x0[i0, i1], 3.0))", "sqrt(relu(x0[i0, i1]))",
    "rsqrt(at_least(x0[i0, i1], 0.5))", "neg(f32(x0[i0, i1]))",
)  # fmt: skip


def quantizations(dtype: torch.dtype, place: Place) -> Iterator[str]:
    """Scales computed from the tensor."""
    for shape in ((130, 400), (3, 5, 1000), (600, 272)):
        x = draw(*shape)
        for block, layout in ((TILE, "row_major"), (TILE, "col_major"), ([1, 32], "col_major"), (TOKEN, "row_major"),
                              (TENSOR, "row_major")):  # fmt: skip
            for prescale in (None, draw(1, shape[-1])[0].float()):
                place.compare("quantize", x, block, dtype, "deepseek", layout, prescale)
                yield f"quantize {list(shape)}, {block}, {dtype}"


def known_scales(place: Place) -> Iterator[str]:
    """Scales that are given."""
    for shape in ((130, 400), (3, 5, 1000), (600, 272)):
        x = draw(*shape)
        for block in (TENSOR, TOKEN, TILE):
            scale = torch.rand(numerics.scale_shape(x.shape, block)) * 0.02 + 0.01
            for dtype, prescale in ((E4M3, None), (torch.int8, draw(1, shape[-1])[0].float())):
                place.compare("quantize_static", x, scale, block, dtype, "deepseek", prescale)
                yield f"quantize_static {list(shape)}, {block}, {dtype}"


def fused_quantizations(place: Place) -> Iterator[str]:
    """Fused expressions before a quantization."""
    for m, k in ((130, 400), (3, 1000)):
        x, r, gain = draw(m, k), draw(m, k, seed=1), draw(1, k)[0]
        gated: tuple[Any, ...] = ("bf16(silu(x0) * x1)", [], [x, r])
        for expression, keep, operands in ((NORM, ["h"], [x, r, gain]), gated):
            for block, layout in ((TILE, "col_major"), (TOKEN, "row_major")):
                place.compare("fused_quantize", operands, expression, keep, block, E4M3, "deepseek", layout)
                yield f"{expression}, {block}"
        codes, scales = numerics.quantize(torch.stack([x, r]).float())
        for expression, operands in (("h = bf16(x0 + bf16(y0)); h * rsqrt(mean(h * h)) * x1", [x, gain]), ("y0", [])):
            rest: Any = ([], TILE, TILE, E4M3, "deepseek", "col_major")
            place.compare("fused_sum_quantize", codes, scales, operands, expression, *rest)
            yield f"{expression}, sum of terms"


def pointwise(place: Place) -> Iterator[str]:
    """Generated kernels: moves, reductions of rows, integers in indices, every function."""
    for batch, tokens in ((1, 1), (3, 77)):
        qkv, cos, sin = draw(batch, tokens, 520), draw(batch, tokens, 64), draw(batch, tokens, 64, seed=1)
        for each in (qkv[..., :384], qkv[..., 3:387]):  # the second is not aligned
            shapes = ["x0.0, 4, x0.1, 64", "x0.0, 2, x0.1, 64"]
            keys = ROTARY.replace("64*i1 + i3", "64*i1 + i3 + 256")
            place.compare("pointwise", [each, cos, sin], [ROTARY, keys], shapes)
            yield f"rotary, {batch} x {tokens}"
        ids, lengths = torch.randint(300, (batch, tokens)), torch.randint(90, (batch,))
        texts = ["bf16(x0[x1(i0, i1), i2])", "number(i1 + x3(i0)) * x2[i2]"]
        operands = [draw(300, 1096), ids, draw(1, 64, dtype=torch.float32)[0], lengths]
        place.compare("pointwise", operands, texts, ["x1.0, x1.1, 1096", "x1.0, x1.1, 64"])
        yield f"rows of a table, {batch} x {tokens}"
    for columns in (72, 1000):
        mean = "t0 = mean(x0[i0, i1] * x0[i0, i1]); bf16(x1[i1] * bf16(x0[i0, i1] * rsqrt(t0 + 1e-06)))"
        for text in (mean, "bf16(standardize(x0[i0, i1], 1e-05) * x1[i1])"):
            place.compare("pointwise", [draw(37, columns), draw(1, columns)[0]], [text], [f"x0.0, {columns}"])
            yield f"norm of {columns}"
    summed = "bf16(x0[x2(2*i0), i1] * x1[i0, 0] + x0[x2(2*i0 + 1), i1] * x1[i0, 1])"
    operands = [draw(74, 1000), draw(37, 2, dtype=torch.float32), torch.randperm(74)]
    place.compare("pointwise", operands, [summed], ["x1.0, 1000"])
    yield "sum over experts"
    place.compare("pointwise", [draw(37, 65)], [f"f16({text})" for text in FUNCTIONS], ["x0.0, 65"] * len(FUNCTIONS))
    yield "functions"
    joined = "where(i1 < 64, x0[i0, i1] / 3.0, f16(relu(x1[i1 - 64, mod(i0, 33)])))"
    place.compare("pointwise", [draw(37, 64), draw(64, 33, dtype=torch.float16)], [joined], ["x0.0, 128"])
    yield "two operands side by side"


def gathered_codes(place: Place) -> Iterator[str]:
    """Rows of codes and scales."""
    for tokens, rows, k, block_k in ((1, 1, 128, 128), (77, 301, 336, 128), (5, 9, 100, 32), (6, 9, 64, -1)):
        data = draw(tokens, k).to(E4M3)
        scale = torch.rand(numerics.scale_shape(data.shape, [1, block_k]))
        for layout, kind in (("col_major", torch.int64), ("row_major", torch.int32)):
            index = torch.randint(-tokens, tokens, (rows,)).to(kind)
            place.compare("gather_codes", data, scale, index, [1, block_k], layout)
            yield f"{rows} of {tokens} rows, {layout}"


def grouped_entries(place: Place) -> Iterator[str]:
    """Entries in one tile, and in several, which are counted first."""
    for entries in (1, 1000, 1025, 9000):
        for groups, each in ((1, 1), (8, 2), (100, 8)):
            place.compare("group_entries", torch.randint(groups, (entries,)), groups, each)
            yield f"{entries} entries, {groups} groups"


def tokens(place: Place) -> Iterator[str]:
    """The end of a decode step: one rank's logits, and candidates of several."""
    ranks = [partial(_largest, OPERATORS["rank_parts"].on_gpu), partial(_largest, OPERATORS["rank_parts"].on_cpu)]
    for rows, columns, dtype in ((5, 1000, BF16), (3, 40001, torch.float32)):
        slots = torch.randperm(rows + 2)[:rows].contiguous()
        active = (torch.arange(rows + 2) % 2).contiguous()
        latest, lengths = torch.arange(rows + 2), torch.arange(rows + 2) * 3
        logits = draw(rows, columns, dtype=torch.float32).to(dtype)
        place.compare_calls(*ranks, logits, 3 * columns)
        parts = torch.randint(2**40, (20, rows))
        place.compare("enter_tokens", parts, slots, active, latest, lengths, latest[slots], lengths[slots])
        yield f"{rows} x {columns}"


def _largest(rank_parts: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """The largest logit of each row: how many parts a row has depends on the device."""
    return rank_parts(*arguments).amax(0)
