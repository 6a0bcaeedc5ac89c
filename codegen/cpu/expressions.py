"""Compiles fused expressions to Python functions that make few torch calls, bit-equal to `FusedExpression.run`.

    bf16(x1 * bf16(x0 * rsqrt(mean(x0 * x0) + 1e-05)))       with x0 and x1 in bf16

    def expression(x0, x1):
        a = x0.float()
        b = mean(a * a)
        c = rsqrt(b + 1e-05)
        d = (a * c).to(bf16)
        e = x1 * d
        return (e,)

Each subexpression is computed once. A sum, difference or product of two bf16 tensors that is rounded to bf16 is one
call in bf16: torch computes it in FP32 and rounds once.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qcompiler.dialects.expression_nodes import Call, Expression, Name, Number, parts
from qcompiler.dialects.fused_expression import FUNCTIONS, OPERATORS, ROUNDED, FusedExpression, parse

NAMES = {dtype: f"to_{name}" for name, dtype in ROUNDED.items()}
"""The variable of a function that holds a dtype."""

ROUNDED_ONCE = ("+", "-", "*")
"""Operators that torch computes in FP32 for narrow operands, and rounds once."""


def evaluate(text: str, operands: Mapping[str, Tensor], keep: Sequence[str] = ()) -> tuple[Tensor, ...]:
    """`FusedExpression.run` of the expression with that text: the result and the definitions in `keep`.

    Raises:
        ParseError: The text is not a fused expression.
    """
    kinds = tuple((name, x.dtype) for name, x in operands.items())
    run, names = _compiled(text, kinds, tuple(keep))
    made = run(*operands.values())
    shape = max((operands[name].shape for name in names), key=len)
    return tuple(x if x.shape == shape and x.is_contiguous() else x.expand(shape).contiguous() for x in made)


@cache
def _compiled(text: str, kinds: tuple[tuple[str, torch.dtype], ...], keep: tuple[str, ...]) -> tuple[Any, Any]:
    """The function, and the operands whose shapes the result has."""
    made = parse(text)
    return _Compiler(made, dict(kinds)).function(keep), made.operands


class _Compiler:
    """Compiles one expression for operands of given dtypes."""

    def __init__(self, made: FusedExpression, kinds: Mapping[str, torch.dtype]) -> None:
        self.made, self.kinds, self.lines = made, kinds, list[str]()
        self.defined = dict(made.definitions)
        self.variables: dict[str, str] = {}  # text of a computation -> its variable
        self.namespace: dict[str, Any] = {name: function.meaning for name, function in FUNCTIONS.items()}
        self.namespace |= {"divide": OPERATORS["/"]} | {name: dtype for dtype, name in NAMES.items()}

    def function(self, keep: Sequence[str]) -> Any:
        """The function of the operands in order."""
        results = [self.in_dtype(self.made.result, self.made.dtype())]
        results += [self.in_dtype(Name(name), self.made.dtype(name)) for name in keep]
        lines = [f"def expression({', '.join(self.kinds)}):", *self.lines, f"return ({', '.join(results)},)"]
        exec("\n    ".join(lines), self.namespace)
        return self.namespace["expression"]

    def assigned(self, text: str) -> str:
        """The variable that holds a computation."""
        if text not in self.variables:
            self.variables[text] = f"v{len(self.variables)}"
            self.lines.append(f"{self.variables[text]} = {text}")
        return self.variables[text]

    def resolved(self, what: Expression) -> Expression:
        """The definition of a name; other expressions are unchanged."""
        while isinstance(what, Name) and what.name in self.defined:
            what = self.defined[what.name]
        return what

    def rounding(self, what: Expression) -> torch.dtype:
        """The dtype that holds an expression exactly."""
        what = self.resolved(what)
        if isinstance(what, Name):
            return self.kinds[what.name]
        return ROUNDED.get(what.function, torch.float32) if isinstance(what, Call) else torch.float32

    def in_dtype(self, what: Expression, dtype: torch.dtype) -> str:
        """An expression as text in its dtype, or in FP32."""
        what = self.resolved(what)
        if dtype is torch.float32:
            return self.wide(what)
        if isinstance(what, Name):
            return what.name
        inner = self.resolved(parts(what)[0])  # a call that rounds to the dtype
        if self.rounding(inner) is dtype:
            return self.in_dtype(inner, dtype)
        once = isinstance(inner, Call) and inner.function in ROUNDED_ONCE
        if isinstance(inner, Call) and once and all(self.rounding(arg) is dtype for arg in inner.args):
            left, right = (self.in_dtype(arg, dtype) for arg in inner.args)
            return self.assigned(f"{left} {inner.function} {right}")
        return self.assigned(f"{self.wide(inner)}.to({NAMES[dtype]})")

    def wide(self, what: Expression) -> str:
        """An expression as text in FP32."""
        what = self.resolved(what)
        if isinstance(what, Number):
            return repr(what.value) if what.value >= 0 else f"({what.value!r})"
        dtype = self.rounding(what)
        if dtype is not torch.float32:
            return self.assigned(f"{self.in_dtype(what, dtype)}.float()")
        if isinstance(what, Name):
            return what.name
        args = [self.wide(arg) for arg in parts(what)]
        function = what.function if isinstance(what, Call) else ""
        if function in ROUNDED_ONCE:
            return self.assigned(f"{args[0]} {function} {args[1]}")
        return self.assigned(f"{'divide' if function == '/' else function}({', '.join(args)})")
