"""Linear inequalities over integers: every answer is compared with all integers of a box."""

from itertools import product

import pytest
from element_values import At
from hypothesis import given
from hypothesis import strategies as st

from passes.analyses.inequalities import (
    FALSE,
    TRUE,
    Condition,
    Conjunction,
    TooComplex,
    both,
    contradictory,
    either,
    implies,
    impossible,
    negation,
    nonnegative,
    simplified,
    zero,
)
from qcompiler.ir import Expr, Size, parse_size, symbol

NAMES = "xyz"
BOX = range(-3, 4)


def in_box() -> Conjunction:
    sides = (nonnegative(limit) for name in NAMES for limit in (symbol(name) + 3, 3 - symbol(name)))
    (facts,) = both(*sides)
    return facts


FACTS = in_box()


@st.composite
def sizes(draw: st.DrawFn) -> Size:
    size: Size = draw(st.integers(-6, 6))
    for name in NAMES:
        size = size + symbol(name) * draw(st.integers(-3, 3))
    return size


@st.composite
def conditions(draw: st.DrawFn) -> Condition:
    terms = [nonnegative, zero, lambda size: negation(zero(size))]
    parts = [draw(st.sampled_from(terms))(draw(sizes())) for _ in range(draw(st.integers(1, 3)))]
    return draw(st.sampled_from([both, either]))(*parts)


def solutions(condition: Condition) -> set[tuple[int, ...]]:
    points = product(BOX, repeat=len(NAMES))
    return {point for point in points if At(dict(zip(NAMES, point, strict=True))).holds(condition)}


ALL = solutions(TRUE)


@given(conditions(), conditions())
def test_operations_on_conditions_are_those_of_sets(a: Condition, b: Condition) -> None:
    assert solutions(negation(a)) == ALL - solutions(a)
    assert solutions(both(a, b)) == solutions(a) & solutions(b)
    assert solutions(either(a, b)) == solutions(a) | solutions(b)
    assert solutions(simplified(a, FACTS)) == solutions(a)


@given(conditions(), conditions())
def test_what_is_proven_holds_in_the_box(a: Condition, b: Condition) -> None:
    assert not impossible(a, FACTS) or not solutions(a)
    assert not implies(a, b, FACTS) or solutions(a) <= solutions(b)


@pytest.mark.parametrize(
    "inequalities",
    [
        ["x - y - 1", "y - z - 1", "z - x - 1"],
        ["2*x - 2*y - 1", "2*y - 2*x + 1"],  # 2 * (x - y) = 1 has no integer solution
        ["x - 4"],
        ["x - 2*floordiv(x, 2) - 2"],
        ["mod(x, 3) - 3"],
        ["-1 - mod(x, 3)"],
        ["x - floordiv(x, 4)*4 - mod(x, 4) - 1"],
        ["min(x, y) - x - 1"],
        ["x - max(x, 5) - 1 + 1", "4 - x", "x - 5 + 0*y"],
        ["x*y - 1", "0 - x*y"],
    ],
)
def test_contradictions_are_found(inequalities: list[str]) -> None:
    sizes = [
        size for text in inequalities if isinstance(size := parse_size(text.replace("-1 - mod", "0 - 1 - mod")), Expr)
    ]
    assert contradictory(frozenset(sizes) | FACTS)


def test_equal_conditions_are_implied_both_ways() -> None:
    q, k = symbol("x"), symbol("y")
    causal = nonnegative(q - k)
    split = either(zero(q - k), nonnegative(q - k - 1))
    assert implies(causal, split, frozenset()) and implies(split, causal, frozenset())
    assert simplified(either(causal, nonnegative(k - q - 1)), frozenset()) == TRUE
    assert simplified(both(causal, nonnegative(q - k + 2)), frozenset()) == causal
    assert nonnegative(-1) == FALSE and nonnegative(0) == TRUE


def test_too_many_cases_are_an_error() -> None:
    pairs = [either(nonnegative(symbol(f"a{i}")), nonnegative(symbol(f"b{i}"))) for i in range(8)]
    with pytest.raises(TooComplex):
        both(*pairs)
