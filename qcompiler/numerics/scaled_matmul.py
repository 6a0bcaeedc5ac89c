"""Scaled matmul: dequantizes both operands, multiplies and accumulates in FP32."""

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.errors import QCompilerError
from qcompiler.ir.formats import ALL, FP8_BLOCK, FP8_TILE, Format
from qcompiler.ir.types import DType
from qcompiler.numerics.blocks import describe
from qcompiler.numerics.codes import PLAIN
from qcompiler.numerics.integer_matmul import integer_matmul
from qcompiler.numerics.quantizing import check_scale, dequantize


def scaled_linear(
    x_q: Tensor,
    x_s: Tensor,
    w_q: Tensor,
    w_s: Tensor,
    bias: Tensor | None = None,
    x_tensor_scale: Tensor | None = None,
    w_tensor_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    *,
    x_format: Format = FP8_TILE,
    w_format: Format = FP8_BLOCK,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`x @ w.T + bias` of two quantized operands, computed in FP32 and rounded once.

    INT8 operands with one scale for all of K are summed exactly, as in the kernels: `sum * (x_s * w_s) + bias`.

    Args:
        x_q: Codes of `[..., K]`, any number of leading dimensions.
        x_s: The scale of `x_q`.
        w_q: Codes of `[N, K]`.
        w_s: The scale of `w_q`.
        bias: `[N]`, any floating dtype, or None.
        x_tensor_scale: The tensor scale of `x_q`, if its format has one.
        w_tensor_scale: The tensor scale of `w_q`, if its format has one.
        x_zero_point: The zero points of `x_q`, if its format has them.
        w_zero_point: The zero points of `w_q`, if its format has them.
        x_format: The format of `x_q`.
        w_format: The format of `w_q`.
        out_dtype: The dtype of the result, `[..., N]`.

    Raises:
        QCompilerError: `w_q` is not a matrix, K differs, or codes or scales do not match their format.
    """
    if sums_integers(x_q, x_format, w_format):
        check_linear(x_q, w_q)
        check_scale(x_q, x_q.shape, x_s, x_format)
        check_scale(w_q, w_q.shape, w_s, w_format)
        sums = integer_matmul(x_q.reshape(-1, x_q.shape[-1]), w_q).mul_(x_s.reshape(-1, 1) * w_s.T)
        return (sums if bias is None else sums.add_(bias)).view(*x_q.shape[:-1], w_q.shape[0]).to(out_dtype)
    x = dequantize(x_q, x_s, x_tensor_scale, x_zero_point, format=x_format)
    w = dequantize(w_q, w_s, w_tensor_scale, w_zero_point, format=w_format)
    check_linear(x, w)
    return functional.linear(x, w, None if bias is None else bias.to(torch.float32)).to(out_dtype)


def sums_integers(x_q: Tensor, x_format: Format, w_format: Format) -> bool:
    """Whether the codes are INT8 with one scale for all of K; False in traces, which use FP32 arithmetic."""
    formats = (x_format, w_format)
    plain = all(f.element is DType.i8 and f.scale is DType.f32 and f.symmetric for f in formats)
    return plain and all(f.block in ((1, ALL), (ALL, ALL)) for f in formats) and type(x_q) in PLAIN


def check_linear(x_q: Tensor, w_q: Tensor) -> None:
    """Raises QCompilerError unless `x_q` is `[..., K]` and `w_q` is `[N, K]`."""
    if w_q.dim() != 2 or x_q.dim() == 0 or x_q.shape[-1] != w_q.shape[1]:
        got = f"{describe(x_q)} and {describe(w_q)}"
        raise QCompilerError("the operands of a scaled linear do not match", got=got, need="x [..., K] and w [N, K]")
