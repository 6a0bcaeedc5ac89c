"""Sizes: arithmetic agrees with arithmetic on integers, equal polynomials are one object, and text reads back."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.errors import ParseError
from qcompiler.ir.sizes import (
    Expr,
    Size,
    call,
    ceildiv,
    evaluate,
    floordiv,
    mod,
    parse_size,
    product,
    substitute,
    symbol,
    symbols,
)

S0, S1 = symbol("s0"), symbol("s1")
NAMES = ("s0", "s1", "u7")

# A tree is a name, an integer, or (function, tree, tree); `build` makes a size of it, `run` an integer.
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
}
DIVISIONS = {"floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b}
EXTREMES = {"max": max, "min": min}

Tree = Any
leaves = st.sampled_from(NAMES) | st.integers(-130, 300)
polynomials = st.recursive(leaves, lambda t: st.tuples(st.sampled_from([*OPERATORS]), t, t), max_leaves=6)
divisors = st.sampled_from((1, 2, 3, 64, 128, -2))
trees = st.recursive(
    leaves,
    lambda t: st.one_of(
        st.tuples(st.sampled_from([*OPERATORS, *EXTREMES]), t, t),
        st.tuples(st.sampled_from([*DIVISIONS]), t, divisors),
    ),
    max_leaves=6,
)
bindings = st.fixed_dictionaries({name: st.integers(0, 500) for name in NAMES})


def build(tree: Tree) -> Size:
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return symbol(tree)
    function, *inner = tree
    a, b = map(build, inner)
    if function in OPERATORS:
        size: Size = OPERATORS[function](a, b)
        return size
    return call(function, a, b)


def run(tree: Tree, values: dict[str, int]) -> int:
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return values[tree]
    function, *inner = tree
    result: int = (OPERATORS | DIVISIONS | EXTREMES)[function](*(run(item, values) for item in inner))
    return result


@given(trees, bindings)
@settings(max_examples=600)
def test_arithmetic_on_sizes_is_arithmetic_on_their_values(tree: Tree, values: dict[str, int]) -> None:
    assert evaluate(build(tree), values) == run(tree, values)


@given(trees)
@settings(max_examples=600)
def test_printing_and_parsing_are_inverses(tree: Tree) -> None:
    size = build(tree)
    assert parse_size(str(size)) == size
    assert str(parse_size(str(size))) == str(size)


@given(polynomials, polynomials, polynomials)
@settings(max_examples=300)
def test_equal_polynomials_are_equal_and_print_alike(x: Tree, y: Tree, z: Tree) -> None:
    a, b, c = build(x), build(y), build(z)
    for left, right in [
        (a + b, b + a), (a * b, b * a), ((a + b) + c, a + (b + c)), ((a * b) * c, a * (b * c)),
        (a * (b + c), a * b + a * c), (a - b, -(b - a)), (a + b - b, a), ((a + b) * (a - b), a * a - b * b),
    ]:  # fmt: skip
        assert left == right
        assert hash(left) == hash(right)
        assert str(left) == str(right)


@given(polynomials, polynomials, st.integers(1, 300))
@settings(max_examples=300)
def test_whole_multiples_leave_a_division(x: Tree, y: Tree, by: int) -> None:
    a, b = build(x), build(y)
    assert floordiv(a * by + b, by) == a + floordiv(b, by)
    assert mod(a * by + b, by) == mod(b, by)
    assert floordiv(a * by, by) == a
    assert ceildiv(a * by, by) == a


@given(trees)
def test_no_size_holds_a_zero_term_or_an_unsorted_one(tree: Tree) -> None:
    size = build(tree)
    if isinstance(size, Expr):
        assert all(factor for _, factor in size.terms)
        assert size.terms != (((), size.terms[0][1]),)
        assert [list(atoms) for atoms, _ in size.terms] == [sorted(atoms, key=str) for atoms, _ in size.terms]
        assert symbols(size) <= set(NAMES)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (S0, "s0"),
        (S0 * 2 + 1, "2*s0 + 1"),
        (S1 * S0, "s0*s1"),
        (S0 * -1, "-s0"),
        (7 - S0, "-s0 + 7"),
        (S0 * S0 - S0 * 3 - 4, "s0*s0 - 3*s0 - 4"),
        (ceildiv(S0, 128), "floordiv(s0 + 127, 128)"),
        (ceildiv(S0 * 128, 128), "s0"),
        (ceildiv(S0 + 1, 128), "floordiv(s0, 128) + 1"),
        (floordiv(S0 * 6 + 3, 4), "floordiv(s0 + 1, 2) + s0"),
        (floordiv(S0 * 2 + 1, 4), "floordiv(s0, 2)"),
        (floordiv(S0, S1), "floordiv(s0, s1)"),
        (1024 // S0, "floordiv(1024, s0)"),
        (S0 % 8, "mod(s0, 8)"),
        (7 % S0, "mod(7, s0)"),
        ((S0 * 8) % 8, "0"),
        (S0 // S0, "1"),
        (S0 % S0, "0"),
        (call("max", S1, S0), "max(s0, s1)"),
        (call("max", 3, S0, call("max", 5, S1)), "max(5, s0, s1)"),
        (call("min", S0, S0), "s0"),
        (call("max", 9, 10), "10"),
        (call("pow", S0, 2), "s0*s0"),
        (call("pow", S0, 20), "pow(s0, 20)"),
        (call("pow", 2, 5), "32"),
        (call("strange", S0, 1), "strange(s0, 1)"),
        (product((2, S0, 3)), "6*s0"),
        (product(()), "1"),
        (S0 - S0, "0"),
    ],
)
def test_the_normal_form(size: Size, text: str) -> None:
    assert str(size) == text
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("s0+s1", "s1 + s0"), ("2*(s0 + 1)", "2*s0 + 2"), ("s0//128", "floordiv(s0, 128)"), ("-s0", "0 - s0"),
        (" 7 ", "7"), ("(3)", "3"), ("max(4, s0, 2)", "max(4, s0)"), ("6 // 4", "1"),
        ("s0-1", "s0 - 1"), ("s0 -1", "s0 - 1"), ("-3*s0-2*s1", "0 - 3*s0 - 2*s1"),
        ("8 - 4 - 2", "2"), ("-7 // 2", "-3"),
    ],
)  # fmt: skip
def test_other_spellings(text: str, same: str) -> None:
    assert parse_size(text) == parse_size(same)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "<size>:1:1: expected a number or a symbol, but got the end of the text"),
        ("2 3", "<size>:1:3: expected the end of the text, but got '3'\n2 3\n  ^"),
        ("s0 +", "<size>:1:5: expected a number or a symbol, but got the end of the text"),
        ("s0.x", "<size>:1:1: expected a number or a symbol, but got 's0.x'"),
        ("(s0", "<size>:1:4: expected ')', but got the end of the text; '(' is not closed"),
        ("max(s0", "<size>:1:7: expected ',' or ')', but got the end of the text; '(' is not closed"),
        ("max()", "<size>:1:1: max takes at least 1 size, not 0"),
        ("f()", "<size>:1:1: f takes at least 1 size, not 0"),
        ("floordiv(s0)", "floordiv takes 2 sizes, not 1"),
        ("mod(s0, 1, 2)", "mod takes 2 sizes, not 3"),
        ("floordiv(s0, 0)", "s0 is divided by zero"),
        ("(" * 9999, "brackets are nested more than 64 deep"),
        ("9" * 9999, "a number in a size is beyond 64 bits"),
        ("*".join(["9999999999"] * 2), "a number in a size is beyond 64 bits"),
        ("pow(9, 999999999)", "9 has the exponent 999999999, which is more than 64"),
        ("*".join(["(a+b+c+d+e+f+g+h)"] * 9), "a size has more than 1024 terms"),
        ("²", "unexpected character '²'"),
        ("5 // 0", "5 is divided by zero"),
        ("mod(5, 0)", "5 is divided by zero"),
        ("pow(s0, -1)", "s0 has a negative exponent, -1"),
        ("s0 - -1", "<size>:1:6: expected a number or a symbol, but got '-1'"),
        ("pow(s0, 1 - 2)", "s0 has a negative exponent, -1"),
        ("s0 / 2", "<size>:1:4: expected the end of the text, but got '/'"),
        ("s0 ** 2", "<size>:1:5: expected a number or a symbol, but got '*'"),
    ],
)
def test_malformed_sizes_say_why(text: str, message: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse_size(text)
    assert message in str(caught.value)


@given(trees, bindings)
def test_substituting_some_symbols_leaves_the_value(tree: Tree, values: dict[str, int]) -> None:
    some = {"s0": values["s0"]}
    size = substitute(build(tree), some)
    assert not symbols(size) & some.keys() and evaluate(size, values) == evaluate(build(tree), values)


def test_evaluating_names_the_symbol_that_is_missing() -> None:
    with pytest.raises(KeyError, match="s1"):
        evaluate(S0 * S1, {"s0": 3})
    with pytest.raises(KeyError, match="strange"):
        evaluate(call("strange", S0), {"s0": 3})


def test_symbols_are_found_inside_calls() -> None:
    assert symbols(call("max", S0, floordiv(S1, 8)) + 1) == {"s0", "s1"}
    assert symbols(4) == frozenset()
