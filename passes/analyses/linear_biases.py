"""Proves that a bias of attention scores is linear in the key's position: ALiBi.

    bias[b, h, q, k] = 0.25 * %slopes(h) * k - 0.25 * %slopes(h) * n         ->      slope[h] = 0.25 * %slopes(h)

A softmax ignores an addend that is the same for all keys, so only the factor of k counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from passes.analyses.inequalities import Condition, Conjunction, implies, zero
from passes.analyses.real_numbers import Real, real
from qcompiler.ir import DType
from qcompiler.ir.sizes import Atom, Call, Expr, Monomial, substitute, symbols


class NotLinear(Exception):
    """A bias is not linear in the key's position, or its slope is not a constant for each head: the reason."""


@dataclass(frozen=True)
class Slopes:
    """A bias slope[h] * (k - q), plus a number that is the same for all keys.

    Attributes:
        terms: The slope as a sum: elements of values, such as %slopes(h), and the factor of their product.
        exact: Whether the number that is the same for all keys is 0.
        narrow: The element type of fewer than 32 bits to which the model rounds the bias, if any.
    """

    terms: tuple[tuple[tuple[Call, ...], float], ...]
    exact: bool
    narrow: DType | None = None


def slopes_of(
    cases: Sequence[tuple[Condition, Real]], head: Expr, query: Expr, key: Expr, facts: Conjunction
) -> Slopes | None:
    """The slopes of a bias; None without a bias.

    Args:
        cases: Where a query reads a key, and what is added to the score there.
        head: The index of the head.
        query: The position of the query.
        key: The position of the key.
        facts: What holds for all indices.

    Raises:
        NotLinear: The bias has another form.
    """
    own = [implies(condition, zero(query - key), facts) for condition, _ in cases]
    first = cases[own.index(False) if False in own else 0][1]
    for (_, other), only_own in zip(cases, own, strict=True):
        same = only_own and _at(other, key, query).terms == _at(first, key, query).terms
        if other.terms != first.terms and not same:
            raise NotLinear("its bias has a different form for different keys")
    (k,), (h,) = symbols(key), symbols(head)
    found = [(_without(atoms, k, h), factor) for atoms, factor in first.terms if k in symbols(Expr(((atoms, 1),)))]
    if not found:
        return None
    slope = Real(tuple(found))
    rest = first + -(slope * real(key - query))
    return Slopes(tuple((tuple(map(_call, atoms)), factor) for atoms, factor in found), not rest.terms, first.narrow)


def _at(bias: Real, key: Expr, place: Expr) -> Real:
    """The bias of the key at a place."""
    total, bindings = Real(), {name: place for name in symbols(key)}
    for atoms, factor in bias.terms:
        total += real(substitute(Expr(((atoms, 1),)), bindings)) * factor
    return total


def _without(atoms: Monomial, key: str, head: str) -> Monomial:
    """The slope of a term with the key's position, which must be one of its factors, once."""
    rest = [atom for atom in atoms if atom != key]
    if len(rest) != len(atoms) - 1 or any(key in _names(atom) for atom in rest):
        raise NotLinear("its bias is not linear in the key's position")
    if not all(isinstance(atom, Call) and atom.function.startswith("%") and _names(atom) <= {head} for atom in rest):
        raise NotLinear("the slope of its bias is not a constant for each head")
    return tuple(rest)


def _names(atom: Atom) -> frozenset[str]:
    return symbols(Expr((((atom,), 1),)))


def _call(atom: Atom) -> Call:
    assert isinstance(atom, Call)  # checked above
    return atom
