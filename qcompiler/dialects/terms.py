"""Sums of quantized terms, such as those that ranks send each other: in FP32, in order, rounded once.

    %y = quant.sum_terms(%t_q, %t_s) {format = #fp8_tile, out_dtype = bf16}     t_q f8[2, s0, 512] -> bf16[s0, 512]
    %q, %s, %h = kernel.fused_sum_quantize(%t_q, %t_s, %x, %w)
      {expression = "h0 = bf16(x0 + bf16(y0)); …", format = #fp8_tile, keep = ["h0"], term_format = #fp8_tile}

Terms lie along the first axis. In the expression of the second operation, `y0` is their sum in FP32, and `x0`, `x1`, …
are its other operands, as in `kernel.fused_quantize`.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.dialects.fused_expression import parse
from qcompiler.dialects.kernel import FORMAT as CODES
from qcompiler.dialects.kernel import NAMES, check_operands, parsed, quantized_types
from qcompiler.dialects.quant import FORMAT, check_stored, out_dtype_of
from qcompiler.ir import Format, Op, Size, TensorType, Type
from qcompiler.ir.op_table import DTYPE, TEXT, OpDef, OpError, declare

MOST_TERMS = 16
"""Maximum number of terms."""


def sum_terms_types(op: Op) -> tuple[Type, ...]:
    """(terms codes[n, ..., K], scale[n, ...]) -> out_dtype[..., K]"""
    return (TensorType(out_dtype_of(op), _sum_shape(op, "")),)


def fused_sum_quantize_types(op: Op) -> tuple[Type, ...]:
    """(terms codes[n, ..., K], scale[n, ...], others float[..., K] or [K]) -> codes, scales, residual outputs"""
    shape, made = _sum_shape(op, "term_"), parsed(op)
    if [name for name in made.operands if name[0] == "y"] != ["y0"]:
        raise OpError("its expression must read y0, and besides only its operands x0, x1, …")
    check_operands(op.rest, len(op.args) - len(op.rest), made, shape)
    return quantized_types(op, made, shape)


def _sum_shape(op: Op, prefix: str) -> tuple[Size, ...]:
    """Checks the terms and their scales, and returns the shape of their sum."""
    check_stored(op, "terms", prefix)
    terms = op["terms"].tensor
    if len(terms.shape) < 2 or not isinstance(terms.shape[0], int) or not 1 <= terms.shape[0] <= MOST_TERMS:
        raise OpError(f"the terms are {terms}, but it needs 1 to {MOST_TERMS} terms along the first of 2 axes", "terms")
    return terms.shape[1:]


def sum_terms(terms: Tensor, scale: Tensor, *, format: Format, out_dtype: torch.dtype) -> Tensor:
    """Torch definition of `quant.sum_terms`.

    Args:
        terms: Codes `[n, ..., K]`.
        scale: Their scales.
        format: Their format.
        out_dtype: The dtype of the sum `[..., K]`.
    """
    total: Tensor = reduce(add, numerics.dequantize(terms, scale, format=format, out_dtype=torch.float32))
    return total.to(out_dtype)


def fused_sum_quantize(
    terms: Tensor, term_scale: Tensor, *others: Tensor, expression: str, keep: Sequence[str], term_format: Format,
    format: Format,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Torch definition of `kernel.fused_sum_quantize`."""
    total = sum_terms(terms, term_scale, format=term_format, out_dtype=torch.float32)
    named = {"y0": total} | {f"x{place}": x for place, x in enumerate(others)}
    result, *kept = parse(expression).run(named, keep)
    return (*numerics.quantize(result, format), *kept)


declare(
    OpDef(
        "quant.sum_terms",
        "Dequantizes terms, adds them along the first axis in FP32, in order, and rounds once.",
        ("terms", "scale"),
        {"format": FORMAT, "out_dtype": DTYPE},
        types=sum_terms_types,
        meaning=sum_terms,
    )
)
declare(
    OpDef(
        "kernel.fused_sum_quantize",
        "Adds dequantized terms in FP32, evaluates a fused expression of the sum row by row, and quantizes the result.",
        ("terms", "term_scale", "*"),
        {"expression": TEXT, "format": CODES, "keep": NAMES, "term_format": CODES},
        types=fused_sum_quantize_types,
        meaning=fused_sum_quantize,
    )
)
