"""Launches the kernel of `codegen.kernels.fused_gemm`: operands as it takes them, constants, grid."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia import hopper

from codegen.bodies import triton_function
from codegen.fused_gemm.epilogue import handed_over
from codegen.fused_gemm.tiling import FusedGemmConfig
from codegen.gemm.launch import gluon_layout, scale_layout
from codegen.gemm.tiling import ceil_div
from codegen.kernels.fused_gemm import fused_gemm
from codegen.kernels.pointwise import apply_body
from codegen.launching.launch import descriptor, launch, multiprocessors
from qcompiler import numerics

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Of the first consumer; the kernel asks for the other warps itself, and writes its multiply-adds itself."""

BODY_ROWS, BODY_COLUMNS = 4, 512
"""The tile of a program that runs a body alone."""

_HANDED = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def launch_fused(
    config: FusedGemmConfig, body: str, x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None,
    others: Sequence[Tensor], out: Tensor, out_scale: Tensor | None = None, profile: str = numerics.DEFAULT_PROFILE,
) -> None:  # fmt: skip
    """Launches one configuration on the current CUDA stream, unchecked.

    Args:
        config: One that `codegen.fused_gemm.tiling.refusal` does not refuse for these operands.
        body: Text of a body without a reduction.
        x: float8_e4m3fn `[m, k]`, contiguous, m and k at least 1.
        w: float8_e4m3fn `[parts n, k]`, contiguous.
        x_scale: FP32 `[m, ceil(k / 128)]` in columns: see `codegen.gemm.launch.has_scale_columns`.
        w_scale: FP32 `[ceil(parts n / 128), ceil(k / 128)]`, any strides.
        bias: `[parts n]`, contiguous, or None.
        others: Up to two tensors `[m, n]` whose rows are contiguous, or `[n]`.
        out: `[m, n]`, contiguous; overwritten.
        out_scale: FP32 `[m, ceil(n / 128)]`, any strides, where the result is quantized.
        profile: A name of `numerics.PROFILES`, for that.
    """
    (m, k), n = x.shape, out.shape[1]
    first, second, *_ = (*others, None, None)
    strides = [0 if each is None or each.dim() == 1 else each.stride(0) for each in (first, second)]
    scale_strides = (0, 0) if out_scale is None else out_scale.stride()
    last = (*w_scale.stride(), *strides, *scale_strides)
    box = config.rows
    arguments = (
        _tile(x, box), _tile(w, 128), _scales(x_scale, box), w_scale, bias, first, second, out, out_scale,
        m, n, k, *last,
    )  # fmt: skip
    programs = min(multiprocessors(x.device.index), ceil_div(m, config.rows) * ceil_div(n, 128))
    constants = fused_constants(config, body, n, out.dtype, profile)
    pointers = (w_scale, bias, first, second, out, out_scale)
    what = (config, body, profile, x.device.index, n, k, *last[:5])
    launch(fused_gemm, programs, arguments, constants, OPTIONS, pointers, what)


def fused_constants(
    config: FusedGemmConfig, body: str, columns: int, dtype: torch.dtype, profile: str
) -> dict[str, Any]:
    """What the compiler of the kernel knows; `dtype` is that of the result."""
    rule = numerics.profile(profile)
    handed, rest = handed_over(body)
    return {
        "BODY": triton_function(rest, (), "gluon"),
        "PARTS": config.parts,
        "HANDED": _HANDED[handed],
        "WAVES": config.waves,
        "STAGES": config.stages,
        "GROUP": config.group,
        "WHOLE": columns % 128 == 0,
        "AMAX_FLOOR": rule.amax_floor(dtype),
        "TOP": float(numerics.FORMAT_MAX.get(dtype, 0)),
        "RECIPROCAL": rule.division == "reciprocal",
        "UE8M0": rule.scale_format == "ue8m0",
    }


def _tile(codes: Tensor, rows: int) -> Any:
    height, stride = codes.shape
    layout = gluon_layout(rows, 128, codes.dtype)
    return descriptor(hopper.TensorDescriptor, codes, [height, stride], stride, [rows, 128], layout)


def _scales(x_scale: Tensor, rows: int) -> Any:
    """The transposed scales; one column alone may have any stride."""
    m, blocks = x_scale.shape
    stride = x_scale.stride(1) if blocks > 1 else ceil_div(m, 4) * 4
    return descriptor(hopper.TensorDescriptor, x_scale, [blocks, m], stride, [1, rows], scale_layout())


def launch_body(body: str, sums: Sequence[Tensor], others: Sequence[Tensor], out: Tensor) -> None:
    """Launches `codegen.kernels.pointwise` on the current CUDA stream, unchecked.

    Args:
        body: Of the sums and the others, without a reduction.
        sums: `[m, n]` in any floating dtype, one or two, their rows contiguous.
        others: Up to two tensors `[m, n]` whose rows are contiguous, or `[n]`.
        out: `[m, n]`, contiguous; overwritten.
    """
    m, n = out.shape
    operands = [*others, *[None] * (2 - len(others)), *sums, *[None] * (2 - len(sums))]
    strides = [0 if each is None or each.dim() == 1 else each.stride(0) for each in operands]
    function = triton_function(body)
    constants = {"BODY": function, "BLOCK_M": BODY_ROWS, "BLOCK_N": BODY_COLUMNS}
    programs = ceil_div(m, BODY_ROWS) * ceil_div(n, BODY_COLUMNS)
    pointers, what = (out, *operands), (id(function), out.device.index, n, *strides)
    launch(apply_body, programs, (*pointers, m, n, *strides), constants, OPTIONS, pointers, what)
