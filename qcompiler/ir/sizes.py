"""Dimension sizes: integers, or canonical integer polynomials over symbols.

    s0          2*s0 + 1          s0*s1          floordiv(s0 + 127, 128)          max(s0, s1)
    share(s0, 2, 64)              s0 if it is less than 64, else half of it, rounded up

Polynomials are kept in a normal form, so equal sizes compare equal and print the same. Functions that are not
polynomials (floor division, modulo, minimum, maximum, share, and unknown functions) are atoms of the polynomial.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from math import gcd
from operator import add, mul, sub

from qcompiler.text import Reader, Source, Token


@dataclass(frozen=True)
class Call:
    """An atom that is a function of sizes."""

    function: str
    args: "tuple[Size, ...]"

    def __str__(self) -> str:
        return f"{self.function}({', '.join(map(str, self.args))})"


Atom = str | Call
Monomial = tuple[Atom, ...]


@dataclass(frozen=True)
class Expr:
    """A polynomial with at least one symbol: terms are (sorted atoms, coefficient), in printing order."""

    terms: tuple[tuple[Monomial, int], ...]

    def __str__(self) -> str:
        text = ""
        for atoms, factor in self.terms:
            product = "*".join(map(str, atoms))
            size = product if abs(factor) == 1 and atoms else "*".join(filter(None, [str(abs(factor)), product]))
            text += f" {'-' if factor < 0 else '+'} {size}" if text else f"{'-' if factor < 0 else ''}{size}"
        return text

    def __add__(self, other: "Size") -> "Size":
        return _polynomial([*self.terms, *_terms(other)])

    def __mul__(self, other: "Size") -> "Size":
        return _polynomial([(a + b, x * y) for a, x in self.terms for b, y in _terms(other)])

    def __neg__(self) -> "Size":
        return self * -1

    def __sub__(self, other: "Size") -> "Size":
        return self + (-other)

    def __rsub__(self, other: "Size") -> "Size":
        return -self + other

    def __floordiv__(self, other: "Size") -> "Size":
        return floordiv(self, other)

    def __rfloordiv__(self, other: "Size") -> "Size":
        return floordiv(other, self)

    def __mod__(self, other: "Size") -> "Size":
        return mod(self, other)

    def __rmod__(self, other: "Size") -> "Size":
        return mod(other, self)

    __radd__, __rmul__ = __add__, __mul__


Size = int | Expr

# Limits for parsed sizes: more than any tensor needs, but cheap to compute with.
LARGEST = 2**64
HIGHEST_POWER = 64
MOST_PRODUCTS = 1024


@lru_cache(maxsize=1024)
def symbol(name: str) -> Expr:
    """The size of a symbol."""
    return Expr((((name,), 1),))


def call(function: str, *args: Size) -> Size:
    """Calls a function of sizes, simplified where that is exact; raises ValueError if it is undefined."""
    if not args:
        raise ValueError(f"{function} takes at least 1 size, not 0")
    if function in ("max", "min"):
        return _extreme(function, args)
    if function in FUNCTIONS and len(args) != (needed := ARITIES.get(function, 2)):
        raise ValueError(f"{function} takes {needed} sizes, not {len(args)}")
    if function == "floordiv":
        return floordiv(*args)
    if function == "mod":
        return mod(*args)
    if function == "pow" and isinstance(args[1], int):
        return _power(args[0], args[1])
    return _atom(function, *args)


def floordiv(a: Size, b: Size) -> Size:
    """a // b; multiples of an integer `b` are moved out of the division, and common factors are canceled."""
    if b == 0:
        raise ValueError(f"{a} is divided by zero")
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    if a == b:
        return 1
    if not isinstance(b, int) or b < 0:
        return _atom("floordiv", a, b)
    whole = _polynomial([(atoms, factor // b) for atoms, factor in _terms(a)])
    rest = _polynomial([(atoms, factor % b) for atoms, factor in _terms(a)])
    if isinstance(rest, int):
        return whole  # smaller than b
    common = gcd(b, *(factor for atoms, factor in rest.terms if atoms))
    rest = _polynomial([(atoms, factor // common) for atoms, factor in rest.terms])
    return whole + _atom("floordiv", rest, b // common)


def mod(a: Size, b: Size) -> Size:
    """a % b, with the sign of `b` as in Python; multiples of an integer `b` are dropped."""
    if b == 0:
        raise ValueError(f"{a} is divided by zero")
    if isinstance(a, int) and isinstance(b, int):
        return a % b
    if a == b:
        return 0
    if not isinstance(b, int) or b < 0:
        return _atom("mod", a, b)
    rest = _polynomial([(atoms, factor % b) for atoms, factor in _terms(a)])
    return rest if isinstance(rest, int) else _atom("mod", rest, b)


def _extreme(function: str, args: tuple[Size, ...]) -> Size:
    """max or min, flattened, with integer arguments folded into one."""
    flat = {inner for arg in args for inner in _arguments(function, arg)}
    integers = [arg for arg in flat if isinstance(arg, int)]
    kept: list[Size] = [arg for arg in flat if isinstance(arg, Expr)]
    kept += [FUNCTIONS[function](integers)] if integers else []
    return kept[0] if len(kept) == 1 else _atom(function, *sorted(kept, key=str))


def _arguments(function: str, size: Size) -> tuple[Size, ...]:
    match size:
        case Expr(terms=(((Call() as inner,), 1),)) if inner.function == function:
            return inner.args
    return (size,)


def _power(base: Size, exponent: int) -> Size:
    if exponent < 0:
        raise ValueError(f"{base} has a negative exponent, {exponent}")
    if exponent > HIGHEST_POWER:
        raise ValueError(f"{base} has the exponent {exponent}, which is more than {HIGHEST_POWER}")
    written_out = isinstance(base, Expr) and exponent <= 8 and len(base.terms) ** exponent <= MOST_PRODUCTS
    return product((base,) * exponent) if written_out else _atom("pow", base, exponent)


def _atom(function: str, *args: Size) -> Size:
    if function in FUNCTIONS and all(isinstance(arg, int) for arg in args):
        return FUNCTIONS[function](*args)
    return Expr((((Call(function, args),), 1),))


def ceildiv(a: Size, b: int) -> Size:
    """The number of blocks of size `b` that cover `a`."""
    return -(-a // b) if isinstance(a, int) else floordiv(a + (b - 1), b)


def _share(tokens: int, ranks: int, few: int) -> int:
    return tokens if tokens < few or ranks < 1 else -(-tokens // ranks)


STRENGTHS = {"+": 1, "-": 1, "*": 2, "//": 2}
OPERATORS: Mapping[str, Callable[[Size, Size], Size]] = {"+": add, "-": sub, "*": mul, "//": floordiv}
FUNCTIONS: Mapping[str, Callable[..., int]] = {
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "max": max,
    "min": min,
    "pow": pow,
    "share": _share,
}
ARITIES = {"share": 3}
"""Numbers of sizes that functions take, unless it is 2; max and min take any."""


def product(sizes: "tuple[Size, ...]") -> Size:
    """The number of elements of a shape."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def symbols(size: Size) -> frozenset[str]:
    """The names of the symbols in a size."""
    if isinstance(size, int):
        return frozenset()
    found: set[str] = set()
    for atoms, _ in size.terms:
        for atom in atoms:
            found |= {atom} if isinstance(atom, str) else {s for arg in atom.args for s in symbols(arg)}
    return frozenset(found)


def evaluate(size: Size, bindings: Mapping[str, int]) -> int:
    """Evaluates a size; raises KeyError with the name of a symbol or function that has no value."""
    if isinstance(size, int):
        return size
    total = 0
    for atoms, factor in size.terms:
        for atom in atoms:
            if isinstance(atom, str):
                factor *= bindings[atom]
            else:
                factor *= FUNCTIONS[atom.function](*(evaluate(a, bindings) for a in atom.args))
        total += factor
    return total


def substitute(size: Size, bindings: Mapping[str, Size]) -> Size:
    """`size` with the symbols in `bindings` replaced by their values, which may be symbolic."""
    if isinstance(size, int) or not symbols(size) & bindings.keys():
        return size
    total: Size = 0
    for atoms, factor in size.terms:
        term: Size = factor
        for atom in atoms:
            if isinstance(atom, str):
                term = term * bindings.get(atom, symbol(atom))
            else:
                term = term * call(atom.function, *(substitute(a, bindings) for a in atom.args))
        total = total + term
    return total


def parse_size(text: str) -> Size:
    """Parses a size; raises ParseError if `text` is malformed."""
    reader = Reader(Source(text, "<size>"))
    size = read_size(reader)
    reader.expect_end()
    return size


def read_size(reader: Reader) -> Size:
    """Reads a size: `+ - * //` over integers, symbols, calls, and brackets; unary minus only as the first token."""
    left: Size = 0 if reader.operator() == "-" else _read_operand(reader)
    if reader.operator() not in STRENGTHS:
        return left
    return reader.arithmetic(left, partial(_read_operand, reader), partial(_join, reader), STRENGTHS)


def _join(reader: Reader, operator: Token, a: Size, b: Size) -> Size:
    if STRENGTHS[operator.text] > 1 and len(_terms(a)) * len(_terms(b)) > MOST_PRODUCTS:
        raise reader.fail(f"a size has more than {MOST_PRODUCTS} terms", operator)
    try:
        size = OPERATORS[operator.text](a, b)
    except ValueError as error:
        raise reader.fail(str(error), operator) from None
    if any(abs(factor) >= LARGEST for _, factor in _terms(size)):
        raise reader.fail("a number in a size is beyond 64 bits", operator)
    return size


def _read_operand(reader: Reader) -> Size:
    token = reader.take()
    if token.kind == "int" and token.text[0] != "-":
        if len(token.text) > len(str(LARGEST)):
            raise reader.fail("a number in a size is beyond 64 bits", token)
        return int(token.text)
    if token.text == "(":
        return reader.bracketed(lambda: read_size(reader), ")")
    if token.kind != "name" or "." in token.text:
        raise reader.fail(f"expected a number or a symbol, but got {token}", token)
    if not reader.accept("("):
        return symbol(token.text)
    try:
        return call(token.text, *reader.list_of(lambda: read_size(reader), ")"))
    except ValueError as error:
        raise reader.fail(str(error), token) from None


def _terms(size: Size) -> tuple[tuple[Monomial, int], ...]:
    return size.terms if isinstance(size, Expr) else (((), size),)


def _polynomial(terms: list[tuple[Monomial, int]]) -> Size:
    total: dict[Monomial, int] = {}
    for atoms, factor in terms:
        key = tuple(sorted(atoms, key=str))
        total[key] = total.get(key, 0) + factor
    kept = {atoms: factor for atoms, factor in total.items() if factor}
    if not kept or list(kept) == [()]:
        return kept.get((), 0)
    return Expr(tuple(sorted(kept.items(), key=lambda term: (-len(term[0]), tuple(map(str, term[0]))))))
