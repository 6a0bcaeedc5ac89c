"""The fused expression of an operation: FP32 arithmetic over the rows of its operands, as text.

    h = bf16(x0 + x1); n = rsqrt(mean(h * h) + 1e-06); bf16(x2 * bf16(h * n))

It has definitions, which later definitions may use, and ends with the result. All arithmetic is in FP32; `bf16` and
`f16` round explicitly, so a fused expression can reproduce separate torch operations in those dtypes bit for bit.
`x0`, `x1`, … are the operands: tensors with the shape of the result, or vectors with one number per column. In a
matmul epilogue, `y0` is the accumulator, or `y0` and `y1` are its left and right halves. After a sum of quantized
terms, `y0` is the sum.

    where(i3 < 32, neg(x0[i0, i2, i3 + 32]), x0[i0, i2, i3 - 32]) * x1[i0, i3]

In the operation `kernel.pointwise`, each operand has an index instead: one expression for each of its axes, over the
indices i0, i1, … of the result. `where` evaluates only the part that it chooses.

    cos(number(x0(i0) + i1) * x1[i2])               x2[x3(i0, i1), i2]

An index may also depend on elements of integer operands, such as x0(i0); `number` is an index as a number.

This module defines the text form, the tree, and its torch definition; code generation emits kernels from the tree.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.dialects.expression_nodes import (
    Call,
    Expression,
    IndexNumber,
    Less,
    Load,
    Name,
    Number,
    Where,
    elements,
    indices,
    parts,
    sizes,
    why_no_index,
)
from qcompiler.errors import did_you_mean
from qcompiler.ir.sizes import Call as Element
from qcompiler.ir.sizes import Size, read_size
from qcompiler.text import Reader, Source, Token

OPERAND = re.compile(r"[xy](0|[1-9][0-9]*)")
LARGEST = torch.finfo(torch.float32).max
MOST_CALLS = 256
"""Maximum operations in one expression, so that recursive functions stay within Python's limit."""


@dataclass(frozen=True)
class Function:
    """A function that a fused expression may call.

    Attributes:
        arity: Number of arguments.
        meaning: The torch definition, on FP32 tensors.
        across: Whether each column of its result depends on the whole row.
    """

    arity: int
    meaning: Callable[..., Any]
    across: bool = False


def _standardize(x: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=eps)


FUNCTIONS: dict[str, Function] = {
    "bf16": Function(1, lambda x: x.bfloat16().float()),
    "f16": Function(1, lambda x: x.half().float()),
    "f32": Function(1, lambda x: x),
    "at_least": Function(2, lambda x, low: torch.clamp(x, min=low)),
    "at_most": Function(2, lambda x, high: torch.clamp(x, max=high)),
    "cos": Function(1, torch.cos),
    "exp": Function(1, torch.exp),
    "gelu": Function(1, functional.gelu),
    "gelu_tanh": Function(1, lambda x: functional.gelu(x, approximate="tanh")),
    "neg": Function(1, torch.neg),
    "relu": Function(1, torch.relu),
    "rsqrt": Function(1, torch.rsqrt),
    "sin": Function(1, torch.sin),
    "sigmoid": Function(1, torch.sigmoid),
    "silu": Function(1, functional.silu),
    "sqrt": Function(1, torch.sqrt),
    "tanh": Function(1, torch.tanh),
    "mean": Function(1, lambda x: x.mean(-1, keepdim=True), across=True),
    "standardize": Function(2, _standardize, across=True),
}
"""Functions by name. `standardize(x, eps)` is (x - mean(x)) / sqrt(variance(x) + eps) with the population variance of
the row (divided by N, not N - 1): a layer norm without gain and bias. `eps` is a number, like the limits of `at_least`
and `at_most`, which keep NaN. `f32` changes nothing; as the result, it says that a rounded number is stored in FP32."""

LIMITS = ("at_least", "at_most")
"""Functions whose second argument is a number."""


def _divide(a: Any, b: Any) -> Any:
    # Torch computes 3.0 / x as 3.0 * (1 / x), and on a GPU x / 3.0 as x * (1 / 3.0): both round twice.
    like = a if isinstance(a, Tensor) else b
    top, bottom = (v if isinstance(v, Tensor) else torch.full((), v, device=like.device) for v in (a, b))
    return top / bottom


RESERVED = {*FUNCTIONS, "number", "where"}
"""Names that a definition cannot have."""

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": _divide,
}
_STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2}

ROUNDED: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "f16": torch.float16}
"""Rounding function -> the dtype that it rounds to."""


@dataclass(frozen=True)
class FusedExpression:
    """A fused expression: definitions in order, and the result.

    Attributes:
        definitions: Pairs of name and expression.
        result: The result expression.
    """

    definitions: tuple[tuple[str, Expression], ...]
    result: Expression

    def __str__(self) -> str:
        """The text form; inverse of `parse`."""
        return "; ".join([*(f"{name} = {_text(what)}" for name, what in self.definitions), _text(self.result)])

    def expressions(self) -> Iterator[Expression]:
        """All subexpressions of the definitions and the result."""
        stack = [self.result, *(what for _, what in reversed(self.definitions))]
        while stack:
            yield (expression := stack.pop())
            stack += reversed(parts(expression))

    @property
    def loads(self) -> tuple[Load, ...]:
        """The loads, each once, in order of use."""
        return tuple(dict.fromkeys(part for part in self.expressions() if isinstance(part, Load)))

    @property
    def elements(self) -> tuple[Element, ...]:
        """The elements of integer operands, each once, in order of use."""
        return tuple(dict.fromkeys(each for size in self._sizes() for each in elements(size)))

    @property
    def indices(self) -> frozenset[str]:
        """The indices of the result that its loads, numbers and conditions use."""
        return frozenset(index for size in self._sizes() for index in indices(size))

    def _sizes(self) -> Iterator[Size]:
        return (size for part in self.expressions() for size in sizes(part))

    @property
    def operands(self) -> tuple[str, ...]:
        """The operands in use, sorted by letter and number."""
        names = {part.name for part in self.expressions() if isinstance(part, Name) and OPERAND.fullmatch(part.name)}
        return tuple(sorted(names, key=lambda name: (name[0], int(name[1:]))))

    @property
    def across(self) -> bool:
        """Whether each column of the result depends on the whole row."""
        calls = (part.function for part in self.expressions() if isinstance(part, Call))
        return any(FUNCTIONS[name].across for name in calls if name in FUNCTIONS)

    def dtype(self, name: str | None = None) -> torch.dtype:
        """The dtype that a definition or the result is rounded to; FP32 if it is not rounded."""
        defined = dict(self.definitions)
        what = self.result if name is None else defined[name]
        while isinstance(what, Name) and what.name in defined:
            what = defined[what.name]
        return ROUNDED.get(what.function, torch.float32) if isinstance(what, Call) else torch.float32

    def run(self, operands: Mapping[str, Tensor], keep: Sequence[str] = ()) -> tuple[Tensor, ...]:
        """Evaluates the result and the definitions in `keep`, each contiguous in its `dtype`.

        Args:
            operands: Name -> tensor of any floating dtype; vectors broadcast to the shape of the others.
            keep: Names of definitions to return.
        """
        values: dict[Any, Tensor] = {name: operands[name].float() for name in self.operands}
        return self.evaluate(values, max((value.shape for value in values.values()), key=len), keep)

    def evaluate(self, values: dict[Any, Tensor], shape: Sequence[int], keep: Sequence[str] = ()) -> tuple[Tensor, ...]:
        """Like `run`, given everything that the expression reads.

        Args:
            values: FP32 tensors of names, loads and numbers of indices, and boolean ones of conditions, that broadcast
                to the shape of the result; definitions are added.
            shape: The shape of the result.
            keep: Names of definitions to return.
        """
        for name, what in self.definitions:
            values[name] = _run(what, values)
        result = self.result
        if isinstance(result, Call) and result.function in ROUNDED:
            (result,) = result.args  # `to` rounds without converting back to FP32
        made = [_run(result, values).to(self.dtype()), *(values[name].to(self.dtype(name)) for name in keep)]
        return tuple(value.expand(shape).contiguous() for value in made)


def _run(what: Expression, values: Mapping[Any, Any]) -> Any:
    if isinstance(what, Number):
        return what.value
    if isinstance(what, Name):
        return values[what.name]
    if isinstance(what, Load | IndexNumber):
        return values[what]
    if isinstance(what, Where):
        return _where(values[what.condition], _run(what.then, values), _run(what.other, values))
    function = OPERATORS.get(what.function) or FUNCTIONS[what.function].meaning
    return function(*(_run(arg, values) for arg in what.args))


def _where(condition: Tensor, then: Any, other: Any) -> Tensor:
    device = condition.device
    then, other = (x if isinstance(x, Tensor) else torch.full((), x, device=device) for x in (then, other))
    return torch.where(condition, then, other)


def _text(what: Expression, strength: int = 0) -> str:
    if isinstance(what, Name):
        return what.name
    if isinstance(what, Load):
        return str(what)
    if isinstance(what, IndexNumber):
        return f"number({what.size})"
    if isinstance(what, Where):
        return f"where({what.condition}, {_text(what.then)}, {_text(what.other)})"
    if isinstance(what, Number):
        return repr(what.value)
    if what.function not in OPERATORS:
        return f"{what.function}({', '.join(map(_text, what.args))})"
    mine = _STRENGTH[what.function]
    left, right = _text(what.args[0], mine), _text(what.args[1], mine + 1)
    text = f"{left} {what.function} {right}"
    return f"({text})" if mine < strength else text


@cache
def parse(text: str) -> FusedExpression:
    """Parses a fused expression; raises ParseError if `text` is malformed."""
    reader = _ExpressionReader(Source(text, "<expression>"))
    while reader.now.kind != "end":
        if not reader.accept(";"):
            reader.statement()
            if not reader.on_new_row():
                reader.expect(";", "")
    if reader.result is None:
        raise reader.fail("the expression has no result", reader.now)
    return FusedExpression(tuple(reader.definitions.items()), reader.result)


class _ExpressionReader(Reader):
    """Reads definitions and the result."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.definitions: dict[str, Expression] = {}
        self.result: Expression | None = None
        self.calls = 0

    def on_new_row(self) -> bool:
        """Whether the next token is the first on its line."""
        return self.source.text[: self.now.at].rstrip(" \t").endswith("\n")

    def statement(self) -> None:
        """`name = expression`, or the result, which is the last statement."""
        start = self.now
        if self.result is not None:
            raise self.fail("the result must be the last expression, but this one follows", start)
        self.calls = 0
        if self.take().kind == "name" and self.accept("="):
            if start.text in self.definitions or OPERAND.fullmatch(start.text) or start.text in RESERVED:
                raise self.fail(f"'{start.text}' is already defined", start)
            if not start.text.isidentifier() or unicodedata.normalize("NFKC", start.text) != start.text:
                raise self.fail(f"'{start.text}' is not a valid definition name", start)
            read = self.expression()
            if isinstance(read, Number):
                raise self.fail(f"'{start.text}' is defined as a number; write the number where it is used", start)
            self.definitions[start.text] = read
        else:
            self.go_to(start.at)
            self.result = self.expression()
            if isinstance(self.result, Number):
                raise self.fail("the result is a number", start)

    def expression(self) -> Expression:
        """Arithmetic over operands."""
        return self.arithmetic(self.operand(), self.operand, self.call, _STRENGTH)

    def operand(self) -> Expression:
        """A name, a number, a call, or an expression in parentheses."""
        token = self.take()
        if token.kind in ("int", "float") and token.text[0] != "+":
            return self.number(token)
        if token.text == "-" and self.now.kind in ("int", "float") and self.now.text[0].isdecimal():
            return Number(-self.number(self.take()).value)
        if token.text == "(":
            return self.bracketed(self.expression, ")")
        if token.kind != "name":
            raise self.fail(f"expected a name, a number or a call, but got {token}", token)
        if OPERAND.fullmatch(token.text) and self.accept("["):
            return Load(token.text, tuple(self.list_of(self.index, "]")))
        if token.text == "where" and self.accept("("):
            return self.bracketed(self.where, ")")
        if token.text == "number" and self.accept("("):
            return IndexNumber(self.bracketed(self.index, ")"))
        if self.accept("("):
            args = self.list_of(self.expression, ")")
            if token.text not in FUNCTIONS:
                problem = f"unknown function '{token.text}'. {did_you_mean(token.text, FUNCTIONS)}"
                raise self.fail(problem, token)
            if len(args) != FUNCTIONS[token.text].arity:
                problem = f"{token.text} takes {FUNCTIONS[token.text].arity} arguments, but got {len(args)}"
                raise self.fail(problem, token)
            return self.call(token, *args)
        if token.text not in self.definitions and not OPERAND.fullmatch(token.text):
            raise self.fail(f"'{token.text}' is not defined before it is used", token)
        return Name(token.text)

    def where(self) -> Where:
        """The arguments of `where`: a condition and two expressions."""
        left = self.index()
        self.expect("<")
        condition = Less(left, self.index())
        self.expect(",")
        then = self.expression()
        self.expect(",")
        return Where(condition, then, self.expression())

    def index(self) -> Size:
        """An expression of the indices of the result."""
        start = self.now
        size = read_size(self)
        if (why := why_no_index(size)) is not None:
            raise self.fail(why, self.since(start))
        return size

    def call(self, function: Token, *args: Expression) -> Call:
        """A call of a function or an operator."""
        self.calls += 1
        if self.calls > MOST_CALLS:
            raise self.fail(f"an expression has more than {MOST_CALLS} operations", function)
        call = Call(function.text, args)
        if all(isinstance(arg, Number) for arg in args):
            raise self.fail(f"'{_text(call)}' is constant; write its value", function)
        if function.text == "standardize" and not isinstance(args[1], Number):
            raise self.fail(f"the eps of standardize is '{_text(args[1])}', not a number", function)
        if function.text in LIMITS and not isinstance(args[1], Number):
            raise self.fail(f"the limit of {function.text} is '{_text(args[1])}', not a number", function)
        return call

    def number(self, token: Token) -> Number:
        """The number that a token spells."""
        value = float(token.text)
        if not abs(value) <= LARGEST:
            raise self.fail("a number is beyond the range of FP32", token)
        return Number(value)
