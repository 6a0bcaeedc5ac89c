"""Compiles a fused expression to a Triton function that a kernel calls on its tiles.

    h = bf16(x0 + x1); n = rsqrt(mean(h * h) + 1e-06); bf16(x2 * bf16(h * n))            keep = ["h"]

    def expression_5ac1…(x0=None, …, x5=None, y0=None, y1=None, inside=None, columns=None):
        v_h = bf16_sum(x0, x1)
        v_n = rsqrt((mean((wide(v_h) * wide(v_h)), inside, columns) + 1e-06))
        return (wide(bf16_product(x2, bf16((wide(v_h) * v_n)))), v_h,)

A kernel takes the function as a `constexpr` argument. It calls functions of `codegen.kernels.expression_functions`. It
rounds only where the expression says so, so no multiplication and addition may be contracted to a multiply-add: Triton
kernels are launched with `enable_fp_fusion=False`. Gluon kernels need multiply-adds for their sums, so in their
expressions multiplications are calls of `times`.
"""

import hashlib
import linecache
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import triton
from triton.experimental import gluon

from codegen.kernels import expression_functions
from codegen.pointwise_reads import IndexWriter, Read
from qcompiler.dialects.expression_nodes import Call, Expression, IndexNumber, Load, Name, Number, Where
from qcompiler.dialects.fused_expression import FUNCTIONS, OPERATORS, ROUNDED, FusedExpression, parse
from qcompiler.errors import CodegenError

OPERANDS = ("x0", "x1", "x2", "x3", "x4", "x5", "y0", "y1")
"""The operands that a function has parameters for."""

PACKED = {"+": "bf16_sum", "*": "bf16_product"}
"""The operators that have a bfloat16 instruction."""

SCOPE = {
    name: getattr(expression_functions, name) for name in (*FUNCTIONS, *PACKED.values(), "wide", "times", "divide")
} | {"tl": triton.language}
"""Globals of the functions; Triton's interpreter also expects its language here."""

Language = Literal["triton", "gluon"]


@cache
def triton_function(expression: str, keep: tuple[str, ...] = (), language: Language = "triton") -> Any:
    """The Triton function of a fused expression; the same object for the same arguments.

    It is called with keywords, `EXPRESSION(x0=…, y0=…, inside=…, columns=…)`. Operands are FP32, bfloat16 or float16
    tiles that broadcast to the tile's shape, [rows, columns], such as [1, columns]. For an expression with a reduction,
    `inside` masks the columns of the tile that belong to the row (None if all do), and `columns` is their number.
    Returns a tuple: the result in FP32, then the values of `keep`, each in the element type of `FusedExpression.dtype`
    and of a shape that broadcasts to the tile's.

    Name and source depend only on the arguments, so other processes find the kernel in Triton's cache.

    Args:
        expression: Text of a fused expression.
        keep: Names of the definitions to return.
        language: Language of the calling kernel: `"triton"`, or `"gluon"`, which supports no reductions.

    Raises:
        CodegenError: The expression has an operand without a parameter, or a reduction in Gluon.
        ParseError: The text is not a fused expression.
    """
    made = parse(expression)
    if surplus := [name for name in made.operands if name not in OPERANDS]:
        raise CodegenError("a fused kernel has too few parameters", got=", ".join(surplus), need=", ".join(OPERANDS))
    if language == "gluon" and made.across:
        raise CodegenError(
            "a Gluon kernel holds parts of rows, but this expression reduces whole rows", got=repr(expression)
        )
    digest = hashlib.sha256("|".join([str(made), *keep, language]).encode()).hexdigest()[:16]
    name = f"expression_{digest}"
    text = source(made, keep, name, language)
    file = f"<{name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # where Triton reads the source
    scope: dict[str, Any] = {"__name__": __name__, **SCOPE}
    exec(compile(text, file, "exec"), scope)
    jit: Callable[..., Any] = gluon.jit if language == "gluon" else triton.jit
    return jit(scope[name])


def source(expression: FusedExpression, keep: tuple[str, ...], name: str, language: Language = "triton") -> str:
    """The source of the function."""
    # Local names must differ from called functions and parameters.
    local = {defined: f"v_{defined}" for defined, _ in expression.definitions}
    writer = Writer(local, dict(expression.definitions), language)
    lines = [f"{local[defined]} = {writer.text(what)}" for defined, what in expression.definitions]
    results = [writer.wide(expression.result), *(local[name] for name in keep)]
    parameters = ", ".join(f"{operand}=None" for operand in (*OPERANDS, "inside", "columns"))
    lines.append(f"return ({', '.join(results)},)")
    return f"def {name}({parameters}):\n" + "".join(f"    {line}\n" for line in lines)


class Writer(NamedTuple):
    """Writes expressions in Python.

    Attributes:
        local: Definition -> its name in the text.
        definitions: Definition -> its expression.
        language: Language of the kernel.
        loads: Load -> the name of its value; likewise elements of integer operands.
        indices: Writes index expressions and the conditions of `where`.
    """

    local: Mapping[str, str]
    definitions: Mapping[str, Expression]
    language: Language
    loads: Mapping[Read, str] = MappingProxyType({})
    indices: IndexWriter = IndexWriter({})

    def wide(self, what: Expression) -> str:
        """An expression in FP32."""
        return f"wide({self.text(what)})" if self._may_be_narrow(what) else self.text(what)

    def text(self, what: Expression) -> str:
        """An expression in its own element type: its operand's, the type it is rounded to, or FP32."""
        if isinstance(what, Name):
            return self.local.get(what.name, what.name)
        if isinstance(what, Load):
            return self.loads[what]
        if isinstance(what, Where):
            return (
                f"tl.where({self.indices.condition(what.condition)}, {self.wide(what.then)}, {self.wide(what.other)})"
            )
        if isinstance(what, IndexNumber):
            return self.indices.number(what.size)
        if isinstance(what, Number):
            return repr(what.value)
        if what.function == "bf16" and isinstance(inner := what.args[0], Call) and self._is_packed(inner):
            return f"{PACKED[inner.function]}({', '.join(map(self.text, inner.args))})"
        args = [self.wide(arg) for arg in what.args]
        if what.function == "/":
            return f"divide({', '.join(args)})"
        if what.function == "*" and self.language == "gluon":
            return f"times({', '.join(args)})"
        if what.function in OPERATORS:
            return f"({f' {what.function} '.join(args)})"
        given = ["inside", "columns"] if FUNCTIONS[what.function].across else []
        return f"{what.function}({', '.join([*args, *given])})"

    def _is_packed(self, what: Call) -> bool:
        return what.function in PACKED and all(map(self._may_be_narrow, what.args))

    def _may_be_narrow(self, what: Expression) -> bool:
        while isinstance(what, Name) and what.name in self.definitions:
            what = self.definitions[what.name]
        return isinstance(what, Name | Load) or (isinstance(what, Call) and what.function in ROUNDED)
