"""The scaled product on a GPU with a body on its result, which may be quantized again.

One kernel does it all, `codegen.kernels.fused_gemm`, where it can and is estimated to be faster. Elsewhere there are
two: the product in the element type that the body rounds its sums to, then the rest of the body, with quantization
(`codegen.quantize.fused`) or without (`codegen.kernels.pointwise`).
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from codegen.fused_gemm.epilogue import handed_over, on_tensors
from codegen.fused_gemm.launch import launch_body, launch_fused
from codegen.fused_gemm.tiling import MOST_OTHERS, FusedGemmConfig, FusedGemmProblem, choose_fused
from codegen.gemm.launch import has_scale_columns
from codegen.gemm.product import scaled_linear_on_gpu
from codegen.gemm.tiling import bucket
from codegen.launching.launch import as_rows, check_device, multiprocessors, on
from codegen.launching.replay import empty, replayed
from codegen.quantize.fused import fused_quantize_on_gpu
from codegen.quantize.plain import check_layout, scale_sizes
from qcompiler import numerics
from qcompiler.body import parse

Quantized = tuple[int, int, torch.dtype, str, str]
"""Rows and columns of a block, format, profile, and the layout of the scales."""


def fused_linear_on_gpu(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None, others: Sequence[Tensor],
    body: str, parts: int, x_block: Sequence[int], w_block: Sequence[int], block: Sequence[int] | None = None,
    dtype: torch.dtype | None = None, profile: str | None = None, scale_layout: str | None = None,
) -> list[Tensor]:  # fmt: skip
    """The meaning of `kernel.fused_linear` on a CUDA device.

    Raises:
        CodegenError: As `codegen.gemm.product.scaled_linear_on_gpu` and `codegen.quantize.plain.quantize_on_gpu`.
        ParseError: The body is none.
    """
    check_device(x_q.device)
    quantized: Quantized | None = None
    if block is not None and dtype is not None and profile is not None and scale_layout is not None:
        check_layout(block, scale_layout)
        quantized = (block[0], block[1], dtype, profile, scale_layout)
    config: FusedGemmConfig | str = "the operands are none of those"
    if _fits(x_q, x_s, w_q, w_s, bias, others, parts, x_block, w_block):
        aligned = (x_q.data_ptr() | w_q.data_ptr()) % 16 == 0
        columns = has_scale_columns(x_s if x_s.dim() == 2 else x_s.reshape(-1, x_s.shape[-1]))
        m, (n, k) = bucket(x_q.shape[:-1].numel()), w_q.shape
        some = (len(others), bias is not None)
        config = _config(m, n, k, body, parts, some, quantized, x_q.device.index, aligned, columns)
    if isinstance(config, str):
        return _separate(x_q, x_s, w_q, w_s, bias, others, body, parts, x_block, w_block, quantized)
    what, operands = ("fused_linear", body, parts, quantized), (x_q, x_s, w_q, w_s, bias, *others)
    return list(replayed(_fused, what, operands, config, x_q, x_s, w_q, w_s, bias, others, body, quantized))


def _fits(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None, others: Sequence[Tensor],
    parts: int, x_block: Sequence[int], w_block: Sequence[int],
) -> bool:  # fmt: skip
    """Whether one kernel can take such operands; what is wrong with them, if so, the separate kernels will say."""
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


@cache
def _config(
    m: int, n: int, k: int, body: str, parts: int, some: tuple[int, bool], quantized: Quantized | None, device: int,
    aligned: bool, columns: bool,
) -> FusedGemmConfig | str:  # fmt: skip
    handed, _ = handed_over(body)
    block = None if quantized is None else quantized[:2]
    sizes = (m, n // parts, k, parts, handed.itemsize, parse(body).dtype().itemsize, *some, block)
    return choose_fused(FusedGemmProblem(*sizes, multiprocessors(device), aligned, columns))


def _fused(
    config: FusedGemmConfig, x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None,
    others: Sequence[Tensor], body: str, quantized: Quantized | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One kernel."""
    n = w_q.shape[0] // config.parts
    shape = (*x_q.shape[:-1], n)
    flat = [other if other.dim() == 1 else as_rows(other) for other in others]
    operands = (as_rows(x_q), w_q, x_s.reshape(-1, x_s.shape[-1]), w_s, bias, flat)
    with on(x_q.device):
        if quantized is None:
            out = empty(shape, parse(body).dtype(), x_q.device)
            launch_fused(config, body, *operands, out.view(-1, n))
            return (out,)
        _, columns, dtype, profile, layout = quantized
        out = empty(shape, dtype, x_q.device)
        sizes, strides = scale_sizes(shape, columns, layout)
        scale = empty(sizes, torch.float32, x_q.device, strides)
        launch_fused(config, body, *operands, out.view(-1, n), scale.reshape(-1, sizes[-1]), profile)
        return out, scale


def _separate(
    x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, bias: Tensor | None, others: Sequence[Tensor],
    body: str, parts: int, x_block: Sequence[int], w_block: Sequence[int], quantized: Quantized | None,
) -> list[Tensor]:  # fmt: skip
    """The product, then the rest of the body."""
    handed, rest = handed_over(body)
    sums = scaled_linear_on_gpu(x_q, x_s, w_q, w_s, bias, x_block, w_block, handed)
    if quantized is None:
        what = ("body", body, parts)
        return [replayed(_run_body, what, (sums, *others), sums, others, body, parts)]
    halves = dict(zip(("y0", "y1"), sums.chunk(parts, -1), strict=False))
    names, renamed = on_tensors(rest, len(others))
    *block, dtype, profile, layout = quantized
    return fused_quantize_on_gpu(
        [*(halves[name] for name in names), *others], renamed, (), block, dtype, profile, layout
    )  # fmt: skip


def _run_body(sums: Tensor, others: Sequence[Tensor], body: str, parts: int) -> Tensor:
    """The rest of a body, on what the product in front of it has summed."""
    made, (_, rest) = parse(body), handed_over(body)
    halves = sums.chunk(parts, -1)
    if len(others) > MOST_OTHERS:
        named = {f"y{place}": y for place, y in enumerate(halves)} | {f"x{place}": x for place, x in enumerate(others)}
        return made.run(named)[0]
    n = halves[0].shape[-1]
    out = empty(halves[0].shape, made.dtype(), sums.device)
    if out.numel():
        flat = [other.contiguous() if other.dim() == 1 else as_rows(other) for other in others]
        with on(sums.device):
            launch_body(rest, [as_rows(half) for half in halves], flat, out.view(-1, n))
    return out
