"""The operation `state.fused_attend`: `state.attend`, whose rows are quantized for the output projection.

    %q, %s = state.fused_attend(%cache, %query, %slots, %lengths) {format = #fp8_tile, scale = 0.125}

A row is a token: its heads next to each other. Each tile of a row lies within a head, or covers whole heads.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from qcompiler import numerics
from qcompiler.dialects.kernel import FORMAT
from qcompiler.dialects.quant import stored_types
from qcompiler.dialects.state import ATTEND, attend, attend_types
from qcompiler.ir import Format, Op, Size, Type
from qcompiler.ir.op_table import OpError, declare


def why_not_heads(format: Format, value_size: Size) -> str | None:
    """Why heads cannot be quantized apart from each other, in one sentence without a final period; None if they can."""
    rows, columns = format.block
    if rows != 1 or columns < 1:
        return f"a scale of {format} spans all heads of a token"
    if not isinstance(value_size, int) or (value_size % columns and columns % value_size):
        return f"a tile of {columns} columns has parts of several heads of {value_size} elements"
    return None


def fused_attend_types(op: Op) -> tuple[Type, ...]:
    """(as for `state.attend`) -> dtype[B, S, H V], f32[B, S, scales]"""
    (out,) = attend_types(op)
    batch, heads, tokens, size = out.shape
    if (why := why_not_heads(op.format(), size)) is not None:
        raise OpError(why)
    return stored_types(op, op.format(), (batch, tokens, heads * size))


def fused_attend(*operands: Any, format: Format, **attributes: Any) -> tuple[Tensor, ...]:
    """Torch definition of `state.fused_attend`; raises InputError as `state.attend` does."""
    return numerics.quantize(attend(*operands, **attributes).transpose(1, 2).flatten(2), format)


declare(
    replace(
        ATTEND,
        name="state.fused_attend",
        doc="`state.attend`, and quantization of the heads of each token as one row.",
        attributes={**ATTEND.attributes, "format": FORMAT},
        types=fused_attend_types,
        meaning=fused_attend,
    )
)
