"""Real numbers that vary with indices: sums of products of symbols and unknowns with floating-point factors.

    0.25 * %slopes(h) * k - 3.5

They ignore rounding, so they may describe a bias, but never decide a condition.
"""

from dataclasses import dataclass

from qcompiler.ir import DType, Size
from qcompiler.ir.sizes import Expr, Monomial


@dataclass(frozen=True)
class Real:
    """A sum of terms.

    Attributes:
        terms: Products of symbols and unknowns -> their factor, which is not 0.
        narrow: The element type of fewer than 32 bits to which the model rounds the number on the way, if any.
    """

    terms: tuple[tuple[Monomial, float], ...] = ()
    narrow: DType | None = None

    def __add__(self, other: "Real") -> "Real":
        return _sum([*self.terms, *other.terms], self.narrow or other.narrow)

    def __mul__(self, other: "Real | float") -> "Real":
        if not isinstance(other, Real):
            other = real(other)
        products = [((*a, *b), x * y) for a, x in self.terms for b, y in other.terms]
        return _sum(products, self.narrow or other.narrow)

    def __neg__(self) -> "Real":
        return self * -1.0

    def rounded(self, dtype: DType) -> "Real":
        """The number after a model rounds it to an element type."""
        return Real(self.terms, dtype) if dtype.bits < 32 else self


def real(number: "Size | float | Real") -> Real:
    """An exact number as a real number."""
    if isinstance(number, Real):
        return number
    terms = number.terms if isinstance(number, Expr) else (((), number),)
    return _sum([(atoms, float(factor)) for atoms, factor in terms], None)


def _sum(terms: list[tuple[Monomial, float]], narrow: DType | None) -> Real:
    total: dict[Monomial, float] = {}
    for atoms, factor in terms:
        key = tuple(sorted(atoms, key=str))
        total[key] = total.get(key, 0.0) + factor
    kept = ((atoms, factor) for atoms, factor in total.items() if factor)
    return Real(tuple(sorted(kept, key=lambda term: tuple(map(str, term[0])))), narrow)
