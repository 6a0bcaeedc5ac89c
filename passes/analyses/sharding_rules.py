"""Factors of operations: the axes of operands and results that can be cut together, with a proof for each operation.

    %y = aten.linear(%x, %w, %b)          rows       x[i, :]           -> y[i, :]
                                          columns    w[j, :], b[j]     -> y[:, j]
                                          sum        x[:, k], w[:, k]  -> y is a partial sum, and b is one of its terms

A factor is a loop of the operation. If all values that have it are cut along it into equal parts, each part of the
results depends only on its own parts of the operands. Operations that are not in the table have no factors.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from passes.analyses.channel_labels import Slot
from passes.analyses.sharding_factors import (
    Factor,
    Place,
    aligned,
    all_but,
    axes_of,
    axis_of,
    elementwise,
    first_axes,
    normalized,
    permutation,
    permuted,
    reduced,
    reshaped,
    selected,
    shape_of,
    sized,
    sliced,
    squeezed,
    stacked,
    summed,
    transposed,
)
from qcompiler.dialects.aten import is_pointwise
from qcompiler.ir import ALL, Op
from qcompiler.ir.op import Path
from qcompiler.ir.traits import traits_of


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        proof: Why parts of the results depend only on parts of the operands.
        factors: The factors of an operation.
        otherwise: What the operation does along all other axes.
        sizes: The parameter that lists the sizes of the result, by torch schema name.
    """

    proof: str
    factors: Callable[[Op], Iterator[Factor]]
    otherwise: str
    sizes: str | None = None


# Lookups, matmuls, attention


def _embedding(op: Op) -> Iterator[Factor]:
    """Columns of the table, axes of the indices, and rows of the table: zeros for rows in other parts."""
    ids = len(shape_of(op, op.path("indices")))
    yield Factor((Place(op.path("weight"), 1), Place(0, ids)))
    yield Factor((Place(op.path("weight"), 0),), summed=True)
    for axis in range(ids):
        yield Factor((Place(op.path("indices"), axis), Place(0, axis)))


def _linear(op: Op) -> Iterator[Factor]:
    x, w, bias, rank = op.path("input"), op.path("weight"), op.path("bias"), len(shape_of(op, 0))
    own = (bias,) if op.get("bias") is not None else ()
    for axis in range(rank - 1):
        yield Factor((Place(x, axis), Place(0, axis)))
    yield Factor((Place(w, 0), *(Place(path, 0) for path in own), Place(0, rank - 1)))
    yield Factor((Place(x, rank - 1), Place(w, 1)), summed=True, terms=own)


def _matmul(op: Op) -> Iterator[Factor]:
    """Batches, rows, columns, and the sum, of two operands with two axes or more."""
    left, right = shape_of(op, (0,)), shape_of(op, (1,))
    rank = len(shape_of(op, 0))
    if min(len(left), len(right)) < 2:
        return
    yield Factor((Place((0,), len(left) - 2), Place(0, rank - 2)))
    yield Factor((Place((1,), len(right) - 1), Place(0, rank - 1)))
    yield Factor((Place((0,), len(left) - 1), Place((1,), len(right) - 2)), summed=True)
    yield from aligned(op, [(0,), (1,)], frozenset((rank - 2, rank - 1)))


def _attention(op: Op) -> Iterator[Factor]:
    """Batches, and query heads: a key head belongs to all query heads that read it, and a single one to each.

    A mask has the axes of the scores, aligned on the right; it is the same for all along an axis of size 1.
    """
    query, keys = shape_of(op, op.path("query")), shape_of(op, op.path("key"))
    masks = [op.path("attn_mask")] if _has(op, "attn_mask") else []
    axis = len(query) - 3
    for other in range(axis):
        alike = [Place(op.path(name), other) for name in ("query", "key", "value")]
        yield Factor((*alike, *_mask_places(op, masks, other), Place(0, other)))
    heads, groups = query[axis], keys[axis]
    if axis >= 0 and isinstance(heads, int) and isinstance(groups, int) and heads % groups == 0:
        shared = [Place(op.path(name), axis, shared=heads // groups) for name in ("key", "value")]
        own = [Place(op.path(name), 0) for name in ("sinks", "slopes") if _has(op, name)]
        yield Factor((Place(op.path("query"), axis), *shared, *own, *_mask_places(op, masks, axis), Place(0, axis)))


def _mask_places(op: Op, masks: list[Path], axis: int) -> Iterator[Place]:
    """Where masks have an axis of the scores."""
    for path in masks:
        at = axis - len(shape_of(op, 0)) + len(shape_of(op, path))
        if at >= 0 and shape_of(op, path)[at] != 1:
            yield Place(path, at)


def _has(op: Op, name: str) -> bool:
    """Whether an operation has an operand that only some kinds of attention take."""
    return name in traits_of(op.name).positions and op.get(name) is not None


def _dequantized(op: Op) -> Iterator[Factor]:
    """Axes of the codes, in steps of whole blocks; a scale that spans an axis belongs to all of its parts."""
    codes, scales = shape_of(op, op.path("data")), shape_of(op, op.path("scale"))
    if len(op.args) != 2 or len(codes) != len(scales):
        return
    blocks = [1] * (len(codes) - 2) + list(op.format().block)
    for axis, (size, count, block) in enumerate(zip(codes, scales, blocks, strict=True)):
        if block == ALL or count == 1:
            yield Factor((Place(op.path("data"), axis), Place(0, axis)))
        elif size == count * block:
            yield Factor((Place(op.path("data"), axis, block), Place(op.path("scale"), axis), Place(0, axis, block)))


# Norms that `split-norms` has not taken apart yet


def _averaged(op: Op) -> Iterator[Factor]:
    """The averaged axes, if their sizes are known: the mean is a sum, then a quotient."""
    shape = shape_of(op, (0,))
    axes = axes_of(op, "dim", len(shape)) or set()
    if all(isinstance(shape[axis], int) for axis in axes):
        for axis in sorted(axes):
            yield Factor((Place((0,), axis),), summed=True)


def _normalized_along(op: Op) -> Iterator[Factor]:
    """The normalized axes: only the sum of the squares, and of the elements, reads more than one part."""
    shape, over = shape_of(op, (0,)), op.argument("normalized_shape")
    count = len(over) if isinstance(over, tuple) else 0
    own = [op.path(name) for name in ("weight", "bias") if _has(op, name)]
    for at in range(count):
        axis = len(shape) - count + at
        yield Factor((Place((0,), axis), *(Place(path, at) for path in own), Place(0, axis)))


# Routers


def _picked(op: Op) -> Iterator[Factor]:
    """Axes that are not indexed, if the index is as long as the operand."""
    slots: list[Slot] = [op.path("self"), op.path("index")]
    shape, index = (shape_of(op, slot) for slot in slots)
    along = axis_of(op, "dim", len(shape))
    odd = {axis for axis, (size, own) in enumerate(zip(shape, index, strict=True)) if size != own}
    if along is not None:
        yield from aligned(op, slots, frozenset({along, *odd}))


# The table

_MOVED = "Each element of the result is the operand's element at one place, and axes move as a whole."
_ALONG = "It combines elements along the named axes only."
_COPY = "Copies of a part are the same part of the copies."
_PAIRS = "A complex number is a pair along the last axis, and all other axes remain."
_VIEW = Row(
    "Elements keep their order, so that parts of the first axes of equal groups hold the same elements.",
    reshaped, "regroups the elements along", "size",
)  # fmt: skip
_SCALED_DOT = Row("Attention heads do not read each other.", _attention, "reads all elements along")
_SOFTMAX = Row(_ALONG, all_but("dim"), "normalizes along")
_REDUCTION = Row(_ALONG, reduced, "combines the elements along")
_MATMUL = Row("y[i, j] = Σₖ x[i, k] · w[k, j].", _matmul, "mixes")
_SUM = Row(_ALONG, summed, "combines the elements along")
_PART = Row("Parts along one axis keep all others.", sliced, "selects elements along")
_PIECES = Row("Parts along one axis keep all others.", all_but("dim"), "splits")
_UNSQUEEZED = Row(_VIEW.proof, reshaped, "inserts or removes")
_SQUEEZED = Row("Axes that are not listed remain, whatever their sizes.", squeezed, "may remove")

ELEMENTWISE = Row(
    "Each element of the result depends on the elements at its own place: torch tags the operation as pointwise.",
    elementwise, "broadcasts along",
)  # fmt: skip
"""The row of all operations that torch tags as pointwise."""

RULES: Mapping[str, Row] = {
    **dict.fromkeys(
        (
            "aten._to_copy", "aten.to.dtype", "aten.clone", "aten.contiguous", "aten.alias", "aten.detach",
            "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.masked_fill.Tensor", "aten.hardswish",
        ),
        Row("Each element of the result depends on the elements at its own place.", elementwise, "broadcasts along"),
    ),
    **dict.fromkeys(
        ("coll.reshard", "coll.all_reduce"),
        Row("Each element of a sum over ranks depends on the elements at its own place.", elementwise, "broadcasts"),
    ),
    "aten.view": _VIEW,
    "aten.reshape": Row(_VIEW.proof, reshaped, _VIEW.otherwise, "shape"),
    "aten._unsafe_view": _VIEW,
    "aten.flatten.using_ints": _UNSQUEEZED,
    "aten.unsqueeze": _UNSQUEEZED,
    **dict.fromkeys(("aten.squeeze", "aten.squeeze.dim", "aten.squeeze.dims"), _SQUEEZED),
    "aten.expand": Row(_COPY, elementwise, "copies along", "size"),
    "aten.t": Row(_MOVED, permuted(lambda _, rank: [*range(rank)][::-1]), "moves"),
    "aten.transpose.int": Row(_MOVED, permuted(transposed), "moves"),
    "aten.permute": Row(_MOVED, permuted(permutation), "moves"),
    "aten.slice.Tensor": _PART,
    "aten.select.int": Row("Parts along one axis keep all others.", selected, "selects one element along"),
    "aten.split.Tensor": _PIECES,
    "aten.split_with_sizes": _PIECES,
    "aten.chunk": _PIECES,
    "aten.unbind.int": Row("Parts along one axis keep all others.", selected, "splits"),
    "aten.cat": Row("Operands side by side along one axis keep all others.", all_but("dim"), "concatenates along"),
    "aten.stack": Row("Operands side by side along a new axis keep all others.", stacked, "adds"),
    "aten.sym_size.int": Row("The size of an axis does not depend on the others.", sized, "reads the size of"),
    "aten.view_as_complex": Row(_PAIRS, first_axes, "joins pairs along"),
    "aten.view_as_real": Row(_PAIRS, first_axes, "adds"),
    "aten.softmax.int": _SOFTMAX,
    "aten._softmax": _SOFTMAX,
    "aten.log_softmax.int": _SOFTMAX,
    "aten.cumsum": Row(_ALONG, all_but("dim"), "sums up along"),
    "aten.sum.dim_IntList": _SUM,
    "aten.mean.dim": _REDUCTION,
    "aten.amax": _REDUCTION,
    "aten.amin": _REDUCTION,
    "aten.max.dim": _REDUCTION,
    "aten.topk": Row(_ALONG, all_but("dim"), "selects elements along"),
    **dict.fromkeys(
        ("aten.gather", "aten.scatter.value"),
        Row("Elements move along the named axis only.", _picked, "moves elements along"),
    ),
    "aten.zeros_like": Row("All elements are alike.", elementwise, "fills"),
    "aten.rms_norm": Row(_ALONG, normalized, "normalizes along"),
    "aten.layer_norm": Row(_ALONG, normalized, "normalizes along"),
    "aten.embedding": Row(
        "A row that is looked up holds the same columns, and is in one part of the rows.", _embedding, "looks up along"
    ),
    "aten.linear": Row("y[i, j] = b[j] + Σₖ x[i, k] · w[j, k].", _linear, "mixes"),
    "aten.mm": _MATMUL,
    "aten.bmm": _MATMUL,
    "aten.matmul": _MATMUL,
    "aten.scaled_dot_product_attention": _SCALED_DOT,
    "attention.causal": _SCALED_DOT,
    "quant.dequantize": Row("A block of codes and its scale are in the same part.", _dequantized, "spans"),
}  # fmt: skip
"""Operation -> why and along which factors it can be cut; operations that torch tags as pointwise need no row."""


NORMS: Mapping[str, Callable[[Op], Iterator[Factor]]] = {
    "aten.mean.dim": _averaged,
    "aten.rms_norm": _normalized_along,
    "aten.layer_norm": _normalized_along,
}
"""Operation -> the factors that it also has once the pass `split-norms` has taken it apart."""


def row_of(op: Op) -> Row | None:
    """The row of an operation; None if it has none."""
    if op.effects and op.name not in RULES:
        return None
    return RULES.get(op.name) or (ELEMENTWISE if is_pointwise(op.name) else None)


def factor_at(op: Op, slot: Slot, axis: int) -> Factor | None:
    """The factor of an operation that has an axis of an operand or a result; None if there is none."""
    row = row_of(op)
    factors = row.factors(op) if row is not None else ()
    return next((f for f in factors if any((place.slot, place.axis) == (slot, axis) for place in f.places)), None)
