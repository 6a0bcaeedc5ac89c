"""The operator `scaled_linear`: operand checks and the choice of a configuration."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codegen.cpu.gemm import scaled_linear_on_cpu
from codegen.gemm.tuned import config_for
from codegen.launching.launch import FLOATS, as_rows, on
from codegen.launching.replay import empty, replayed
from codegen.operators.operator import Operator, declare
from codegen.support import is_tiled
from codegen.targets.cuda import gpu_at
from codegen.templates.gemm import GEMM, GemmOperands, GemmProblem, Kind, bucket
from codegen.templates.hopper import has_scale_columns
from qcompiler.errors import CodegenError
from qcompiler.numerics import format_of, scale_shape


class ScaledLinear(NamedTuple):
    """The arguments of the operator."""

    x_q: Tensor
    x_s: Tensor
    w_q: Tensor
    w_s: Tensor
    bias: Tensor | None
    x_block: Sequence[int]
    w_block: Sequence[int]
    out_dtype: torch.dtype


def scaled_linear_on_gpu(*arguments: Any) -> Tensor:
    """`numerics.scaled_linear` on a CUDA device.

    Raises:
        CodegenError: The kernels do not support the operands: see `codegen.support` for blocks and formats.
    """
    *operands, x_block, w_block, out_dtype = arguments
    return replayed(_run, ("scaled_linear", *x_block, *w_block, out_dtype), operands, *arguments)


def _run(*arguments: Any) -> Tensor:
    given = ScaledLinear(*arguments)
    check_scaled_linear(given)
    out = empty((*given.x_q.shape[:-1], given.w_q.shape[0]), given.out_dtype, given.x_q.device)
    multiply_into(out, given)
    return out


def multiply_into(out: Tensor, given: ScaledLinear) -> None:
    """Writes the result, for arguments that `check_scaled_linear` accepts, to a contiguous tensor of its shape."""
    x_q, x_s, w_q, w_s, bias, x_block, w_block, _ = given
    n, k = w_q.shape
    if out.numel() == 0:
        return
    if k == 0:
        out.zero_() if bias is None else out.copy_(bias.expand(out.shape))
        return
    gpu, flat = gpu_at(x_q.device), x_q.dim() == 2
    rows = x_q if flat and x_q.is_contiguous() else as_rows(x_q).contiguous()
    m = rows.shape[0]
    scales = x_s if flat else x_s.reshape(-1, x_s.shape[-1])
    matrix = out if flat else out.view(-1, n)
    aligned = (rows.data_ptr() | w_q.data_ptr()) % gpu.limits.copy_alignment == 0
    kind: Kind = "tiles" if is_tiled(w_block) else "rows_i8" if w_q.dtype == torch.int8 else "rows_f8"
    if kind == "tiles" and scales.shape[0] != m:
        scales = scales.expand(m, scales.shape[-1])
    columns = kind == "tiles" and has_scale_columns(scales)
    device = x_q.device.index
    sizes = (bucket(m), n, k, gpu.limits.multiprocessors_of(device), out.element_size())
    problem = GemmProblem(*sizes, aligned, kind, x_block[1], columns)
    operands = GemmOperands(rows, w_q, matrix, scales, w_s, bias, x_block[1] if kind == "tiles" else None)
    with on(x_q.device):
        GEMM.family(gpu).launch(config_for(device, problem), operands)


def check_scaled_linear(given: ScaledLinear) -> None:
    """Raises CodegenError, with the actual and expected value, for operands that the kernels do not support."""
    x_q, x_s, w_q, w_s, bias, x_block, w_block, out_dtype = given
    why = gpu_at(x_q.device).why_not(format_of(x_block, x_q.dtype), format_of(w_block, w_q.dtype))
    if why is not None:
        raise CodegenError(f"no GPU kernel runs this scaled linear: {why}")
    n, k = w_q.shape if w_q.dim() == 2 else (-1, -1)
    # Comparisons run one after another, because this runs in every call; the message is built only on failure.
    fits = (
        x_s.dtype is torch.float32
        and w_s.dtype is torch.float32
        and out_dtype in FLOATS
        and x_q.dim() > 0
        and x_q.shape[-1] == k
        and list(x_s.shape) == scale_shape(x_q.shape, x_block)
        and list(w_s.shape) == scale_shape(w_q.shape, w_block)
        and w_q.is_contiguous()
        and x_q.device == x_s.device == w_q.device == w_s.device
        and (bias is None or (bias.shape == (n,) and bias.is_contiguous() and bias.device == x_q.device))
    )
    if fits:
        return
    facts = (
        ("depth of the activations", x_q.shape[-1] if x_q.dim() else None, k),
        ("shape of the activation scales", list(x_s.shape), scale_shape(x_q.shape or [1], x_block)),
        ("shape of the weight scales", list(w_s.shape), scale_shape(w_q.shape or [1], w_block)),
        ("dtype of the scales", {x_s.dtype, w_s.dtype}, {torch.float32}),
        ("layout of the weights (contiguous)", w_q.is_contiguous(), True),
        ("shape of the bias", None if bias is None else list(bias.shape), None if bias is None else [n]),
        ("layout of the bias (contiguous)", bias is None or bias.is_contiguous(), True),
        ("device of the operands", {t.device for t in (x_s, w_q, w_s, bias) if t is not None}, {x_q.device}),
    )
    for what, got, need in facts:
        if got != need:
            raise CodegenError(f"the GPU kernels cannot run this {what}", got=got, need=need)
    raise CodegenError("the GPU kernels cannot write this dtype", got=out_dtype, need=list(FLOATS))


def scaled_linear_fake(*arguments: Any) -> Tensor:
    """The result without data."""
    given = ScaledLinear(*arguments)
    return given.x_q.new_empty((*given.x_q.shape[:-1], given.w_q.shape[0]), dtype=given.out_dtype)


SCALED_LINEAR_SCHEMA = (
    "scaled_linear(Tensor x_q, Tensor x_s, Tensor w_q, Tensor w_s, Tensor? bias, int[] x_block, int[] w_block, "
    "ScalarType out_dtype) -> Tensor"
)
declare(Operator(SCALED_LINEAR_SCHEMA, scaled_linear_on_cpu, scaled_linear_on_gpu, scaled_linear_fake))
