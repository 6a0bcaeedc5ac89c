"""What a generated pointwise kernel reads and under which conditions, and index expressions as Triton code.

where(i1 < 4, x0[x1(i0), i1], 0.0)      x1(i0): always;  x0[x1(i0), i1]: where i1 < 4
2*i0 + x1(i0)                           (2 * i0 + e0), if e0 is the name of x1(i0)
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from qcompiler.dialects.expression_nodes import (
    ROUNDING,
    Expression,
    Less,
    Load,
    Where,
    elements,
    indices,
    parts,
    sizes,
)
from qcompiler.ir.sizes import Call as Element
from qcompiler.ir.sizes import Size, symbol

Read = Load | Element
"""A load of a number, or of an element of an integer operand."""

Guard = tuple[tuple[Less, bool], ...]
"""Conditions that all have to hold, or not."""


def source_of(read: Read) -> tuple[int, tuple[Size, ...]]:
    """The operand, and the index in it."""
    name, index = (read.name, read.index) if isinstance(read, Load) else (read.function, read.args)
    return int(name[1:]), index


def moving_axes(read: Read) -> Iterator[tuple[int, int]]:
    """The axes along which the index is not zero, each as (operand, axis)."""
    operand, index = source_of(read)
    return ((operand, axis) for axis, size in enumerate(index) if size != 0)


def computed_axes(read: Read) -> Iterator[tuple[int, int]]:
    """The axes along which the index depends on elements of integer operands."""
    operand, index = source_of(read)
    return ((operand, axis) for axis, size in enumerate(index) if any(elements(size)))


def reads_of(expressions: Sequence[Expression]) -> dict[Read, dict[Guard, None]]:
    """What expressions read, with the conditions under which it is needed: elements of integers first.

    An element comes after those in its conditions.
    """
    guards: dict[Read, dict[Guard, None]] = {}
    for what in expressions:
        for read, guard in _guarded(what, ()):
            guards.setdefault(read, {})[guard] = None
    ordered: dict[Read, dict[Guard, None]] = {}

    def add(read: Read) -> None:
        if read not in ordered:
            for less in (less for guard in needed(guards[read]) for less, _ in guard):
                for element in (*elements(less.left), *elements(less.right)):
                    add(element)
            ordered[read] = guards[read]

    for read in sorted(guards, key=lambda read: isinstance(read, Load)):
        add(read)
    return ordered


def needed(guards: Mapping[Guard, None]) -> tuple[Guard, ...]:
    """The conditions of which one must hold; () if there is none."""
    return () if () in guards else tuple(guards)


def _guarded(what: Expression, guard: Guard) -> Iterator[tuple[Read, Guard]]:
    """The reads of an expression, each with the conditions under which it is evaluated."""
    for size in sizes(what):
        yield from ((element, guard) for element in elements(size))
    if isinstance(what, Load):
        yield what, guard
    elif isinstance(what, Where):
        yield from _guarded(what.then, (*guard, (what.condition, True)))
        yield from _guarded(what.other, (*guard, (what.condition, False)))
    else:
        for part in parts(what):
            yield from _guarded(part, guard)


def terms_of(size: Size) -> list[Size]:
    """The terms of a sum."""
    if isinstance(size, int):
        return [size] if size else []
    return [type(size)(((atoms, factor),)) if atoms else factor for atoms, factor in size.terms]


def changes_within(size: Size, index: str, count: int) -> bool:
    """Whether an index expression may differ between `count` elements whose places along an index are aligned."""
    for atoms, _ in () if isinstance(size, int) else size.terms:
        for atom in atoms:
            if not isinstance(atom, Element):
                if atom == index:
                    return True
                continue
            place, *by = atom.args
            blocks = atom.function == "floordiv" and place == symbol(index) and isinstance(by[0], int)
            if not (blocks and by[0] % count == 0) and any(index in indices(arg) for arg in atom.args):
                return True
    return False


class IndexWriter(NamedTuple):
    """Writes index expressions.

    Attributes:
        names: The names of elements of integer operands, which have 64 bits.
        wide: Whether to compute in 64 bits even if indices have 32.
    """

    names: Mapping[Read, str]
    wide: bool = False

    def text(self, size: Size) -> str:
        """An index expression; operands of // and % are not negative."""
        if isinstance(size, int):
            return str(size)
        cast = ".to(tl.int64)" if self.wide else ""
        terms = []
        for atoms, factor in size.terms:
            factors = [self._call(atom) if isinstance(atom, Element) else f"{atom}{cast}" for atom in atoms]
            terms.append(" * ".join([*([] if factor == 1 and atoms else [str(factor)]), *factors]))
        return f"({' + '.join(terms)})"

    def _call(self, atom: Element) -> str:
        if atom.function not in ROUNDING:
            return self.names[atom]
        inner, by = atom.args
        return f"({self.text(inner)} {'//' if atom.function == 'floordiv' else '%'} {by})"

    def number(self, size: Size) -> str:
        """An index expression as a number, rounded once."""
        if isinstance(size, int):
            return repr(float(size))
        return f"{self._replace(wide=True).text(size)}.to(tl.float32)"

    def condition(self, less: Less, holds: bool = True) -> str:
        """A condition, or its opposite."""
        return f"{self.text(less.left)} {'<' if holds else '>='} {self.text(less.right)}"

    def any_of(self, guards: Sequence[Guard]) -> str:
        """That one of several guards holds."""
        return f"({' | '.join(f'({self._all_of(guard)})' for guard in guards)})"

    def _all_of(self, guard: Guard) -> str:
        return " & ".join(f"({self.condition(less, holds)})" for less, holds in guard)
