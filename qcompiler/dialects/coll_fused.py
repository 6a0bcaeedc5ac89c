"""A sum over ranks that is normalized and quantized at once, in the program of one rank.

    %q, %s, %h = coll.fused_reduce_quantize(%x, %y, %w)
      {expression = "h0 = bf16(x0 + x1); …", format = #fp8_tile, keep = ["h0"], mesh = "tp", summed = 1}

As `kernel.fused_quantize` after an all-reduce of the operand `summed`. GPUs of one host add a small sum in the kernel
that reads it.
"""

from collections.abc import Sequence

from torch import Tensor

from qcompiler.dialects.kernel import FORMAT, NAMES, fused_quantize, fused_quantize_types
from qcompiler.distributed.communicator import current
from qcompiler.ir import Effects, Format, Op, Role, Type, Value
from qcompiler.ir.op_table import TEXT, AttributeCheck, OpDef, OpError, declare

PLACE: tuple[AttributeCheck, str] = (lambda a: type(a) is int and a >= 0, "the number of an operand, from 0")


def fused_reduce_quantize_types(op: Op) -> tuple[Type, ...]:
    """(x float[..., K], others float[..., K] or [K]) -> dtype[..., K], f32[..., scales], residual outputs"""
    types, place, shape = fused_quantize_types(op), op.attrs["summed"], op["x"].tensor.shape
    arg = op.args[place] if isinstance(place, int) and place < len(op.args) else None
    if not isinstance(arg, Value) or arg.tensor.shape != shape:
        raise OpError(f"operand {place} is {arg}, but what is summed over ranks must have the shape of x", "summed")
    return types


def fused_reduce_quantize(
    *operands: Tensor, expression: str, keep: Sequence[str], format: Format, mesh: str, summed: int
) -> tuple[Tensor, ...]:
    """Torch definition of `coll.fused_reduce_quantize`."""
    return fused_quantize(*reduced(operands, summed, mesh), expression=expression, keep=keep, format=format)


def reduced(operands: Sequence[Tensor], summed: int, mesh: str) -> list[Tensor]:
    """The operands, one of them summed over the ranks."""
    return [current().all_reduce(x, mesh) if place == summed else x for place, x in enumerate(operands)]


declare(
    OpDef(
        "coll.fused_reduce_quantize",
        "Sums an operand over the ranks, evaluates a fused expression row by row, and quantizes the result.",
        ("x", "*"),
        {"expression": TEXT, "format": FORMAT, "keep": NAMES, "mesh": TEXT, "summed": PLACE},
        types=fused_reduce_quantize_types,
        meaning=fused_reduce_quantize,
        effects=Effects.COMMUNICATES,
        role=Role.QUANTIZE,
    )
)
