"""Conditions over integers: disjunctions of conjunctions of linear inequalities, with an exact contradiction test.

    k <= q  and  not k < q - 4      ->      {{q - k >= 0, k - q + 4 >= 0}}

A condition is a set of conjunctions, and a conjunction is a set of `Size`s that are at least 0. Everything that is not
a sum of integers (a product of two symbols, an element of an input) is one unknown of the linear system.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, product
from math import gcd

from qcompiler.ir.sizes import Call, Expr, Monomial, Size, call

Conjunction = frozenset[Expr]
"""Sizes that are all at least 0."""

Condition = frozenset[Conjunction]
"""Conjunctions of which at least one holds."""

TRUE: Condition = frozenset({frozenset()})
FALSE: Condition = frozenset()

Row = frozenset[tuple[Monomial, int]]
"""One inequality as unknown -> coefficient; the constant is the coefficient of ()."""

MOST_ROWS = 400
"""Inequalities in one elimination step; a larger system counts as not contradictory."""

MOST_CONJUNCTIONS = 64
"""Conjunctions of one condition; a larger one raises TooComplex."""


class TooComplex(Exception):
    """A condition has too many cases to decide, or depends on a number that ignores rounding."""


def nonnegative(size: Size) -> Condition:
    """The condition size >= 0."""
    return _of_row(_row(size)) if isinstance(size, Expr) else TRUE if size >= 0 else FALSE


def zero(size: Size) -> Condition:
    """The condition size == 0."""
    return both(nonnegative(size), nonnegative(-size))


def negation(condition: Condition) -> Condition:
    """The condition that holds where this one does not."""
    result = TRUE
    for conjunction in condition:
        result = both(result, either(*(nonnegative(-size - 1) for size in conjunction)))
    return result


def both(*conditions: Condition) -> Condition:
    """All of the conditions hold."""
    result = TRUE
    for condition in conditions:
        result = _tidy(a | b for a, b in product(result, condition))
    return result


def either(*conditions: Condition) -> Condition:
    """At least one of the conditions holds."""
    return _tidy(chain.from_iterable(conditions))


def impossible(condition: Condition, facts: Conjunction) -> bool:
    """Whether the condition is proven never to hold, given facts."""
    return all(contradictory(conjunction | facts) for conjunction in condition)


def implies(condition: Condition, other: Condition, facts: Conjunction) -> bool:
    """Whether `other` is proven to hold wherever `condition` and the facts do."""
    return impossible(both(condition, negation(other)), facts)


def simplified(condition: Condition, facts: Conjunction) -> Condition:
    """An equivalent condition, given facts: without impossible conjunctions and without implied inequalities."""
    kept = [_reduced(each, facts) for each in condition if not contradictory(each | facts)]
    result = _tidy(kept)
    return TRUE if len(result) > 1 and impossible(negation(result), facts) else result


def unknowns(condition: Condition) -> frozenset[Monomial]:
    """The unknowns of all inequalities."""
    return frozenset(atoms for each in condition for size in each for atoms, _ in size.terms if atoms)


@lru_cache(maxsize=1 << 16)
def contradictory(conjunction: Conjunction) -> bool:
    """Whether inequalities are proven to have no common integer solution, by Fourier-Motzkin elimination.

    Dividing an inequality by the greatest common divisor of its coefficients rounds its constant down, which keeps all
    integer solutions. A result of False proves nothing.
    """
    rows = {_tight(_row(size)) for size in (*conjunction, *_axioms(conjunction))}
    while True:
        if any(not any(atoms for atoms, _ in row) and dict(row).get((), 0) < 0 for row in rows):
            return True
        rows = {row for row in rows if any(atoms for atoms, _ in row)}
        if not rows or len(rows) > MOST_ROWS:
            return False
        rows = _without_one_unknown([dict(row) for row in rows])


def _without_one_unknown(rows: Sequence[dict[Monomial, int]]) -> set[Row]:
    """The inequalities that follow for the other unknowns; eliminates the unknown that makes the fewest."""
    signs: dict[Monomial, list[int]] = {}
    for row in rows:
        for atoms, factor in row.items():
            if atoms:
                signs.setdefault(atoms, [0, 0])[factor > 0] += 1
    gone = min(signs, key=lambda atoms: (signs[atoms][0] * signs[atoms][1], str(atoms)))
    kept = {frozenset(row.items()) for row in rows if gone not in row}
    upper = [row for row in rows if row.get(gone, 0) < 0]
    lower = [row for row in rows if row.get(gone, 0) > 0]
    for low, high in product(lower, upper):
        a, b = -high[gone], low[gone]
        total = {atoms: a * low.get(atoms, 0) + b * high.get(atoms, 0) for atoms in {*low, *high}}
        kept.add(_tight(frozenset((atoms, factor) for atoms, factor in total.items() if factor)))
    return kept


def _axioms(conjunction: Conjunction) -> Iterator[Expr]:
    """What holds for the functions in the inequalities: floor division, modulo, minimum, maximum."""
    seen: set[Call] = set()
    waiting = [size for size in conjunction]
    while waiting:
        size = waiting.pop()
        for atom in {atom for atoms, _ in size.terms for atom in atoms if isinstance(atom, Call)} - seen:
            seen.add(atom)
            new = [fact for fact in _about(atom) if isinstance(fact, Expr)]
            waiting += new
            yield from new


def _about(atom: Call) -> Iterable[Size]:
    value = Expr((((atom,), 1),))
    match atom:
        case Call("floordiv", (a, int(b))):
            rest = a - value * b
            return rest, b - 1 - rest
        case Call("mod", (a, int(b))):
            rest = a - call("floordiv", a, b) * b - value
            return value, b - 1 - value, rest, -rest
        case Call("min", args):
            return [a - value for a in args]
        case Call("max", args):
            return [value - a for a in args]
    return ()


def _row(size: Expr) -> Row:
    return frozenset(size.terms)


def _tight(row: Row) -> Row:
    """The same inequality, divided by the common divisor of its coefficients."""
    divisor = gcd(*(factor for atoms, factor in row if atoms))
    if divisor <= 1:
        return row
    return frozenset((atoms, new) for atoms, factor in row if (new := factor // divisor))


def _of_row(row: Row) -> Condition:
    size: Size = 0
    for atoms, factor in _tight(row):
        size = size + (Expr(((atoms, factor),)) if atoms else factor)
    assert isinstance(size, Expr)
    return frozenset({frozenset({size})})


def _tidy(conjunctions: Iterable[Conjunction]) -> Condition:
    """Drops conjunctions that contradict themselves or imply another one by containing it."""
    kept: list[Conjunction] = []
    for each in sorted(set(conjunctions), key=len):
        if not any(other <= each for other in kept) and not contradictory(each):
            kept.append(each)
    if len(kept) > MOST_CONJUNCTIONS:
        raise TooComplex
    return frozenset(kept)


def _reduced(conjunction: Conjunction, facts: Conjunction) -> Conjunction:
    """The inequalities without those that follow from the others and the facts."""
    for size in sorted(conjunction, key=str):
        others = conjunction - {size}
        if all(contradictory(others | facts | each) for each in nonnegative(-size - 1)):
            conjunction = others
    return conjunction
