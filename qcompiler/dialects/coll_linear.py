"""A quantized matmul whose results are terms of a sum over ranks, each of which gets its own tokens of it.

    %p = coll.linear_scatter_tokens(%x_q, %x_s, %w_q, %w_s) {few = 512, mesh = "tp", ranks = 2, out_dtype = bf16, …}

As `coll.reduce_scatter_tokens` of `kernel.scaled_linear`. GPUs of one host store tiles of the matmul in each other's
memory, so that they are sent while it runs.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.dialects.coll_tokens import CUT, reduce_scatter_tokens, share_of
from qcompiler.dialects.kernel import ACTIVATION_AND_WEIGHT, check_layout
from qcompiler.dialects.quant import LINEAR, LINEAR_ATTRIBUTES, linear_types
from qcompiler.ir import Effects, Format, Op, Role, TensorType, Type
from qcompiler.ir.op_table import OpDef, declare


def linear_scatter_tokens_types(op: Op) -> tuple[Type, ...]:
    """Like `kernel.scaled_linear`, then [b, s, n] -> [1, share of b*s, n]"""
    check_layout(op)
    (kind,) = linear_types(op)
    assert isinstance(kind, TensorType)
    return (replace(kind, shape=share_of(op, kind)),)


def linear_scatter_tokens(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None = None, *,
    x_format: Format, w_format: Format, out_dtype: torch.dtype, mesh: str, ranks: int, few: int,
) -> Tensor:  # fmt: skip
    """Torch definition of `coll.linear_scatter_tokens`."""
    terms = numerics.scaled_linear(
        x, x_scale, w, w_scale, bias, x_format=x_format, w_format=w_format, out_dtype=out_dtype
    )
    return reduce_scatter_tokens(terms, mesh=mesh, ranks=ranks, few=few)


declare(
    OpDef(
        "coll.linear_scatter_tokens",
        "This rank's tokens of the sum of the quantized matmuls of all ranks.",
        LINEAR,
        {**LINEAR_ATTRIBUTES, **ACTIVATION_AND_WEIGHT, **CUT},
        types=linear_scatter_tokens_types,
        meaning=linear_scatter_tokens,
        effects=Effects.COMMUNICATES,
        role=Role.QUANTIZED_MATMUL,
    )
)
