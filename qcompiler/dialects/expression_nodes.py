"""The tree of a fused expression.

    bf16(where(i3 < 32, neg(x0[i0, i3 + 32]), x0[i0, i3 - 32]) * x1)

An index is a `Size` over i0, i1, …, the indices of the element of the result that is computed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qcompiler.ir.sizes import Call as SizeCall
from qcompiler.ir.sizes import Size

INDEX = re.compile(r"i[0-9]")
"""An index of the result."""


@dataclass(frozen=True)
class Name:
    """The element of an operand at the place of the result's element, or an earlier definition."""

    name: str


@dataclass(frozen=True)
class Number:
    """An FP32 literal."""

    value: float


@dataclass(frozen=True)
class Load:
    """The element of an operand at an index of its own: one `Size` for each axis."""

    name: str
    index: tuple[Size, ...]

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(map(str, self.index))}]"


@dataclass(frozen=True)
class Less:
    """The condition `left < right` on indices."""

    left: Size
    right: Size

    def __str__(self) -> str:
        return f"{self.left} < {self.right}"


@dataclass(frozen=True)
class Where:
    """One of two expressions; only the chosen one is evaluated, so its loads may be outside their operand elsewhere."""

    condition: Less
    then: "Expression"
    other: "Expression"


@dataclass(frozen=True)
class Call:
    """A call of a function in `FUNCTIONS` or of an operator + - * /."""

    function: str
    args: tuple["Expression", ...]


Expression = Name | Number | Load | Where | Call


def parts(what: Expression) -> tuple[Expression, ...]:
    """The expressions directly inside an expression."""
    if isinstance(what, Where):
        return what.then, what.other
    return what.args if isinstance(what, Call) else ()


def rebuilt(what: Expression, inner: tuple[Expression, ...]) -> Expression:
    """The same expression with other parts."""
    if isinstance(what, Where):
        return Where(what.condition, *inner)
    return Call(what.function, inner) if isinstance(what, Call) else what


def indices(size: Size) -> Iterator[str]:
    """The symbols of an index expression, once per occurrence."""
    for atoms, _ in () if isinstance(size, int) else size.terms:
        for atom in atoms:
            if isinstance(atom, SizeCall):
                for arg in atom.args:
                    yield from indices(arg)
            else:
                yield atom


def why_no_index(size: Size) -> str | None:
    """Why a size is not an index expression: it has other symbols or functions; None if it is one."""
    for atoms, _ in () if isinstance(size, int) else size.terms:
        for atom in atoms:
            if isinstance(atom, SizeCall):
                by = atom.args[1] if atom.function in ("floordiv", "mod") else None
                if not isinstance(by, int) or by < 1:
                    return f"'{atom}' is neither floordiv nor mod by a positive integer"
                if (why := why_no_index(atom.args[0])) is not None:
                    return why
            elif not INDEX.fullmatch(atom):
                return f"'{atom}' is not an index of the result such as i0"
    return None
