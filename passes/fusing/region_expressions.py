"""The fused expression of a region as text; only values that are read more than once get names.

    %h = aten.add.Tensor(%x, %r) : bf16       residual output
    %n = aten.rms_norm(%h, [256], %w)
  ->
    h0 = bf16(x0 + x1); bf16(h0 * rsqrt(mean(h0 * h0) + 1e-06) * x2)          keep = ["h0"]

Names depend only on the structure of the region, so that equal layers have equal expressions and share one kernel.
"""

from collections import Counter
from collections.abc import Collection, Mapping

from passes.analyses.arithmetic import term_of
from passes.fusing.fusion_regions import FusionRegion
from qcompiler.dialects.expression_nodes import Call, Expression, Name, parts, rebuilt
from qcompiler.dialects.fused_expression import OPERAND, ROUNDED, FusedExpression, parse
from qcompiler.ir import DType, Op, Value
from qcompiler.numerics.dtypes import torch_dtype

ROUNDING = {dtype: name for name, dtype in ROUNDED.items()}


def expression_of(
    region: FusionRegion, operands: Mapping[Value, Expression], prescale: Expression | None = None
) -> FusedExpression:
    """The expression of a region, given the text of its operands; its residual outputs are h0, h1, … in order.

    Args:
        region: The region.
        operands: Operand -> an expression for it, such as x0.
        prescale: A factor that the result is multiplied by, without another rounding.
    """
    writer = _Writer(region, operands)
    result = writer.written()
    return FusedExpression(tuple(writer.definitions), result if prescale is None else Call("*", (result, prescale)))


def in_order(expression: FusedExpression, vectors: Collection[str] = ()) -> tuple[FusedExpression, tuple[str, ...]]:
    """An expression with operands x0, x1, … numbered in order of use, vectors last; and their previous names."""
    read = dict.fromkeys(
        part.name for part in expression.expressions() if isinstance(part, Name) and part.name[0] == "x"
    )
    before = tuple(sorted((name for name in read if OPERAND.fullmatch(name)), key=lambda name: name in vectors))
    names: dict[str, Expression] = {name: Name(f"x{place}") for place, name in enumerate(before)}
    definitions = tuple((name, substituted(what, names)) for name, what in expression.definitions)
    return FusedExpression(definitions, substituted(expression.result, names)), before


def residual_names(region: FusionRegion) -> tuple[str, ...]:
    """The names of the region's residual outputs in its expression."""
    return tuple(f"h{place}" for place in range(len(region.residuals)))


def rounded(expression: Expression, dtype: DType) -> Expression:
    """An expression rounded to an element type; unchanged for FP32, or if it was just rounded so."""
    name = ROUNDING.get(torch_dtype(dtype))
    if name is None or (isinstance(expression, Call) and expression.function == name):
        return expression
    return Call(name, (expression,))


def substituted(expression: Expression, values: Mapping[str, Expression]) -> Expression:
    """Substitutes other expressions for names in an expression."""
    if isinstance(expression, Name):
        return values.get(expression.name, expression)
    return rebuilt(expression, tuple(substituted(part, values) for part in parts(expression)))


class _Writer:
    """Writes the operations of a region, in order."""

    def __init__(self, region: FusionRegion, operands: Mapping[Value, Expression]) -> None:
        self.region = region
        self.values: dict[Value, Expression] = {}
        self.definitions: list[tuple[str, Expression]] = []
        self.residuals = dict(zip(region.residuals, residual_names(region), strict=True))
        self.reads = self._reads()
        for value, expression in operands.items():
            self._bind(value, expression)

    def written(self) -> Expression:
        """The result."""
        for op in self.region.ops:
            self._bind(op.result, self._expression(op))
        return self.values[self.region.source(self.region.root)]

    def _bind(self, value: Value, expression: Expression) -> None:
        name = self.residuals.get(value)
        if name is None and isinstance(expression, Call) and self.reads[value] > 1:
            name = f"t{sum(defined[0] == 't' for defined, _ in self.definitions)}"
        if name is not None:
            self.definitions.append((name, expression))
            expression = Name(name)
        self.values[value] = expression

    def _expression(self, op: Op) -> Expression:
        template, inputs = self._template(op)
        values = {f"x{place}": self.values[value] for place, value in enumerate(inputs)}
        return rounded(substituted(template, values), op.result.tensor.dtype)

    def _template(self, op: Op) -> tuple[Expression, list[Value]]:
        """The expression of an operation over x0, x1, …, and the values these are."""
        term = term_of(op)
        if term is None:
            raise ValueError(f"{op.name} is in a region, but is not a term")
        return parse(term.text).result, [self.region.source(value) for value in term.inputs]

    def _reads(self) -> Counter[Value]:
        """How often each value is read in the expression."""
        reads = Counter([self.region.source(self.region.root)])
        for op in self.region.ops:
            template, inputs = self._template(op)
            reads.update(inputs[int(name[1:])] for name in _operands(template))
        return reads


def _operands(expression: Expression) -> list[str]:
    """The operands in an expression, once per occurrence."""
    if isinstance(expression, Name):
        return [expression.name] if OPERAND.fullmatch(expression.name) else []
    return [name for arg in expression.args for name in _operands(arg)] if isinstance(expression, Call) else []
