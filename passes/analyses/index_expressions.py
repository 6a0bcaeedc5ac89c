"""Elements of integer, boolean and mask tensors as expressions of their indices.

    %p = aten.arange(%n)                    p[i] = i
    %u = aten.unsqueeze(%p, 0)              u[a, i] = i
    %m = aten.le.Tensor(%k, %q)             m[q, k] = 1 if q - k >= 0, else 0
    %f = aten.where.ScalarOther(%m, 0, -inf)        f[q, k] = 0.0 if q - k >= 0, else -inf

`Elements` asks for an element and follows the operations down to the inputs; `index_arithmetic` and `index_moves`
have a row per operation. Integers are exact polynomials (`qcompiler.ir.sizes`), which are assumed not to overflow; an
element of an input is an unknown such as `%mask(b, k)`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from passes.analyses.inequalities import (
    FALSE,
    TRUE,
    Condition,
    Conjunction,
    TooComplex,
    both,
    either,
    impossible,
    negation,
    nonnegative,
    simplified,
    zero,
)
from passes.analyses.real_numbers import Real
from qcompiler.ir import Argument, DType, Op, Size, TensorType, Value
from qcompiler.ir.sizes import Expr, call
from qcompiler.ir.types import ScalarType

Number = Size | float | Real
"""An integer expression, a floating-point constant, or a real number that varies."""

Index = tuple[Size, ...]
"""The indices of one element."""


class Unknown(Exception):
    """An element is not an expression of its indices: the reason and the value that prevents it."""

    def __init__(self, why: str, value: Value) -> None:
        super().__init__(why)
        self.why, self.value = why, value


@dataclass(frozen=True)
class Element:
    """One element: a number for each of several conditions. Exactly one condition holds for each index.

    Booleans are 0 and 1. A floating-point element has Python floats as numbers, or real numbers that vary.
    """

    cases: tuple[tuple[Condition, Number], ...]

    @property
    def only(self) -> Number | None:
        """The number, if it is the same for every index; else None."""
        return self.cases[0][1] if len(self.cases) == 1 else None

    def truth(self, facts: Conjunction) -> Condition:
        """Where the element is not zero."""
        seen = [both(condition, _not_zero(number)) for condition, number in self.cases]
        return simplified(either(*seen), facts)


def _not_zero(number: Number) -> Condition:
    if isinstance(number, Real):
        raise TooComplex  # it ignores rounding
    if isinstance(number, Expr):
        return negation(zero(number))
    return TRUE if number else FALSE


def constant(number: Number) -> Element:
    """The element that is the same for every index."""
    return Element(((TRUE, int(number) if isinstance(number, bool) else number),))


def boolean(condition: Condition) -> Element:
    """1 where a condition holds, else 0."""
    cases = ((condition, 1), (negation(condition), 0))
    return Element(tuple((where, number) for where, number in cases if where))


def choose(cases: Sequence[tuple[Condition, Element]], facts: Conjunction) -> Element:
    """The element whose condition holds; the conditions exclude each other and cover all indices."""
    merged: dict[tuple[type, Number], list[Condition]] = {}
    for where, element in cases:
        for condition, number in element.cases:
            if not impossible(both_hold := both(where, condition), facts):
                merged.setdefault((type(number), number), []).append(both_hold)
    found = [(simplified(either(*parts), facts), number) for (_, number), parts in merged.items()]
    if not found:
        return constant(0)  # no index satisfies the facts
    return Element(tuple(found)) if len(found) > 1 else constant(found[0][1])


class Site(ABC):
    """One operation and the index of an element of its result, as a row of the table sees them."""

    op: Op
    at: Index
    output: int
    facts: Conjunction
    """What holds for the indices and sizes."""
    rounds: bool = True
    """Whether numbers must be exact, so that floating-point numbers that vary are unknown."""

    @abstractmethod
    def element(self, value: Value, at: Index) -> Element:
        """The element of a value at an index of its own shape."""

    @abstractmethod
    def assuming(self, condition: Condition, at: Index) -> "Site":
        """This site with another index and further facts."""

    def unknown(self, why: str) -> Unknown:
        """The reason why the element has no expression."""
        return Unknown(why, self.op.results[self.output])

    def real(self, number: Real, why: str) -> Element:
        """A real number that varies; raises Unknown with the reason if numbers must be exact."""
        if self.rounds:
            raise self.unknown(why)
        return constant(number.rounded(self.dtype))

    def argument(self, name: str) -> Argument:
        """The argument that torch's schema calls `name`, or its default."""
        return self.op.argument(name)

    def shape(self, name: str) -> tuple[Size, ...]:
        """The shape of an operand."""
        return self.op[name].tensor.shape

    @property
    def dtype(self) -> DType:
        """The element type of the result."""
        return self.op.results[self.output].tensor.dtype

    def axis(self, name: str = "dim", rank: int | None = None) -> int:
        """An argument that is an axis, as a nonnegative index into `rank` axes; by default, the operand's rank."""
        axis = self.argument(name)
        if not isinstance(axis, int):
            raise self.unknown(f"the axis of {self.op.name} is not fixed")
        return axis % max(1, len(self.shape("self")) if rank is None else rank)

    def size(self, arg: Argument) -> Size:
        """An argument that is an integer or a symbolic size."""
        found = arg.type.value if isinstance(arg, Value) and isinstance(arg.type, ScalarType) else arg
        if not isinstance(found, int | Expr):
            raise self.unknown(f"{self.op.name} has an argument that is not a known size")
        return found

    def operand(self, arg: Argument, at: Index | None = None) -> Element:
        """The element of an operand that broadcasts to the result; a literal is the same everywhere."""
        if isinstance(arg, Value) and isinstance(arg.type, TensorType):
            own = arg.type.shape
            at = self.at if at is None else at
            return self.element(arg, at[len(at) - len(own) :])
        return constant(arg if isinstance(arg, float) else self.size(arg))

    def join(self, function: Callable[..., Element], *elements: Element) -> Element:
        """A function of numbers, applied to elements case by case."""
        cases: list[tuple[Condition, tuple[Number, ...]]] = [(TRUE, ())]
        for element in elements:
            cases = [
                (where, (*numbers, number))
                for earlier, numbers in cases
                for condition, number in element.cases
                if not impossible(where := both(earlier, condition), self.facts)
            ]
        return choose([(where, function(*numbers)) for where, numbers in cases], self.facts)

    def within(self, index: Size, size: Size) -> Element:
        """An index that may be negative, as torch counts: from the end."""
        inside = simplified(nonnegative(index), self.facts)
        cases = [(inside, constant(index)), (negation(inside), constant(index + size))]
        return choose([case for case in cases if case[0]], self.facts)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        proof: Why the element of the result is this element of the operands.
        element: The element at the site's index.
    """

    proof: str
    element: Callable[[Site], Element]


def opaque(value: Value, at: Index) -> Element:
    """An element that has no expression: an unknown function of its indices."""
    unknown = call(f"%{value.name}", *(at or (0,)))
    return boolean(nonnegative(unknown - 1)) if value.tensor.dtype is DType.b8 else constant(unknown)
