"""Where the elements of moved values come from, as chains of simple conditions that a kernel evaluates.

    %y = aten.cat([%a, %b], 1)              y[i0, i1]  =  a[i0, i1] if i1 < 32, else b[i0, i1 - 32]
    %y = aten.embedding(%w, %ids)           y[i0, i1, i2]  =  w[%ids(i0, i1), i2]

By the rows of `index_moves`. A place may depend on elements of integer tensors.
"""

from dataclasses import dataclass

from passes.analyses.index_expressions import Element, Index, Number, Site, Unknown, constant
from passes.analyses.index_moves import MOVES, PICKS
from passes.analyses.inequalities import Condition, Conjunction, TooComplex, negation, simplified
from passes.analyses.integer_elements import TENSOR, IntegerElements
from qcompiler.dialects.expression_nodes import Less, why_no_index
from qcompiler.ir import Size, Value
from qcompiler.ir.sizes import Call, Expr, call

MOVING = {**MOVES, **PICKS}
"""Operations that only move elements -> their rows."""

LEAF = "%leaf"


@dataclass(frozen=True)
class Place:
    """An element of a value, needed only for some elements of the root.

    Attributes:
        value: The value.
        at: The index of the element, over i0, i1, ….
        guard: What holds wherever the element is needed, besides the limits of indices and sizes.
    """

    value: Value
    at: Index
    guard: Conjunction = frozenset()


Source = tuple[Less | None, Place]
"""A condition, and the place where an element is if the condition holds, and those before it do not; None: always."""


def place_of(value: Value, at: Index, guard: Conjunction = frozenset()) -> Place:
    """A place; indices along axes of size 1 are 0."""
    return Place(value, tuple(0 if n == 1 else i for i, n in zip(at, value.tensor.shape, strict=True)), guard)


def sources_of(place: Place, facts: Conjunction, integers: IntegerElements) -> tuple[Source, ...] | None:
    """Where an element of a moved value comes from; None if that cannot be written as indices and conditions.

    Args:
        place: An element of the result of an operation in `MOVING`.
        facts: The limits of indices and sizes.
        integers: The elements of integer values.
    """
    found: list[tuple[Value, Index, Conjunction]] = []
    site = _MovingSite(place, facts | place.guard, found, integers)
    try:
        cases = MOVING[place.value.op.name].element(site).cases
        return _chained(list(cases), found, facts, place.guard)
    except (Unknown, TooComplex):
        return None


class _MovingSite(Site):
    """Notes which elements a row asks for; each is an unknown with a number. Elements of integers are their values."""

    def __init__(
        self, place: Place, facts: Conjunction, found: list[tuple[Value, Index, Conjunction]],
        integers: IntegerElements, at: Index | None = None,
    ) -> None:  # fmt: skip
        self.op, self.output, self.at = place.value.op, place.value.index, place.at if at is None else at
        self.facts, self._place, self._found, self._integers = facts, place, found, integers

    def element(self, value: Value, at: Index) -> Element:
        if not value.tensor.dtype.is_float:
            element = self._integers.element(value, at, self.facts)
            if element is None:
                raise self.unknown("its index cannot be read by a kernel")
            return constant(element)
        self._found.append((value, at, self.facts))
        return constant(call(LEAF, len(self._found) - 1))

    def within(self, index: Size, size: Size) -> Element:
        nonnegative = self._integers.is_nonnegative(index, self.facts)
        return constant(index) if nonnegative else super().within(index, size)

    def assuming(self, condition: Condition, at: Index) -> Site:
        (more,) = condition if len(condition) == 1 else (frozenset(),)
        return _MovingSite(self._place, self.facts | more, self._found, self._integers, at)


def _chained(
    cases: list[tuple[Condition, Number]],
    found: list[tuple[Value, Index, Conjunction]],
    facts: Conjunction,
    guard: Conjunction,
) -> tuple[Source, ...] | None:
    """The cases in an order in which each, but the last, needs one inequality to be distinguished from the rest."""
    chain: list[Source] = []
    while cases:
        known = facts | guard
        for case in cases:
            conditions = [*simplified(case[0], known)]
            if len(cases) == 1 or (len(conditions) == 1 and len(conditions[0]) == 1):
                break
        else:
            return None
        cases.remove(case)
        less: Less | None = None
        if cases:
            (size,) = conditions[0]
            less = _less(size)
            (otherwise,) = negation(frozenset({frozenset({size})}))
            guard = guard | otherwise
        place = _place(case[1], found, facts)
        if place is None or (less is not None and any(why_no_index(side, TENSOR) for side in (less.left, less.right))):
            return None
        chain.append((less, place))
    return tuple(chain)


def _place(number: Number, found: list[tuple[Value, Index, Conjunction]], facts: Conjunction) -> Place | None:
    match number:
        case Expr(terms=(((Call("%leaf", (int(which),)),), 1),)):
            value, at, held = found[which]
            place = place_of(value, at, held - facts)
            return None if any(why_no_index(index, TENSOR) for index in place.at) else place
    return None


def _less(size: Expr) -> Less:
    """`size >= 0` as `left < right`, without negative terms."""
    left: Size = 0
    right: Size = 0
    for atoms, factor in size.terms:
        term = Expr(((atoms, abs(factor)),)) if atoms else abs(factor)
        if not atoms and factor < 0:
            left = left + (-factor - 1)
        elif factor > 0:
            right = right + (term if atoms else factor + 1)
        else:
            left = left + term
    if not any(not atoms for atoms, _ in size.terms):
        right = right + 1
    return Less(left, right)
