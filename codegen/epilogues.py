"""A body behind a product: what its sums are rounded to first, and what is left of it then.

    bf16(silu(bf16(y0)) * bf16(y1))     ->     bfloat16, and  bf16(silu(y0) * y1)

Sums are handed on in that element type, inside one kernel or from one to the next.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch

from qcompiler.dialects.body import ROUNDED, Body, Call, Expression, Name, parse


@cache
def handed_over(text: str) -> tuple[torch.dtype, str]:
    """The element type that a body rounds every sum to before all else, and the body on sums that are so rounded.

    FP32, and the body as it is, where it reads a sum unrounded or rounds sums in two ways. ParseError for no body.
    """
    body = parse(text)
    readers = {reader for part in _whole(body) for reader in _readers(part)}
    if len(readers) != 1 or (rounding := readers.pop()) is None:
        return torch.float32, str(body)

    def without(what: Expression) -> Expression:
        return what.args[0] if isinstance(what, Call) and _rounds_a_sum(what) else what

    return ROUNDED[rounding], str(_changed(body, without))


@cache
def on_tensors(text: str, others: int) -> tuple[tuple[str, ...], str]:
    """A body of a product as one of tensors: the sums that it reads, and it where these are x0, x1, …

    Its other operands follow them: with one sum read, `y0 + x0` becomes `x0 + x1`.

    Args:
        text: The body.
        others: How many other operands it has.
    """
    body = parse(text)
    sums = tuple(name for name in body.operands if name[0] == "y")
    operands = (*sums, *(f"x{place}" for place in range(others)))
    named = {name: Name(f"x{place}") for place, name in enumerate(operands)}

    def renamed(what: Expression) -> Expression:
        return named.get(what.name, what) if isinstance(what, Name) else what

    return sums, str(_changed(body, renamed))


def _whole(body: Body) -> Iterator[Expression]:
    yield from (what for _, what in body.definitions)
    yield body.result


def _readers(what: Expression, reader: str | None = None) -> Iterator[str | None]:
    """For each sum that is read: the rounding that reads it, or None for anything else."""
    if isinstance(what, Name) and what.name[0] == "y" and what.name[1:].isdigit():
        yield reader if reader in ROUNDED else None
    elif isinstance(what, Call):
        for arg in what.args:
            yield from _readers(arg, what.function)


def _rounds_a_sum(what: Call) -> bool:
    return what.function in ROUNDED and any(True for _ in _readers(what.args[0])) and isinstance(what.args[0], Name)


def _changed(body: Body, change: Callable[[Expression], Expression]) -> Body:
    """The body with each of its expressions replaced by what `change` makes of it, from the inside out."""

    def walk(what: Expression) -> Expression:
        return change(Call(what.function, tuple(map(walk, what.args))) if isinstance(what, Call) else what)

    return Body(tuple((name, walk(what)) for name, what in body.definitions), walk(body.result))
