"""The body of a fused operation: arithmetic over the rows of a few tensors, in FP32, as text.

    h = bf16(x0 + x1); n = rsqrt(mean(h * h) + 1e-06); bf16(x2 * bf16(h * n))

Definitions, each used by those behind it, and at the end the result. All arithmetic is in FP32, and rounding is where
`bf16` or `f16` says so; hence a body can repeat, bit for bit, what separate operations of torch in those element types
compute. `x0`, `x1`, … are the operands: tensors of the shape of the result, or vectors with one number for each of its
columns. In the body of a matmul `y0` is the sum, or `y0` and `y1` are its left and its right half.

Here a body is text, a tree, and its meaning in torch; code generation makes kernels of the tree.
"""

import ast
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.errors import ParseError, did_you_mean

OPERAND = re.compile(r"[xy](0|[1-9][0-9]*)")
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Name:
    """An operand, or what a definition before has defined."""

    name: str


@dataclass(frozen=True)
class Number:
    """A literal, in FP32."""

    value: float


@dataclass(frozen=True)
class Call:
    """A function of `FUNCTIONS`, or one of the operators + - * / by that name."""

    function: str
    args: tuple["Expression", ...]


Expression = Name | Number | Call


@dataclass(frozen=True)
class Function:
    """What a body may call.

    Attributes:
        arity: How many arguments it takes.
        meaning: It in torch, on FP32 tensors.
        across: Whether a column of its result depends on the whole row.
    """

    arity: int
    meaning: Callable[..., Any]
    across: bool = False


def _standardize(x: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=eps)


FUNCTIONS: dict[str, Function] = {
    "bf16": Function(1, lambda x: x.bfloat16().float()),
    "f16": Function(1, lambda x: x.half().float()),
    "exp": Function(1, torch.exp),
    "gelu": Function(1, functional.gelu),
    "gelu_tanh": Function(1, lambda x: functional.gelu(x, approximate="tanh")),
    "neg": Function(1, torch.neg),
    "relu": Function(1, torch.relu),
    "rsqrt": Function(1, torch.rsqrt),
    "sigmoid": Function(1, torch.sigmoid),
    "silu": Function(1, functional.silu),
    "sqrt": Function(1, torch.sqrt),
    "tanh": Function(1, torch.tanh),
    "mean": Function(1, lambda x: x.mean(-1, keepdim=True), across=True),
    "standardize": Function(2, _standardize, across=True),
}
"""Everything that can be called. `standardize(x, eps)` is (x - mean(x)) / sqrt(variance(x) + eps), the variance that of
all the row (not N - 1): a layer norm without gain and bias. `eps` is a number."""


def _divide(a: Any, b: Any) -> Any:
    # Torch takes 3.0 / x for 3.0 * (1 / x), and on a GPU x / 3.0 for x * (1 / 3.0): each is rounded twice.
    like = a if isinstance(a, Tensor) else b
    top, bottom = (v if isinstance(v, Tensor) else torch.full((), v, device=like.device) for v in (a, b))
    return top / bottom


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": _divide,
}
_SPELLED: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2}

ROUNDED: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "f16": torch.float16}
"""The functions that round, and to what."""


@dataclass(frozen=True)
class Body:
    """Definitions in order, and the result.

    Attributes:
        definitions: Pairs of a name and what it stands for.
        result: The result.
    """

    definitions: tuple[tuple[str, Expression], ...]
    result: Expression

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return "; ".join([*(f"{name} = {_text(what)}" for name, what in self.definitions), _text(self.result)])

    def expressions(self) -> Iterator[Expression]:
        """Every part of every expression."""
        stack = [self.result, *(what for _, what in reversed(self.definitions))]
        while stack:
            yield (expression := stack.pop())
            stack += reversed(expression.args) if isinstance(expression, Call) else ()

    @property
    def operands(self) -> tuple[str, ...]:
        """The operands that are read, sorted by letter and number."""
        names = {part.name for part in self.expressions() if isinstance(part, Name) and OPERAND.fullmatch(part.name)}
        return tuple(sorted(names, key=lambda name: (name[0], int(name[1:]))))

    @property
    def across(self) -> bool:
        """Whether a column of the result depends on the whole row."""
        calls = (part.function for part in self.expressions() if isinstance(part, Call))
        return any(FUNCTIONS[name].across for name in calls if name in FUNCTIONS)

    def dtype(self, name: str | None = None) -> torch.dtype:
        """The element type that a definition, or the result, has been rounded to; FP32 where it was not."""
        defined = dict(self.definitions)
        what = self.result if name is None else defined[name]
        while isinstance(what, Name) and what.name in defined:
            what = defined[what.name]
        return ROUNDED.get(what.function, torch.float32) if isinstance(what, Call) else torch.float32

    def run(self, operands: Mapping[str, Tensor], keep: Sequence[str] = ()) -> tuple[Tensor, ...]:
        """The result, and the definitions of the names in `keep`, each in its `dtype`, contiguous.

        Args:
            operands: Name -> tensor of any floating dtype; all that are not of one shape broadcast to it.
            keep: Names of definitions.
        """
        values = {name: operands[name].float() for name in self.operands}
        shape = max((value.shape for value in values.values()), key=len)
        for name, what in self.definitions:
            values[name] = _run(what, values)
        result = self.result
        if isinstance(result, Call) and result.function in ROUNDED:
            (result,) = result.args  # `to` rounds, without the way back to FP32
        made = [_run(result, values).to(self.dtype()), *(values[name].to(self.dtype(name)) for name in keep)]
        return tuple(value.expand(shape).contiguous() for value in made)


def _run(what: Expression, values: Mapping[str, Any]) -> Any:
    if isinstance(what, Number):
        return what.value
    if isinstance(what, Name):
        return values[what.name]
    function = OPERATORS.get(what.function) or FUNCTIONS[what.function].meaning
    return function(*(_run(arg, values) for arg in what.args))


def _text(what: Expression, strength: int = 0) -> str:
    if isinstance(what, Name):
        return what.name
    if isinstance(what, Number):
        return repr(what.value)
    if what.function not in OPERATORS:
        return f"{what.function}({', '.join(map(_text, what.args))})"
    mine = _STRENGTH[what.function]
    left, right = _text(what.args[0], mine), _text(what.args[1], mine + 1)
    text = f"{left} {what.function} {right}"
    return f"({text})" if mine < strength else text


@cache
def parse(text: str) -> Body:
    """The body that `text` spells; ParseError when it is none."""
    try:
        return _parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _error(text, f"it is malformed: {error}") from None


def _parse(text: str) -> Body:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of "1or x0", which is none of ours anyway
        statements = ast.parse(text).body
    if not statements or not isinstance(last := statements[-1], ast.Expr):
        raise _error(text, "it has no result")
    definitions: list[tuple[str, Expression]] = []
    known: set[str] = set()
    for statement in statements[:-1]:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                if name in known or OPERAND.fullmatch(name) or name in FUNCTIONS:
                    raise _error(text, f"'{name}' has a meaning already")
                if isinstance(read := _read(value, known, text), Number):
                    raise _error(text, f"'{name}' is a number, which stands where it is used")
                definitions.append((name, read))
                known.add(name)
            case _:
                raise _error(text, f"'{ast.unparse(statement)}' defines nothing")
    if isinstance(result := _read(last.value, known, text), Number):
        raise _error(text, "its result is a number")
    return Body(tuple(definitions), result)


def _read(node: ast.expr, known: set[str], text: str) -> Expression:
    match node:
        case ast.Constant(value=float() | int() as value) if not isinstance(value, bool):
            return _number(value, text)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=float() | int() as value)) if not isinstance(
            value, bool
        ):
            return Number(-_number(value, text).value)
        case ast.Name(id=name):
            if name not in known and not OPERAND.fullmatch(name):
                raise _error(text, f"'{name}' is not defined before it is used")
            return Name(name)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _SPELLED:
            return _call(_SPELLED[type(op)], (left, right), known, text)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            if name not in FUNCTIONS:
                raise _error(text, f"there is no function '{name}'", did_you_mean(name, FUNCTIONS))
            if len(args) != FUNCTIONS[name].arity:
                raise _error(text, f"{name} takes {FUNCTIONS[name].arity} arguments, but got {len(args)}")
            return _call(name, args, known, text)
    raise _error(text, f"'{ast.unparse(node)}' is none of a name, a number, a call, and + - * /")


def _call(function: str, nodes: Sequence[ast.expr], known: set[str], text: str) -> Call:
    call = Call(function, tuple(_read(node, known, text) for node in nodes))
    if all(isinstance(arg, Number) for arg in call.args):
        raise _error(text, f"'{_text(call)}' is a number, which is written as one")
    if function == "standardize" and not isinstance(call.args[1], Number):
        raise _error(text, f"the eps of standardize is '{_text(call.args[1])}', not a number")
    return call


def _number(value: float, text: str) -> Number:
    if not abs(value) <= LARGEST:
        raise _error(text, "a number in it is beyond the range of FP32")
    return Number(float(value))


def _error(text: str, why: str, fix: str | None = None) -> ParseError:
    return ParseError(f"the body of a fused operation is wrong: {why}", got=repr(text), fix=fix)
