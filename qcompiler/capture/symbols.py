"""Torch's symbolic sizes -> ours: sympy expressions become canonical `Size`s over s0, s1, … in order of appearance."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import sympy
import torch
from torch.utils._sympy.numbers import int_oo

from qcompiler.capture.signature import Condition
from qcompiler.ir.ranges import Range
from qcompiler.ir.sizes import Size, call, floordiv, product, symbol

HUGE = 2**62
"""Torch's upper limits from here on mean "no limit"."""


class Inexpressible(Exception):
    """An expression has no equivalent in `qcompiler.ir.sizes`."""


class Symbols:
    """The renaming of one program's symbols.

    Attributes:
        names: Torch's symbol -> ours: s0, s1, …, and u0, u1, … for symbols that depend on data.
    """

    def __init__(self) -> None:
        self.names: dict[sympy.Symbol, str] = {}
        self._opaque: dict[sympy.Expr, Size] = {}
        self._unbacked = 0

    def size(self, number: Any) -> Size:
        """Converts a dimension: an integer, or torch's SymInt."""
        if not isinstance(number, torch.SymInt):
            return int(number)
        expression = number.node.expr
        try:
            return self.convert(expression)
        except Inexpressible:
            # A size that the IR cannot express is still one size: equal expressions map to the same unknown.
            return self._opaque.setdefault(expression, symbol(self._fresh_unbacked()))

    def value(self, number: torch.SymInt) -> Size | None:
        """Converts a number that is not a dimension; None if the IR cannot express it."""
        try:
            return self.convert(number.node.expr)
        except Inexpressible:
            return None

    def ranges(self, constraints: Mapping[sympy.Symbol, Any]) -> dict[str, Range]:
        """Returns the ranges of the symbols seen so far; `constraints` is an ExportedProgram's `range_constraints`."""
        found = {}
        for theirs, ours in self.names.items():
            bounds = constraints.get(theirs)
            low = 0 if bounds is None or bounds.lower in (-int_oo, -sympy.oo) else max(0, int(bounds.lower))
            high = (
                None
                if bounds is None or bounds.upper in (int_oo, sympy.oo) or bounds.upper >= HUGE
                else int(bounds.upper)
            )
            found[ours] = Range(low, high)
        return found

    def conditions(self, guards: Iterable[sympy.Basic]) -> tuple[Condition, ...]:
        """Returns the relations among `guards` (a ShapeEnv's, simplified) over symbols seen so far.

        Omits bounds on a single symbol, which the ranges contain, and relations that the IR cannot express.
        """
        found: dict[Condition, None] = {}
        for guard in guards:
            for part in guard.args if isinstance(guard, sympy.And) else (guard,):
                relation = RELATIONS.get(type(part).__name__)
                if relation is None or not part.free_symbols or not part.free_symbols <= self.names.keys():
                    continue
                if (
                    relation not in ("==", "!=")
                    and any(arg.is_Symbol for arg in part.args)
                    and len(part.free_symbols) == 1
                ):
                    continue
                with suppress(Inexpressible):
                    found[Condition(relation, self.convert(part.args[0]), self.convert(part.args[1]))] = None
        return tuple(found)

    def convert(self, expression: Any) -> Size:
        """Converts a sympy expression; Inexpressible if the IR has no equivalent."""
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            return symbol(self._name(expression))
        if expression.is_Add:
            return self._sum(expression)
        if expression.is_Mul:
            return self._product(expression)
        if expression.is_Pow and expression.exp.is_Integer and expression.exp > 0:
            return product((self.convert(expression.base),) * int(expression.exp))
        function = type(expression).__name__
        if function in FUNCTIONS:
            return FUNCTIONS[function](*map(self.convert, expression.args))
        if function in ROUNDINGS and type(expression.args[0]).__name__ == "IntTrueDiv":
            return ROUNDINGS[function](*map(self.convert, expression.args[0].args))
        raise Inexpressible(str(expression))

    def _sum(self, expression: sympy.Expr) -> Size:
        # Fractions may cancel only in the whole sum, as in s0/2 + s1/2, so use one common denominator.
        terms = [term.as_coeff_Mul() for term in expression.args]
        denominator = math.lcm(*(int(factor.q) for factor, _ in terms if factor.is_Rational))
        total: Size = 0
        for factor, rest in terms:
            total = total + self.convert(factor * denominator * rest)
        return total if denominator == 1 else floordiv(total, denominator)

    def _product(self, expression: sympy.Expr) -> Size:
        factor, rest = expression.as_coeff_Mul()
        if not factor.is_Rational:
            raise Inexpressible(str(expression))
        above: Size = int(factor.p)
        below: Size = int(factor.q)
        for part in sympy.Mul.make_args(rest):
            if part.is_Pow and part.exp.is_Integer and part.exp < 0:
                below = below * self.convert(part.base**-part.exp)
            else:
                above = above * self.convert(part)
        return above if below == 1 else floordiv(above, below)

    def _name(self, theirs: sympy.Symbol) -> str:
        if theirs not in self.names:
            backed = sum(name.startswith("s") for name in self.names.values())
            # torch names data-dependent symbols u0, u1, …, and all others s0, s1, …
            self.names[theirs] = self._fresh_unbacked() if theirs.name.startswith("u") else f"s{backed}"
        return self.names[theirs]

    def _fresh_unbacked(self) -> str:
        self._unbacked += 1
        return f"u{self._unbacked - 1}"


RELATIONS = {
    "Equality": "==", "Unequality": "!=", "StrictLessThan": "<", "LessThan": "<=", "StrictGreaterThan": ">",
    "GreaterThan": ">=",
}  # fmt: skip
"""Sympy's relations, by name."""

FUNCTIONS: Mapping[str, Callable[..., Size]] = {
    "FloorDiv": floordiv,
    "CleanDiv": floordiv,
    "CeilDiv": lambda a, b: -floordiv(-a, b),
    "Mod": lambda a, b: call("mod", a, b),
    "PythonMod": lambda a, b: call("mod", a, b),
    "ModularIndexing": lambda a, divisor, modulus: call("mod", floordiv(a, divisor), modulus),
    "Max": lambda *args: call("max", *args),
    "Min": lambda *args: call("min", *args),
    "PowByNatural": lambda base, exponent: call("pow", base, exponent),
    "Identity": lambda a: a,
}
"""Torch's sympy functions, by name, because the classes move between versions."""

ROUNDINGS: Mapping[str, Callable[..., Size]] = {
    "CeilToInt": lambda a, b: -floordiv(-a, b),
    "FloorToInt": floordiv,
    "TruncToInt": floordiv,  # sizes are not negative, so truncation equals floor
}
"""Functions that round a true division of integers."""
