"""Splits the fused expression of an epilogue into the first rounding of the sums and the rest.

    bf16(silu(bf16(y0)) * bf16(y1))     ->     bfloat16, and  bf16(silu(y0) * y1)

Sums are passed on in that element type, within one kernel or from one to the next.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch

from qcompiler.dialects.expression_nodes import Call, Expression, Name
from qcompiler.dialects.fused_expression import ROUNDED, FusedExpression, parse


@cache
def handed_over(text: str) -> tuple[torch.dtype, str]:
    """The element type that an expression first rounds every sum to, and the expression on rounded sums.

    FP32 and the unchanged expression if it reads a sum unrounded or rounds sums in two ways. May raise ParseError.
    """
    expression = parse(text)
    users = {user for part in _whole(expression) for user in _users(part)}
    if len(users) != 1 or (rounding := users.pop()) is None:
        return torch.float32, str(expression)

    def without(what: Expression) -> Expression:
        # A second rounding of a sum, to another type, stays.
        first = isinstance(what, Call) and what.function == rounding and _rounds_a_sum(what)
        return what.args[0] if isinstance(what, Call) and first else what

    return ROUNDED[rounding], str(_changed(expression, without))


@cache
def on_tensors(text: str, others: int) -> tuple[tuple[str, ...], str]:
    """Rewrites an epilogue over tensors: the sums that it reads, and the expression with these as x0, x1, …

    Its other operands follow: with one sum read, `y0 + x0` becomes `x0 + x1`.

    Args:
        text: The fused expression.
        others: Number of its other operands.
    """
    expression = parse(text)
    sums = tuple(name for name in expression.operands if name[0] == "y")
    operands = (*sums, *(f"x{place}" for place in range(others)))
    named = {name: Name(f"x{place}") for place, name in enumerate(operands)}

    def renamed(what: Expression) -> Expression:
        return named.get(what.name, what) if isinstance(what, Name) else what

    return sums, str(_changed(expression, renamed))


def _whole(expression: FusedExpression) -> Iterator[Expression]:
    yield from (what for _, what in expression.definitions)
    yield expression.result


def _users(what: Expression, user: str | None = None) -> Iterator[str | None]:
    """For each sum that is read: the rounding that reads it, or None if another operation reads it."""
    if isinstance(what, Name) and what.name[0] == "y" and what.name[1:].isdigit():
        yield user if user in ROUNDED else None
    elif isinstance(what, Call):
        for arg in what.args:
            yield from _users(arg, what.function)


def _rounds_a_sum(what: Call) -> bool:
    return what.function in ROUNDED and any(True for _ in _users(what.args[0])) and isinstance(what.args[0], Name)


def _changed(expression: FusedExpression, change: Callable[[Expression], Expression]) -> FusedExpression:
    """Replaces each subexpression by the result of `change`, innermost first."""

    def walk(what: Expression) -> Expression:
        return change(Call(what.function, tuple(map(walk, what.args))) if isinstance(what, Call) else what)

    return FusedExpression(tuple((name, walk(what)) for name, what in expression.definitions), walk(expression.result))
