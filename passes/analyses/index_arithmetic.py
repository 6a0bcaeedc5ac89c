"""Arithmetic on indices and masks: a table with a proof for each operation.

    aten.arange(n)[i]                   i
    aten.le.Tensor(x, y)[q, k]          1 if y[0, k] - x[q, 0] >= 0, else 0

Each element of a result is computed from the elements of the operands at the same index, after broadcasting.
"""

import math
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from passes.analyses.index_expressions import (
    Element,
    Number,
    Row,
    Site,
    boolean,
    choose,
    constant,
    opaque,
)
from passes.analyses.inequalities import (
    Condition,
    both,
    either,
    negation,
    nonnegative,
    simplified,
    zero,
)
from passes.analyses.real_numbers import Real, real
from qcompiler.ir import Argument, DType, Size, TensorType, Value
from qcompiler.ir.sizes import Expr, call, floordiv, mod, symbol, symbols
from qcompiler.numerics.dtypes import torch_dtype

# Constants


def _arange(site: Site) -> Element:
    """Element i is start + step * i."""
    start = site.size(site.argument("start")) if site.op.name != "aten.arange" else 0
    step = site.size(site.argument("step")) if site.op.name == "aten.arange.start_step" else 1
    number = start + step * site.at[0]
    return site.real(real(number), "it counts in floating point") if site.dtype.is_float else constant(number)


def _filled(name: str) -> Callable[[Site], Element]:
    """A literal everywhere."""
    return lambda site: _cast(site, constant(_literal(site, site.argument(name))))


def _same(number: int) -> Callable[[Site], Element]:
    return lambda site: _cast(site, constant(number))


def _literal(site: Site, arg: Argument) -> Number:
    if isinstance(arg, Value) or not isinstance(arg, int | float):
        return site.size(arg)
    return arg


# Casts and choices


def converted(site: Site, arg: Argument) -> Element:
    """The element of an operand that broadcasts to the result, in the element type of the result."""
    same = isinstance(arg, Value) and isinstance(arg.type, TensorType) and arg.type.dtype is site.dtype
    return site.operand(arg) if same else _cast(site, site.operand(arg))


def _cast(site: Site, element: Element) -> Element:
    """The element converted to the element type of the result."""
    if site.dtype is DType.b8:
        return boolean(element.truth(site.facts))
    return site.join(partial(_cast_number, site), element)


def _cast_number(site: Site, number: Number) -> Element:
    if site.dtype.is_float:
        if isinstance(number, Expr | Real):
            return site.real(real(number), "it converts a number that varies to floating point")
        return constant(torch.tensor(number, dtype=torch_dtype(site.dtype)).item())
    if isinstance(number, Real):
        raise site.unknown("it converts a floating-point number that varies to an integer")
    if isinstance(number, Expr):
        if site.dtype.bits < 32:
            raise site.unknown("it converts a number that varies to a small integer type")
        return constant(number)
    if isinstance(number, float) and not math.isfinite(number):
        raise site.unknown(f"it converts {number} to an integer")
    return constant(torch.tensor(int(number)).to(torch_dtype(site.dtype)).item())


def _copied(site: Site) -> Element:
    return converted(site, site.op.args[0])


def _where(site: Site) -> Element:
    condition = site.operand(site.argument("condition")).truth(site.facts)
    return _either(site, condition, site.argument("self"), site.argument("other"))


def _masked_fill(site: Site) -> Element:
    condition = site.operand(site.argument("mask")).truth(site.facts)
    return _either(site, condition, site.argument("value"), site.argument("self"))


def _either(site: Site, condition: Condition, yes: Argument, no: Argument) -> Element:
    """One operand where a condition holds, else the other; an operand that is never chosen is not read."""
    cases = [(simplified(where, site.facts), arg) for where, arg in ((condition, yes), (negation(condition), no))]
    return choose([(where, converted(site, arg)) for where, arg in cases if where], site.facts)


# Comparisons and logic

COMPARISONS: Mapping[str, Callable[[Size], Condition]] = {
    "eq": zero,
    "ne": lambda difference: negation(zero(difference)),
    "ge": nonnegative,
    "gt": lambda difference: nonnegative(difference - 1),
    "le": lambda difference: nonnegative(-difference),
    "lt": lambda difference: nonnegative(-difference - 1),
}


def _compared(name: str) -> Callable[[Site], Element]:
    """Integers are compared by the sign of their difference, floating-point constants by value."""

    def row(site: Site) -> Element:
        def compare(a: Number, b: Number) -> Element:
            if isinstance(a, int | Expr) and isinstance(b, int | Expr):
                return boolean(COMPARISONS[name](a - b))
            if isinstance(a, Expr | Real) or isinstance(b, Expr | Real):
                raise site.unknown("it compares a number that varies with floating point")
            return constant(getattr(operator, name)(a, b))

        return site.join(compare, *_sides(site))

    return row


def _sides(site: Site) -> tuple[Element, Element]:
    return site.operand(site.argument("self")), site.operand(site.argument("other"))


def _logic(function: Callable[[Condition, Condition], Condition]) -> Callable[[Site], Element]:
    """A function of the truth of both operands."""

    def row(site: Site) -> Element:
        if site.dtype is not DType.b8:
            raise site.unknown("it combines the bits of integers")
        return boolean(simplified(function(*(side.truth(site.facts) for side in _sides(site))), site.facts))

    return row


def _xor(a: Condition, b: Condition) -> Condition:
    return either(both(a, negation(b)), both(b, negation(a)))


def _not(site: Site) -> Element:
    element = site.operand(site.argument("self"))
    if site.dtype is DType.b8:
        return boolean(simplified(negation(element.truth(site.facts)), site.facts))
    return site.join(lambda number: constant(-number - 1), element)


# Arithmetic


def _arithmetic(function: Callable[[Any, Any], Any]) -> Callable[[Site], Element]:
    """An exact function of integers; floating-point constants are computed by torch in the type of the result."""

    def row(site: Site) -> Element:
        def apply(a: Number, b: Number) -> Element:
            if not site.dtype.is_float:
                return constant(function(a, b))
            if isinstance(a, Expr | Real) or isinstance(b, Expr | Real):
                return site.real(function(real(a), real(b)), "it mixes a number that varies with floating point")
            kind = torch_dtype(site.dtype)
            return constant(function(torch.tensor(a, dtype=kind), torch.tensor(b, dtype=kind)).item())

        if site.dtype is DType.b8:
            raise site.unknown("it computes with booleans")
        return site.join(apply, *_sides(site))

    return row


def _sum(sign: int, *, reverse: bool = False) -> Callable[[Site], Element]:
    """self + sign * alpha * other, or the other way around."""

    def row(site: Site) -> Element:
        alpha = site.argument("alpha")
        if not isinstance(alpha, int | float):
            raise site.unknown("its factor alpha is not a literal")

        def add(a: Any, b: Any) -> Any:
            return b + a * sign * alpha if reverse else a + b * sign * alpha

        return _arithmetic(add)(site)

    return row


def _product(site: Site) -> Element:
    """The product of integers, or of booleans: both are true."""
    return _logic(both)(site) if site.dtype is DType.b8 else _arithmetic(operator.mul)(site)


def _extreme(function: str) -> Callable[[Site], Element]:
    def row(site: Site) -> Element:
        if site.dtype.is_float:
            raise site.unknown("it compares floating-point numbers")
        return _arithmetic(lambda a, b: call(function, a, b))(site)

    return row


def _divided(site: Site) -> Element:
    if site.argument("rounding_mode") != "floor":
        raise site.unknown("it does not round its quotient down")
    return _by_positive(floordiv)(site)


def _by_positive(function: Callable[[Size, Size], Size]) -> Callable[[Site], Element]:
    """Floor division or modulo by a positive constant."""

    def row(site: Site) -> Element:
        divisor = site.operand(site.argument("other")).only
        if not isinstance(divisor, int) or divisor <= 0 or site.dtype.is_float:
            raise site.unknown("it does not divide integers by a positive constant")
        return _arithmetic(function)(site)

    return row


def _quotient(site: Site) -> Element:
    """The quotient in floating point by a constant."""
    divisor = site.operand(site.argument("other")).only
    if not isinstance(divisor, int | float) or divisor == 0:
        raise site.unknown("it does not divide by a constant")

    def divide(a: Any, b: Any) -> Any:
        return a * (1 / divisor) if isinstance(a, Real) else a / b

    return _arithmetic(divide)(site)


def _negative(site: Site) -> Element:
    return site.join(lambda number: constant(-number), site.operand(site.argument("self")))


def _magnitude(site: Site) -> Element:
    def absolute(number: Number) -> Element:
        if isinstance(number, int | float):
            return constant(abs(number))
        if isinstance(number, Real):
            raise site.unknown("it takes the magnitude of a floating-point number that varies")
        inside = simplified(nonnegative(number), site.facts)
        cases = [(inside, constant(number)), (negation(inside), constant(-number))]
        return choose([case for case in cases if case[0]], site.facts)

    return site.join(absolute, site.operand(site.argument("self")))


def _cumsum(site: Site) -> Element:
    """The sum of n equal elements is n times one of them."""
    axis, x = site.axis(), site.op["self"]
    place = symbol(f"{x.name}.place")
    at = (*site.at[:axis], place, *site.at[axis + 1 :])
    inside = both(nonnegative(place), nonnegative(x.tensor.shape[axis] - place - 1))
    number, count = site.assuming(inside, at).operand(x, at).only, site.at[axis] + 1
    equal = number is not None and not _depends(number, place)
    if site.dtype.is_float:
        if number is None or not equal or number in (math.inf, -math.inf) or number != number:
            raise site.unknown("it sums floating-point numbers that vary")
        return site.real(real(number) * real(count), "it counts in floating point")
    return constant(number * count) if equal and isinstance(number, int | Expr) else opaque(site.op.result, site.at)


def _depends(number: Number, place: Expr) -> bool:
    return any(symbols(place) <= symbols(Expr(((atoms, 1),))) for atoms, _ in real(number).terms)


def _triangle(sign: int) -> Callable[[Site], Element]:
    """The element where sign * (row - column + diagonal) >= 0, else 0."""

    def row(site: Site) -> Element:
        *_, i, j = site.at
        kept = nonnegative(sign * (i - j + site.size(site.argument("diagonal"))))
        return _either(site, kept, site.argument("self"), 0.0 if site.dtype.is_float else 0)

    return row


# The table

_FILL = "Every element is the literal."
_INT = "Arithmetic on integers is exact, and numbers without an index are computed as torch does."
_SIGN = "Integers compare by the sign of their difference."
_TRUTH = "Each element is a function of the truth of two elements."
_CHOICE = "The condition chooses the operand."
_QUOTIENT = "The quotient of integers, rounded down."
_SCALARS = ("Tensor", "Scalar")

ARITHMETIC: Mapping[str, Row] = {
    "aten.arange": Row("Element i is i.", _arange),
    "aten.arange.start": Row("Element i is start + i.", _arange),
    "aten.arange.start_step": Row("Element i is start + step * i.", _arange),
    **{f"aten.{name}": Row(_FILL, _filled("fill_value")) for name in ("full", "full_like", "new_full")},
    **{f"aten.{name}": Row(_FILL, _same(0)) for name in ("zeros", "zeros_like", "new_zeros")},
    **{f"aten.{name}": Row(_FILL, _same(1)) for name in ("ones", "ones_like", "new_ones")},
    "aten.scalar_tensor": Row(_FILL, _filled("s")),
    **{f"aten.{name}": Row("Each element is converted.", _copied) for name in ("_to_copy", "to.dtype")},
    **{f"aten.{name}.{kind}": Row(_SIGN, _compared(name)) for name in COMPARISONS for kind in _SCALARS},
    **{f"aten.where.{kind}": Row(_CHOICE, _where) for kind in ("self", "ScalarOther", "ScalarSelf", "Scalar")},
    **{f"aten.masked_fill.{kind}": Row(_CHOICE, _masked_fill) for kind in _SCALARS},
    "aten.logical_and": Row(_TRUTH, _logic(both)),
    "aten.logical_or": Row(_TRUTH, _logic(either)),
    "aten.logical_xor": Row(_TRUTH, _logic(_xor)),
    "aten.logical_not": Row("True where the operand is zero.", _not),
    "aten.bitwise_not": Row("The opposite of a boolean; -x - 1 for an integer.", _not),
    **{f"aten.{name}.{kind}": Row(_TRUTH, _logic(both)) for name in ("bitwise_and", "__and__") for kind in _SCALARS},
    **{f"aten.{name}.{kind}": Row(_TRUTH, _logic(either)) for name in ("bitwise_or", "__or__") for kind in _SCALARS},
    **{f"aten.{name}.{kind}": Row(_TRUTH, _logic(_xor)) for name in ("bitwise_xor", "__xor__") for kind in _SCALARS},
    **{f"aten.add.{kind}": Row(_INT, _sum(1)) for kind in _SCALARS},
    **{f"aten.sub.{kind}": Row(_INT, _sum(-1)) for kind in _SCALARS},
    **{f"aten.rsub.{kind}": Row(_INT, _sum(-1, reverse=True)) for kind in _SCALARS},
    **{f"aten.mul.{kind}": Row(_INT, _product) for kind in _SCALARS},
    "aten.neg": Row("The negative of the element.", _negative),
    "aten.abs": Row("The element or its negative, by its sign.", _magnitude),
    **{f"aten.div.{kind}": Row("The product with the reciprocal.", _quotient) for kind in _SCALARS},
    "aten.minimum": Row("The smaller of two integers.", _extreme("min")),
    "aten.maximum": Row("The larger of two integers.", _extreme("max")),
    "aten.floor_divide": Row(_QUOTIENT, _by_positive(floordiv)),
    "aten.div.Tensor_mode": Row(_QUOTIENT, _divided),
    "aten.div.Scalar_mode": Row(_QUOTIENT, _divided),
    **{f"aten.remainder.{kind}": Row("It has the sign of the divisor.", _by_positive(mod)) for kind in _SCALARS},
    "aten.cumsum": Row("The sum of n equal elements is n times one of them.", _cumsum),
    "aten.tril": Row("Kept where column <= row + diagonal, else 0.", _triangle(1)),
    "aten.triu": Row("Kept where column >= row + diagonal, else 0.", _triangle(-1)),
}
"""Operation -> why and how an element of its result is a function of elements of its operands."""
