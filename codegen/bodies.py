"""Body -> Triton function: the arithmetic of a fused operation as source that a kernel calls on its tiles.

    h = bf16(x0 + x1); n = rsqrt(mean(h * h) + 1e-06); bf16(x2 * bf16(h * n))            keep = ["h"]

    def body_5ac1…(x0=None, …, x5=None, y0=None, y1=None, inside=None, columns=None):
        v_h = bf16_sum(x0, x1)
        v_n = rsqrt((mean((wide(v_h) * wide(v_h)), inside, columns) + 1e-06))
        return (wide(bf16_product(x2, bf16((wide(v_h) * v_n)))), v_h,)

A kernel takes the function as a `constexpr` argument. The functions that it calls are those of
`codegen.kernels.body_functions`. It rounds where the body says so and nowhere else; hence no product and sum may become
one multiply-add: Triton kernels are launched with `enable_fp_fusion=False`, and in Gluon kernels, which need
multiply-adds for their sums, a body's products are calls of `times`.
"""

import hashlib
import linecache
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import triton
from triton.experimental import gluon

from codegen.kernels import body_functions
from qcompiler.dialects.body import FUNCTIONS, OPERATORS, ROUNDED, Body, Call, Expression, Name, Number, parse
from qcompiler.errors import CodegenError

OPERANDS = ("x0", "x1", "x2", "x3", "x4", "x5", "y0", "y1")
"""The operands that a function has parameters for."""

PACKED = {"+": "bf16_sum", "*": "bf16_product"}
"""The operators that have an instruction for bfloat16 numbers."""

SCOPE = {name: getattr(body_functions, name) for name in (*FUNCTIONS, *PACKED.values(), "wide", "times", "divide")} | {
    "tl": triton.language
}
"""What the functions call; Triton's interpreter wants to see its language there, too."""

Language = Literal["triton", "gluon"]


@cache
def triton_function(body: str, keep: tuple[str, ...] = (), language: Language = "triton") -> Any:
    """The function of a body, to be called inside a kernel; the same object for the same arguments.

    It is called with keywords, `BODY(x0=…, y0=…, inside=…, columns=…)`. Operands are tiles in FP32, bfloat16 or float16
    that broadcast to the tile's shape, [rows, columns]: also [1, columns]. For a body with a reduction, `inside` is the
    mask of those columns of the tile that are columns of the row, or None where all are, and `columns` their number, an
    integer. Returns a tuple, also of one: the result in FP32, and the values of `keep`, each in the element type of
    `Body.dtype` and of a shape that broadcasts to the tile's.

    The name and the source follow from the arguments alone, so another process finds the kernel in Triton's cache.

    Args:
        body: Text of a body.
        keep: Names of its definitions.
        language: Of the kernel that calls it: `"triton"`, or `"gluon"`, where there are no reductions.

    Raises:
        CodegenError: The body has an operand that no parameter is there for, or a reduction in Gluon.
        ParseError: It is no body.
    """
    made = parse(body)
    if surplus := [name for name in made.operands if name not in OPERANDS]:
        raise CodegenError("a fused kernel has too few parameters", got=", ".join(surplus), need=", ".join(OPERANDS))
    if language == "gluon" and made.across:
        raise CodegenError("a Gluon kernel has parts of rows, and this body needs whole rows", got=repr(body))
    digest = hashlib.sha256("|".join([str(made), *keep, language]).encode()).hexdigest()[:16]
    name = f"body_{digest}"
    text = source(made, keep, name, language)
    file = f"<{name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # where Triton looks for it
    scope: dict[str, Any] = {"__name__": __name__, **SCOPE}
    exec(compile(text, file, "exec"), scope)
    jit: Callable[..., Any] = gluon.jit if language == "gluon" else triton.jit
    return jit(scope[name])


def source(body: Body, keep: tuple[str, ...], name: str, language: Language = "triton") -> str:
    """The text of the function."""
    # Definitions are named apart from what the function calls and is given.
    local = {defined: f"v_{defined}" for defined, _ in body.definitions}
    writer = _Writer(local, dict(body.definitions), language)
    lines = [f"{local[defined]} = {writer.text(what)}" for defined, what in body.definitions]
    results = [writer.wide(body.result), *(local[kept] for kept in keep)]
    parameters = ", ".join(f"{operand}=None" for operand in (*OPERANDS, "inside", "columns"))
    lines.append(f"return ({', '.join(results)},)")
    return f"def {name}({parameters}):\n" + "".join(f"    {line}\n" for line in lines)


class _Writer(NamedTuple):
    """Writes expressions in Python.

    Attributes:
        local: Definition -> its name in the text.
        definitions: Definition -> what it stands for.
        language: Of the kernel.
    """

    local: Mapping[str, str]
    definitions: Mapping[str, Expression]
    language: Language

    def wide(self, what: Expression) -> str:
        """An expression in FP32."""
        return f"wide({self.text(what)})" if self._may_be_narrow(what) else self.text(what)

    def text(self, what: Expression) -> str:
        """An expression in its own element type: that of an operand, or what it is rounded to, or FP32."""
        if isinstance(what, Name):
            return self.local.get(what.name, what.name)
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
        return isinstance(what, Name) or (isinstance(what, Call) and what.function in ROUNDED)
