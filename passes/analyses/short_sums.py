"""Sums over a short axis of known length, as fused expressions in torch's order of additions.

    %y = aten.sum.dim_IntList(%x, [1])      x [s0, 2, 64]: y[i, j] = 0.0 + x[i, 0, j] + x[i, 1, j]

Torch adds in FP32, from 0.0, and with at most four terms one after the other. With more, a GPU has four partial sums,
each of every fourth term. A CPU does so, too, except for columns that fill a vector register.

    %y = quant.sum_terms(%q, %s) {…}        y[i, j] = q[0, i, j] * s[0, i, j // 128] + q[1, i, j] * s[1, i, j // 128]
"""

from collections.abc import Iterator
from dataclasses import dataclass

from passes.analyses.arithmetic import FLOATS
from passes.analyses.index_expressions import Index
from qcompiler.dialects.kernel import why_no_kernel
from qcompiler.ir import ALL, Op, TensorType, Value
from qcompiler.ir.sizes import floordiv

LONGEST = 12
"""Maximum terms of a sum."""

PARTIAL = 4
"""Partial sums of torch's reductions."""


@dataclass(frozen=True)
class ShortSum:
    """A sum of a few elements.

    Attributes:
        x: The tensor with the elements.
        axis: The axis along which they are added.
        terms: Their number.
        kept: Whether the result has an axis of size 1 instead.
    """

    x: Value
    axis: int
    terms: int
    kept: bool

    @property
    def text(self) -> str:
        """The sum of x0, x1, …."""
        sums = [" + ".join(f"x{each}" for each in range(first, self.terms, PARTIAL)) for first in range(PARTIAL)]
        first, *more = filter(None, sums)
        return " + ".join([f"0.0 + {first}", *(f"({each})" if " " in each else each for each in more)])

    def place(self, at: Index, term: int) -> Index:
        """Where a term of the element at an index of the result is in `x`."""
        return (*at[: self.axis], term, *at[self.axis + self.kept :])


def short_sum(op: Op) -> ShortSum | None:
    """An operation as a short sum of rows; None if it is not one.

    Torch adds the elements of a row, along the last axis, in another order.
    """
    if op.name != "aten.sum.dim_IntList" or op.attrs or not isinstance(op.result.type, TensorType):
        return None
    x, dims = op["self"], op.argument("dim")
    rank = len(x.tensor.shape)
    if x.tensor.dtype not in FLOATS or op.result.tensor.dtype is not x.tensor.dtype:
        return None
    if not isinstance(dims, tuple) or len(dims) != 1 or not isinstance(axis := dims[0], int):
        return None
    terms = x.tensor.shape[axis % rank] if rank else 1
    if not isinstance(terms, int) or not 1 <= terms <= LONGEST or axis % rank == rank - 1 or x.tensor.shape[-1] == 1:
        return None
    return ShortSum(x, axis % rank, terms, op.argument("keepdim") is True)


@dataclass(frozen=True)
class SumOfTerms:
    """A sum of quantized terms.

    Attributes:
        codes: `[terms, ..., K]`.
        scales: `[terms, ..., blocks]`.
        terms: Their number.
        columns: Columns that share a scale.
    """

    codes: Value
    scales: Value
    terms: int
    columns: int

    @property
    def text(self) -> str:
        """The sum of the products of x0 and x1, x2 and x3, …."""
        return " + ".join(f"x{2 * term} * x{2 * term + 1}" for term in range(self.terms))

    def places(self, at: Index) -> Iterator[tuple[Value, Index]]:
        """What x0, x1, … of the element at an index of the result are, and where."""
        for term in range(self.terms):
            yield self.codes, (term, *at)
            yield self.scales, (term, *at[:-1], floordiv(at[-1], self.columns))


def sum_of_terms(op: Op) -> SumOfTerms | None:
    """An operation as a sum of FP8 terms; None if it is not one, or a scale spans rows."""
    if op.name != "quant.sum_terms":
        return None
    codes, scales, (rows, columns) = op["terms"], op["scale"], op.format().block
    terms, length = codes.tensor.shape[0], codes.tensor.shape[-1]
    if not op.format().element.is_float or why_no_kernel(op.format()) or rows != 1:
        return None
    if not isinstance(terms, int) or not isinstance(length, int):
        return None
    return SumOfTerms(codes, scales, terms, length if columns == ALL else columns)
