"""The tree of a fused expression.

    bf16(where(i3 < 32, neg(x0[i0, i3 + 32]), x0[i0, i3 - 32]) * x1)
    cos(number(x0(i0) + i1) * x1[i2])                   x2[x3(i0, i1), i2]

An index is a `Size` over i0, i1, …, the indices of the element of the result that is computed, and over elements of
integer operands: `x0(i0)` is element i0 of the operand x0.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qcompiler.ir.sizes import Atom, Size, call, symbol
from qcompiler.ir.sizes import Call as SizeCall

INDEX = re.compile(r"i[0-9]")
"""An index of the result."""

INTEGERS = re.compile(r"x(0|[1-9][0-9]*)")
"""An integer operand, whose elements may be part of an index."""

ROUNDING = ("floordiv", "mod")
"""Functions of an index expression; elements of integers, which may be negative, are never their operands."""


@dataclass(frozen=True)
class Name:
    """The element of an operand at the place of the result's element, or an earlier definition."""

    name: str


@dataclass(frozen=True)
class Number:
    """An FP32 literal."""

    value: float


@dataclass(frozen=True)
class IndexNumber:
    """The value of an index expression, rounded to FP32."""

    size: Size


@dataclass(frozen=True)
class Load:
    """The element of an operand at an index of its own: one `Size` for each axis.

    If the index depends on elements of integer operands, and is outside the operand, the element is NaN.
    """

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


Expression = Name | Number | IndexNumber | Load | Where | Call


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


def sizes(what: Expression) -> tuple[Size, ...]:
    """The index expressions of an expression itself, not of its parts."""
    if isinstance(what, Load):
        return what.index
    if isinstance(what, IndexNumber):
        return (what.size,)
    return (what.condition.left, what.condition.right) if isinstance(what, Where) else ()


def resized(what: Expression, change: Callable[[Size], Size]) -> Expression:
    """The same expression with other index expressions, but the same parts."""
    if isinstance(what, Load):
        return Load(what.name, tuple(map(change, what.index)))
    if isinstance(what, IndexNumber):
        return IndexNumber(change(what.size))
    if isinstance(what, Where):
        return Where(Less(change(what.condition.left), change(what.condition.right)), what.then, what.other)
    return what


def indices(size: Size) -> Iterator[str]:
    """The symbols of an index expression, once per occurrence."""
    for atom in _atoms(size):
        if isinstance(atom, SizeCall):
            for arg in atom.args:
                yield from indices(arg)
        else:
            yield atom


def elements(size: Size) -> Iterator[SizeCall]:
    """The elements of integer tensors in an index expression that has no other functions than `why_no_index` allows."""
    return (atom for atom in _atoms(size) if isinstance(atom, SizeCall) and atom.function not in ROUNDING)


def renamed(size: Size, name: Callable[[str], str]) -> Size:
    """An index expression with other names of integer tensors."""
    total: Size = 0
    for atoms, factor in () if isinstance(size, int) else size.terms:
        term: Size = factor
        for atom in atoms:
            if not isinstance(atom, SizeCall):
                term = term * symbol(atom)
            elif atom.function in ROUNDING:
                term = term * call(atom.function, *atom.args)
            else:
                term = term * call(name(atom.function), *atom.args)
        total = total + term
    return size if isinstance(size, int) else total


def why_no_index(size: Size, integers: re.Pattern[str] = INTEGERS) -> str | None:
    """Why a size is not an index expression: it has other symbols or functions; None if it is one.

    Args:
        size: A size.
        integers: The names of integer tensors.
    """
    for atom in _atoms(size):
        if isinstance(atom, str):
            if not INDEX.fullmatch(atom):
                return f"'{atom}' is not an index of the result such as i0"
            continue
        if atom.function in ROUNDING:
            if not isinstance(by := atom.args[1], int) or by < 1:
                return f"'{atom}' is neither floordiv nor mod by a positive integer"
            arguments: tuple[Size, ...] = atom.args[:1]
        elif integers.fullmatch(atom.function):
            arguments = atom.args
        else:
            return f"'{atom}' is neither floordiv nor mod by a positive integer"
        for arg in arguments:
            if (why := why_no_index(arg, integers)) is not None:
                return why
            if inner := next(elements(arg), None):
                return f"'{inner}' is inside of '{atom}': elements of integers can only be added and multiplied"
    return None


def _atoms(size: Size) -> Iterator[Atom]:
    return (atom for atoms, _ in (() if isinstance(size, int) else size.terms) for atom in atoms)
