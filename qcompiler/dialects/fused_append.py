"""The operation `state.fused_append`: `state.append` of keys and values that fused expressions compute.

    %q = state.fused_append(%cache, %slots, %lengths, %qkv, %cos, %sin) {expressions = ["…", "…", "…"], shapes = […]}

The first two expressions are the keys [B, G, S, D] and the values [B, G, S, V]; the other expressions compute the
results. Expressions and shapes are written as in `kernel.pointwise`.
"""

from collections.abc import Sequence

from torch import Tensor

from qcompiler.dialects.pointwise import TEXTS, pointwise, results_of
from qcompiler.dialects.state import CAPACITY, append, check_append
from qcompiler.ir import Effects, Op, Type
from qcompiler.ir.op_table import OpDef, OpError, declare


def fused_append_types(op: Op) -> tuple[Type, ...]:
    """(cache, slots, lengths, operands float[...]) -> float[shape] for each expression after the first two"""
    results = results_of(op, op.rest)
    if len(results) < 2:
        raise OpError(f"it needs an expression for the keys and one for the values, but has {len(results)}")
    try:
        check_append(op, *results[:2])
    except OpError as error:
        if error.operand in ("key", "value"):  # which are not operands here
            raise OpError(error.problem) from None
        raise
    return results[2:]


def fused_append(
    cache: Sequence[Tensor], slots: Tensor, lengths: Tensor, *operands: Tensor, expressions: Sequence[str],
    shapes: Sequence[str], capacity: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Torch definition of `state.fused_append`; raises InputError as `state.append` does."""
    key, value, *others = pointwise(*operands, expressions=expressions, shapes=shapes)
    append(cache, key, value, slots, lengths, capacity=capacity)
    return tuple(others)


declare(
    OpDef(
        "state.fused_append",
        "Evaluates fused expressions, writes the first two results as `state.append` does, and returns the others.",
        ("cache", "slots", "lengths", "*"),
        {"expressions": TEXTS, "shapes": TEXTS},
        {"capacity": CAPACITY},
        types=fused_append_types,
        meaning=fused_append,
        effects=Effects.WRITES,
    )
)
