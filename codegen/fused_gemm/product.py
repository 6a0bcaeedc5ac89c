"""The scaled matmul on a GPU with an epilogue, whose result may be quantized.

One kernel, `codegen.kernels.fused_gemm`, runs everything if it supports the problem and is estimated to be faster.
Otherwise there are two: the matmul in the element type that the epilogue first rounds to, then the rest of the
epilogue, with quantization (`codegen.quantize.fused`) or without (`codegen.kernels.pointwise`).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codegen.epilogues import handed_over, on_tensors
from codegen.gemm.product import scaled_linear_on_gpu
from codegen.launching.launch import as_rows, launch, on
from codegen.launching.replay import empty, replayed
from codegen.quantize.fused import fused_quantize_on_gpu
from codegen.quantize.plain import check_layout, scale_sizes
from codegen.targets.hopper import HOPPER, check_device
from codegen.templates.fused import FusedGemmConfig, FusedGemmProblem, FusedOperands, Separate
from codegen.templates.fused_expression import MOST_OTHERS, expression_call
from codegen.templates.gemm import GemmOperands, bucket
from codegen.templates.hopper import has_scale_columns, multiprocessors
from qcompiler import numerics
from qcompiler.dialects.fused_expression import parse

Quantized = tuple[int, int, torch.dtype, str, str]
"""Rows and columns of a block, format, profile, and the layout of the scales."""

SEPARATE = Separate()


class FusedLinear(NamedTuple):
    """The arguments of the operator, with the quantization arguments combined."""

    x_q: Tensor
    x_s: Tensor
    w_q: Tensor
    w_s: Tensor
    bias: Tensor | None
    others: Sequence[Tensor]
    expression: str
    parts: int
    x_block: Sequence[int]
    w_block: Sequence[int]
    quantized: Quantized | None = None


def fused_linear_on_gpu(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None, others: Sequence[Tensor],
    expression: str, parts: int, x_block: Sequence[int], w_block: Sequence[int], block: Sequence[int] | None = None,
    dtype: torch.dtype | None = None, profile: str | None = None, scale_layout: str | None = None,
) -> list[Tensor]:  # fmt: skip
    """The meaning of `kernel.fused_linear` on a CUDA device.

    Raises:
        CodegenError: As `codegen.gemm.product.scaled_linear_on_gpu` and `codegen.quantize.plain.quantize_on_gpu`.
        ParseError: The epilogue is not a fused expression.
    """
    check_device(x_q.device)
    quantized: Quantized | None = None
    if block is not None and dtype is not None and profile is not None and scale_layout is not None:
        check_layout(block, scale_layout)
        quantized = (block[0], block[1], dtype, profile, scale_layout)
    given = FusedLinear(x_q, x_s, w_q, w_s, bias, others, expression, parts, x_block, w_block, quantized)
    config = _config(*_facts(given)) if fits(given) else SEPARATE
    if isinstance(config, Separate):
        return separate(given)
    what, operands = ("fused_linear", expression, parts, quantized), (x_q, x_s, w_q, w_s, bias, *others)
    return list(replayed(_fused, what, operands, config, given))


def fits(given: FusedLinear) -> bool:
    """Whether one kernel supports these operands; if not, the separate kernels report errors."""
    x_q, x_s, w_q, w_s, bias, others, _, parts, x_block, w_block, _ = given
    if w_q.dim() != 2 or x_q.dim() == 0 or x_q.numel() == 0 or w_q.numel() == 0 or w_q.shape[0] % parts:
        return False
    n, k = w_q.shape
    shape = (*x_q.shape[:-1], n // parts)
    return (
        x_q.dtype is w_q.dtype is torch.float8_e4m3fn
        and x_s.dtype is w_s.dtype is torch.float32
        and tuple(x_block) == (1, 128)
        and tuple(w_block) == (128, 128)
        and x_q.shape[-1] == k
        and list(x_s.shape) == numerics.scale_shape(x_q.shape, x_block)
        and list(w_s.shape) == numerics.scale_shape(w_q.shape, w_block)
        and x_q.is_contiguous()
        and w_q.is_contiguous()
        and (bias is None or (bias.shape == (n,) and bias.is_contiguous()))
        and all(other.shape in (shape, shape[-1:]) and other.stride(-1) == 1 for other in others)
        and {x_q.device} == {t.device for t in (x_s, w_q, w_s, bias, *others) if t is not None}
    )


def _facts(given: FusedLinear) -> tuple[Any, ...]:
    """The properties that decide which kernels run."""
    x_q, x_s, w_q, quantized = given.x_q, given.x_s, given.w_q, given.quantized
    aligned = (x_q.data_ptr() | w_q.data_ptr()) % 16 == 0
    columns = has_scale_columns(x_s if x_s.dim() == 2 else x_s.reshape(-1, x_s.shape[-1]))
    sizes = (bucket(x_q.shape[:-1].numel()), *w_q.shape, given.expression, given.parts, len(given.others))
    block = None if quantized is None else quantized[:2]
    return (*sizes, given.bias is not None, block, x_q.device.index, aligned, columns)


@cache
def _config(
    m: int, n: int, k: int, expression: str, parts: int, others: int, bias: bool, block: tuple[int, int] | None,
    device: int, aligned: bool, columns: bool,
) -> FusedGemmConfig | Separate:  # fmt: skip
    handed, _ = handed_over(expression)
    sizes = (m, n // parts, k, parts, handed.itemsize, parse(expression).dtype().itemsize, others, bias, block)
    return HOPPER.fused_gemm.choose(FusedGemmProblem(*sizes, multiprocessors(device), aligned, columns))


def _fused(config: FusedGemmConfig, given: FusedLinear) -> tuple[Tensor, ...]:
    """One kernel."""
    x_q, x_s, w_q, w_s, bias, others, expression, _, _, _, quantized = given
    n = w_q.shape[0] // config.parts
    shape = (*x_q.shape[:-1], n)
    flat = [other if other.dim() == 1 else as_rows(other) for other in others]
    dtype = parse(expression).dtype() if quantized is None else quantized[2]
    with on(x_q.device):
        out = empty(shape, dtype, x_q.device)
        product = GemmOperands(as_rows(x_q), w_q, out.view(-1, n), x_s.reshape(-1, x_s.shape[-1]), w_s, bias)
        if quantized is None:
            HOPPER.fused_gemm.launch(config, FusedOperands(expression, product, flat))
            return (out,)
        _, columns, _, profile, layout = quantized
        sizes, strides = scale_sizes(shape, columns, layout)
        scale = empty(sizes, torch.float32, x_q.device, strides)
        operands = FusedOperands(expression, product, flat, scale.reshape(-1, sizes[-1]), profile)
        HOPPER.fused_gemm.launch(config, operands)
        return out, scale


def separate(given: FusedLinear) -> list[Tensor]:
    """The matmul, then the rest of the epilogue."""
    x_q, x_s, w_q, w_s, bias, others, expression, parts, x_block, w_block, quantized = given
    handed, rest = handed_over(expression)
    sums = scaled_linear_on_gpu(x_q, x_s, w_q, w_s, bias, x_block, w_block, handed)
    if quantized is None:
        what = ("expression", expression, parts)
        return [replayed(_run_expression, what, (sums, *others), sums, others, expression, parts)]
    halves = dict(zip(("y0", "y1"), sums.chunk(parts, -1), strict=False))
    names, renamed = on_tensors(rest, len(others))
    *block, dtype, profile, layout = quantized
    return fused_quantize_on_gpu(
        [*(halves[name] for name in names), *others], renamed, (), block, dtype, profile, layout
    )  # fmt: skip


def _run_expression(sums: Tensor, others: Sequence[Tensor], expression: str, parts: int) -> Tensor:
    """The rest of an epilogue, on the sums of the preceding matmul."""
    made, (_, rest) = parse(expression), handed_over(expression)
    halves = sums.chunk(parts, -1)
    if len(others) > MOST_OTHERS:
        named = {f"y{place}": y for place, y in enumerate(halves)} | {f"x{place}": x for place, x in enumerate(others)}
        return made.run(named)[0]
    n = halves[0].shape[-1]
    out = empty(halves[0].shape, made.dtype(), sums.device)
    if out.numel():
        flat = [other.contiguous() if other.dim() == 1 else as_rows(other) for other in others]
        with on(sums.device):
            launch(expression_call(rest, [as_rows(half) for half in halves], flat, out.view(-1, n)))
    return out
