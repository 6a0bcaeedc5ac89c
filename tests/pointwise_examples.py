"""Fused expressions of rotary embeddings, and pointwise kernels compiled for Hopper without a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codegen.machine_code import MachineCode
from codegen.targets.hopper import HOPPER
from codegen.templates.pointwise import POINTWISE, Appended, PointwiseOperands, PointwiseProblem

ROTARY = (
    "bf16(bf16(x0[i0, i2, 64*i1 + i3] * x1[i0, i2, i3])"
    " + bf16(where(i3 < 32, bf16(neg(x0[i0, i2, 64*i1 + i3 + 32])), x0[i0, i2, 64*i1 + i3 - 32]) * x2[i0, i2, i3]))"
)
"""Four heads of 64 columns, from the first columns of a merged matmul."""

KEYS = ROTARY.replace("64*i1 + i3", "64*i1 + i3 + 256")
"""Two heads, from the columns after those."""

SHAPES = ("x0.0, 4, x0.1, 64", "x0.0, 2, x0.1, 64")


def meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def compile_pointwise(
    expressions: tuple[str, ...], shapes: tuple[str, ...], operands: Sequence[Tensor], out: Sequence[Tensor],
    cache: Appended | None = None,
) -> MachineCode:  # fmt: skip
    """With a cache, `out` has the results after the first two."""
    family = POINTWISE.family(HOPPER)
    config = family.choose(PointwiseProblem(sum(each.numel() for each in out), len(operands)))
    (call,) = family.calls(config, PointwiseOperands(expressions, shapes, operands, out, cache))
    return HOPPER.compile(call)


def compile_rotary(tokens: int = 4096) -> MachineCode:
    operands = [meta(1, tokens, 512)[..., :384], meta(1, tokens, 64), meta(1, tokens, 64)]
    return compile_pointwise((ROTARY, KEYS), SHAPES, operands, [meta(1, 4, tokens, 64), meta(1, 2, tokens, 64)])


def compile_rotary_append(
    dtype: torch.dtype = torch.float8_e4m3fn, tokens: int = 1, *, capacity: int | None = None
) -> MachineCode:
    """The cache holds 1024 positions; with a capacity, it is a ring."""
    operands = [meta(16, tokens, 384), meta(16, tokens, 64), meta(16, tokens, 64), meta(16, 2, tokens, 64)]
    scale = None if dtype == torch.bfloat16 else meta(16, 2, 1024, dtype=torch.float32)
    stored, numbers = meta(16, 2, 1024, 64, dtype=dtype), meta(16, dtype=torch.int64)
    expressions = (KEYS, "bf16(x3[i0, i1, i2, i3])", ROTARY)
    cache = Appended((stored, stored, scale, scale), numbers, numbers, capacity)
    return compile_pointwise(expressions, (SHAPES[1], *SHAPES[::-1]), operands, [meta(16, 4, tokens, 64)], cache)


def compile_norm(columns: int = 4096) -> MachineCode:
    text = "t0 = mean(x0[i0, i1] * x0[i0, i1]); bf16(x1[i1] * bf16(x0[i0, i1] * rsqrt(t0 + 1e-06)))"
    return compile_pointwise((text,), (f"x0.0, {columns}",), [meta(16, columns), meta(columns)], [meta(16, columns)])


def compile_step_tables(batch: int = 1, tokens: int = 1) -> MachineCode:
    """What a decode step computes before its first layer: rows of an embedding, and angles of positions."""
    integers, vector = meta(batch, tokens, dtype=torch.int64), meta(64, dtype=torch.float32)
    operands = [meta(32000, 4096), integers, vector, meta(batch, dtype=torch.int64)]
    expressions = ("bf16(x0[x1(i0, i1), i2])", "bf16(number(i1 + x3(i0)) * x2[i2])")
    out = [meta(batch, tokens, 4096), meta(batch, tokens, 64)]
    return compile_pointwise(expressions, ("x1.0, x1.1, 4096", "x1.0, x1.1, 64"), operands, out)


def summed(experts: int, share: str = "{}") -> str:
    """The sum over the experts of a token in torch's order: rows x0 by expert, shares x1, and the places of rows x2.

    `share` is how a share is rounded, with braces where it stands.
    """
    terms = [f"x0[x2({experts}*i0 + {each}), i1] * " + share.format(f"x1[i0, {each}]") for each in range(experts)]
    terms[0] = terms[0].replace("*i0 + 0", "*i0")
    partial = [" + ".join(terms[first::4]) for first in range(min(experts, 4))]
    return f"bf16(0.0 + {partial[0]}" + "".join(f" + ({each})" for each in partial[1:]) + ")"


def compile_combining(experts: int, columns: int, tokens: int, rounded: str = "{}") -> MachineCode:
    share = meta(tokens, experts, dtype=torch.float32)
    operands = [meta(tokens * experts, columns), share, meta(tokens * experts, dtype=torch.int64)]
    return compile_pointwise((summed(experts, rounded),), (f"x1.0, {columns}",), operands, [meta(tokens, columns)])


def terms_of(count: int) -> str:
    """A residual, and a sum of quantized terms x1 with scales x2, then a norm with the gain x3."""
    terms = (f"x1[{term}, i0, i1] * x2[{term}, i0, floordiv(i1, 128)]" for term in range(count))
    return f"t0 = bf16(x0[i0, i1] + bf16({' + '.join(terms)})); bf16(t0 * rsqrt(mean(t0 * t0) + 1e-06) * x3[i1])"


def compile_terms(
    count: int, tokens: int, columns: int = 8192, dtype: torch.dtype = torch.float8_e4m3fn
) -> MachineCode:
    scales = meta(count, tokens, columns // 128, dtype=torch.float32)
    operands = [meta(tokens, columns), meta(count, tokens, columns, dtype=dtype), scales, meta(columns)]
    return compile_pointwise((terms_of(count),), (f"x0.0, {columns}",), operands, [meta(tokens, columns)])
