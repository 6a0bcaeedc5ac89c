"""Quantizes before rows are gathered, so that each row is quantized once, and only codes and scales are moved.

    %e = aten.index.Tensor(%x, [%token])                 each token's row, for each of its experts
    %e_q, %e_s = kernel.quantize(%e) {format = #fp8_tile<scale_layout = "col_major">}
  ->
    %x_q, %x_s = kernel.quantize(%x) {format = #fp8_tile<scale_layout = "col_major">}
    %e_q, %e_s = kernel.gather_codes(%x_q, %x_s, %token) {format = #fp8_tile<scale_layout = "col_major">}

Exact, because no scale covers several rows. Only if at least as many rows are gathered as there are. Runs before the
passes that fuse a quantization with the arithmetic before it, such as the norm that computes the tokens' rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from passes.analyses.inequalities import impossible, nonnegative
from qcompiler.ir import DType, Graph, Match, Missed, Op, Rewriter, Rule, Size, Value
from qcompiler.ir.sizes import Expr, symbol
from qcompiler.pass_manager.pipeline import Effect, Pass

NO_GATHER = Missed("it does not quantize rows that an index chooses")


class QuantizeThenGather(Rule):
    """quantize(index(x, [rows]))  ->  gather_codes(quantize(x), rows)"""

    root = ("kernel.quantize",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        gather = op["x"].op
        rows = _rows_of(gather)
        if rows is None:
            return NO_GATHER
        x = gather["self"]
        if op.format().block[0] != 1:
            return Missed("one scale covers several rows, so it depends on which rows are gathered", op.results[1])
        if len(graph.users(gather.result)) > 1:
            return Missed("the gathered rows are also read in float", gather.result)
        if not _at_least(graph, rows.tensor.shape[0], x.tensor.shape[0]):
            return Missed("it may gather fewer rows than there are", rows)
        return {"x": x, "rows": rows, "gather": gather}

    def rewrite(self, op: Op, rewriter: Rewriter, x: Value, rows: Value, gather: Op, **_: Any) -> None:
        made = self._quantized(op, rewriter, x)
        codes = rewriter.insert("kernel.gather_codes", *made.results, rows, attrs={"format": op.format()})
        rewriter.replace(op, *codes.results)
        rewriter.erase_unread(gather)

    def _quantized(self, op: Op, rewriter: Rewriter, x: Value) -> Op:
        """The quantization of all rows: an existing one, which another user reads, or a new one."""
        graph, args = rewriter.graph, (x, *op.args[1:])
        for user in graph.users(x):
            if (user.name, user.args, user.attrs) == (op.name, args, op.attrs):
                if graph.rank(user) > graph.rank(op):
                    graph.move(user, before=op)
                return user
        return rewriter.insert(op.name, *args, attrs=op.attrs, names=[f"{x.name}_q", f"{x.name}_s"])


def _rows_of(gather: Op) -> Value | None:
    """The vector of rows of a matrix that an operation gathers; None if it does something else."""
    if gather.name != "aten.index.Tensor" or len(gather["self"].tensor.shape) != 2:
        return None
    match gather.argument("indices"):
        case (Value() as rows,) if rows.tensor.dtype in (DType.i32, DType.i64) and len(rows.tensor.shape) == 1:
            return rows
    return None


def _at_least(graph: Graph, many: Size, few: Size) -> bool:
    """Whether a size is proven to be at least as large as another one."""
    low = (symbol(name) - limits.low for name, limits in graph.symbols.items())
    facts = frozenset(fact for fact in low if isinstance(fact, Expr))
    products = frozenset(fact for fact in (few - 1,) if isinstance(fact, Expr))  # a matrix without rows costs nothing
    return impossible(nonnegative(few - many - 1), facts | products)


@dataclass(frozen=True)
class GatherCodes(Pass):
    """quantize(index(x, [rows]))  ->  gather_codes(quantize(x), rows)."""

    name: ClassVar[str] = "gather-codes"
    effect: ClassVar[Effect] = Effect.EXACT
    unrelated: ClassVar[tuple[Missed, ...]] = (NO_GATHER,)

    def rules(self) -> Sequence[Rule]:
        """One rule."""
        return (QuantizeThenGather(),)
