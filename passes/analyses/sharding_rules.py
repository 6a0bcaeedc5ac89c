"""Factors of operations: the axes of operands and results that can be cut together, with a proof for each operation.

    %y = aten.linear(%x, %w, %b)          rows       x[i, :]           -> y[i, :]
                                          columns    w[j, :], b[j]     -> y[:, j]
                                          sum        x[:, k], w[:, k]  -> y is a partial sum, and b is one of its terms

A factor is a loop of the operation. If all values that have it are cut along it into equal parts, each part of the
results depends only on its own parts of the operands. Operations that are not in the table have no factors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

from passes.analyses.channel_labels import Slot, runs
from qcompiler.dialects.aten import is_pointwise
from qcompiler.ir import ALL, Op, Size, TensorType, Value
from qcompiler.ir.op import Path
from qcompiler.ir.traits import traits_of


@dataclass(frozen=True)
class Place:
    """Where a factor appears: an axis of an operand or a result.

    Attributes:
        slot: The path of an operand, or the index of a result.
        axis: The axis.
        inner: Elements along the axis for each step of the factor, such as the size of a head.
    """

    slot: Slot
    axis: int
    inner: int = 1


@dataclass(frozen=True)
class Factor:
    """One loop of an operation.

    Attributes:
        places: The axes that are cut together.
        summed: Whether the operation sums over it, so that each part makes a term of the result.
        terms: If summed, operands that are added once, such as a bias: one rank holds them, the others zeros.
    """

    places: tuple[Place, ...]
    summed: bool = False
    terms: tuple[Path, ...] = ()


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


def value_at(op: Op, slot: Slot) -> Value | None:
    """The tensor at a slot; None for a number, a literal, or an operand that is absent."""
    if isinstance(slot, int):
        value: object = op.results[slot]
    else:
        value = dict(op.operands()).get(slot)
    return value if isinstance(value, Value) and isinstance(value.type, TensorType) else None


def _shape(op: Op, slot: Slot) -> tuple[Size, ...]:
    value = value_at(op, slot)
    return () if value is None else value.tensor.shape


def _results(op: Op) -> list[int]:
    return [index for index, value in enumerate(op.results) if isinstance(value.type, TensorType)]


def _axis(op: Op, name: str, rank: int) -> int | None:
    """An argument that is one axis, as a nonnegative index; None if it is not fixed."""
    axis = op.argument(name)
    return axis % max(1, rank) if isinstance(axis, int) else None


def _axes(op: Op, name: str, rank: int) -> set[int] | None:
    """An argument that is an axis or several; all axes if it is absent or empty, None if it is not fixed."""
    axes = op.argument(name)
    listed = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
    fixed = [axis % max(1, rank) for axis in listed if isinstance(axis, int)]
    return None if len(fixed) < len(listed) else set(fixed or range(rank))


# Operations that keep axes


def _aligned(op: Op, slots: Sequence[Slot], skip: frozenset[int] = frozenset()) -> Iterator[Factor]:
    """Operands are aligned on the right with the result; an operand of size 1 along an axis lacks the factor."""
    shape = _shape(op, 0)
    for axis, size in enumerate(shape):
        places = [Place(index, axis) for index in _results(op)]
        for slot in slots:
            own = _shape(op, slot)
            at = axis - len(shape) + len(own)
            if at >= 0 and own[at] == size:
                places.append(Place(slot, at))
        if axis not in skip and size != 1:
            yield Factor(tuple(places))


def _tensors(op: Op) -> list[Slot]:
    return [path for path, value in op.operands() if isinstance(value.type, TensorType)]


def _elementwise(op: Op) -> Iterator[Factor]:
    yield from _aligned(op, _tensors(op))


def _except(name: str, default: int | None = None) -> Callable[[Op], Iterator[Factor]]:
    """All axes but the ones that an argument names."""

    def factors(op: Op) -> Iterator[Factor]:
        rank = len(_shape(op, 0))
        axes = {default % rank} if default is not None else _axes(op, name, rank)
        if axes is not None:
            yield from _aligned(op, _tensors(op), frozenset(axes))

    return factors


def _reduced(op: Op) -> Iterator[Factor]:
    """All axes but the reduced ones, which the result lacks unless it keeps them."""
    rank = len(_shape(op, (0,)))
    axes = _axes(op, "dim", rank)
    kept = [axis for axis in range(rank) if axes is not None and axis not in axes]
    for at, axis in enumerate(kept):
        image = axis if op.argument("keepdim") else at
        yield Factor((Place((0,), axis), *(Place(index, image) for index in _results(op))))


def _normalized(op: Op) -> Iterator[Factor]:
    """All axes but the last ones, which the argument `normalized_shape` lists."""
    shape = op.argument("normalized_shape")
    count = len(shape) if isinstance(shape, tuple) else len(_shape(op, (0,)))
    for axis in range(len(_shape(op, (0,))) - count):
        yield Factor((Place((0,), axis), Place(0, axis)))


# Operations that move axes


def _permuted(order: Callable[[Op, int], Sequence[int] | None]) -> Callable[[Op], Iterator[Factor]]:
    """Axis `order[i]` of the operand is axis i of the result."""

    def factors(op: Op) -> Iterator[Factor]:
        for image, axis in enumerate(order(op, len(_shape(op, (0,)))) or ()):
            yield Factor((Place((0,), axis), Place(0, image)))

    return factors


def _transposed(op: Op, rank: int) -> list[int] | None:
    axes, first, second = list(range(rank)), _axis(op, "dim0", rank), _axis(op, "dim1", rank)
    if first is None or second is None:
        return None
    axes[first], axes[second] = second, first
    return axes


def _dims(op: Op, rank: int) -> list[int] | None:
    dims = op.argument("dims")
    fixed = [axis % rank for axis in dims if isinstance(axis, int)] if isinstance(dims, tuple) else []
    return fixed if len(fixed) == rank else None


def _reshaped(op: Op) -> Iterator[Factor]:
    """The first axes of two groups with equal numbers of elements: their common steps, each of whole inner axes."""
    old, new = _shape(op, (0,)), _shape(op, 0)
    for left, right in runs(old, new):
        a, b = (
            next((axis for axis in group if shape[axis] != 1), None) for group, shape in ((left, old), (right, new))
        )
        if a is None or b is None:
            continue
        if (size := _common(old[a], new[b])) is not None:
            yield Factor((Place((0,), a, size[0]), Place(0, b, size[1])))


def _common(left: Size, right: Size) -> tuple[int, int] | None:
    """Elements of two leading axes for each of their common steps; None if there is only one step."""
    if left == right:
        return 1, 1
    if isinstance(left, int) and isinstance(right, int) and (steps := gcd(left, right)) > 1:
        return left // steps, right // steps
    return None


def _sliced(op: Op) -> Iterator[Factor]:
    """All axes but the sliced one; that one, too, if the slice is the whole axis."""
    shape = _shape(op, (0,))
    axis = _axis(op, "dim", len(shape))
    if axis is not None:
        skip = frozenset[int]() if shape == _shape(op, 0) else frozenset((axis,))
        yield from _aligned(op, [(0,)], skip)


def _selected(op: Op) -> Iterator[Factor]:
    rank = len(_shape(op, (0,)))
    gone = _axis(op, "dim", rank)
    kept = [axis for axis in range(rank) if gone is not None and axis != gone]
    for image, axis in enumerate(kept):
        yield Factor((Place((0,), axis), *(Place(index, image) for index in _results(op))))


def _stacked(op: Op) -> Iterator[Factor]:
    new, rank = _axis(op, "dim", len(_shape(op, 0))), len(_shape(op, 0))
    for at, axis in enumerate(axis for axis in range(rank) if new is not None and axis != new):
        yield Factor((Place(0, axis), *(Place(slot, at) for slot in _tensors(op))))


def _sized(op: Op) -> Iterator[Factor]:
    """All axes but the one whose size is the result."""
    rank = len(_shape(op, (0,)))
    read = _axis(op, "dim", rank)
    for axis in range(rank):
        if read is not None and axis != read:
            yield Factor((Place((0,), axis),))


# Lookups, matmuls, attention


def _embedding(op: Op) -> Iterator[Factor]:
    """Columns of the table, axes of the indices, and rows of the table: zeros for rows in other parts."""
    ids = len(_shape(op, op.path("indices")))
    yield Factor((Place(op.path("weight"), 1), Place(0, ids)))
    yield Factor((Place(op.path("weight"), 0),), summed=True)
    for axis in range(ids):
        yield Factor((Place(op.path("indices"), axis), Place(0, axis)))


def _linear(op: Op) -> Iterator[Factor]:
    x, w, bias, rank = op.path("input"), op.path("weight"), op.path("bias"), len(_shape(op, 0))
    own = (bias,) if op.get("bias") is not None else ()
    for axis in range(rank - 1):
        yield Factor((Place(x, axis), Place(0, axis)))
    yield Factor((Place(w, 0), *(Place(path, 0) for path in own), Place(0, rank - 1)))
    yield Factor((Place(x, rank - 1), Place(w, 1)), summed=True, terms=own)


def _matmul(op: Op) -> Iterator[Factor]:
    """Batches, rows, columns, and the sum, of two operands with two axes or more."""
    left, right = _shape(op, (0,)), _shape(op, (1,))
    rank = len(_shape(op, 0))
    if min(len(left), len(right)) < 2:
        return
    yield Factor((Place((0,), len(left) - 2), Place(0, rank - 2)))
    yield Factor((Place((1,), len(right) - 1), Place(0, rank - 1)))
    yield Factor((Place((0,), len(left) - 1), Place((1,), len(right) - 2)), summed=True)
    yield from _aligned(op, [(0,), (1,)], frozenset((rank - 2, rank - 1)))


def _attention(op: Op) -> Iterator[Factor]:
    """Batches, and heads: each key head with the query heads that read it. A mask may differ between heads."""
    if _has(op, "attn_mask"):
        return
    query, keys = _shape(op, op.path("query")), _shape(op, op.path("key"))
    axis = len(query) - 3
    for other in range(axis):
        yield Factor((*(Place(op.path(name), other) for name in ("query", "key", "value")), Place(0, other)))
    heads, groups = query[axis], keys[axis]
    if axis >= 0 and isinstance(heads, int) and isinstance(groups, int) and heads % groups == 0:
        each = heads // groups
        shared = [Place(op.path(name), axis) for name in ("key", "value")]
        own = [Place(op.path(name), 0, each) for name in ("sinks", "slopes") if _has(op, name)]
        yield Factor((Place(op.path("query"), axis, each), *shared, *own, Place(0, axis, each)))


def _has(op: Op, name: str) -> bool:
    """Whether an operation has an operand that only some kinds of attention take."""
    return name in traits_of(op.name).positions and op.get(name) is not None


def _dequantized(op: Op) -> Iterator[Factor]:
    """Axes of the codes, in steps of whole blocks; a scale that spans an axis belongs to all of its parts."""
    codes, scales = _shape(op, op.path("data")), _shape(op, op.path("scale"))
    if len(op.args) != 2 or len(codes) != len(scales):
        return
    blocks = [1] * (len(codes) - 2) + list(op.format().block)
    for axis, (size, count, block) in enumerate(zip(codes, scales, blocks, strict=True)):
        if block == ALL or count == 1:
            yield Factor((Place(op.path("data"), axis), Place(0, axis)))
        elif size == count * block:
            yield Factor((Place(op.path("data"), axis, block), Place(op.path("scale"), axis), Place(0, axis, block)))


# The table

_MOVED = "Each element of the result is the operand's element at one place, and axes move as a whole."
_ALONG = "It combines elements along the named axes only."
_COPY = "Copies of a part are the same part of the copies."
_VIEW = Row(
    "Elements keep their order, so that parts of the first axes of equal groups hold the same elements.",
    _reshaped, "regroups the elements along", "size",
)  # fmt: skip
_SCALED_DOT = Row("Attention heads do not read each other.", _attention, "reads all elements along")
_SOFTMAX = Row(_ALONG, _except("dim"), "normalizes along")
_REDUCTION = Row(_ALONG, _reduced, "combines the elements along")
_MATMUL = Row("y[i, j] = Σₖ x[i, k] · w[k, j].", _matmul, "mixes")
_PART = Row("Parts along one axis keep all others.", _sliced, "selects elements along")
_PIECES = Row("Parts along one axis keep all others.", _except("dim"), "splits")
_UNSQUEEZED = Row(_VIEW.proof, _reshaped, "inserts or removes")

ELEMENTWISE = Row(
    "Each element of the result depends on the elements at its own place: torch tags the operation as pointwise.",
    _elementwise, "broadcasts along",
)  # fmt: skip
"""The row of all operations that torch tags as pointwise."""

RULES: Mapping[str, Row] = {
    **dict.fromkeys(
        (
            "aten._to_copy", "aten.to.dtype", "aten.clone", "aten.contiguous", "aten.alias", "aten.detach",
            "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.masked_fill.Tensor", "aten.hardswish",
        ),
        Row("Each element of the result depends on the elements at its own place.", _elementwise, "broadcasts along"),
    ),
    **dict.fromkeys(
        ("coll.reshard", "coll.all_reduce"),
        Row("Each element of a sum over ranks depends on the elements at its own place.", _elementwise, "broadcasts"),
    ),
    "aten.view": _VIEW,
    "aten.reshape": Row(_VIEW.proof, _reshaped, _VIEW.otherwise, "shape"),
    "aten._unsafe_view": _VIEW,
    "aten.flatten.using_ints": _UNSQUEEZED,
    "aten.unsqueeze": _UNSQUEEZED,
    "aten.squeeze": _UNSQUEEZED,
    "aten.squeeze.dim": _UNSQUEEZED,
    "aten.squeeze.dims": _UNSQUEEZED,
    "aten.expand": Row(_COPY, _elementwise, "copies along", "size"),
    "aten.t": Row(_MOVED, _permuted(lambda _, rank: [*range(rank)][::-1]), "moves"),
    "aten.transpose.int": Row(_MOVED, _permuted(_transposed), "moves"),
    "aten.permute": Row(_MOVED, _permuted(_dims), "moves"),
    "aten.slice.Tensor": _PART,
    "aten.select.int": Row("Parts along one axis keep all others.", _selected, "selects one element along"),
    "aten.split.Tensor": _PIECES,
    "aten.split_with_sizes": _PIECES,
    "aten.chunk": _PIECES,
    "aten.unbind.int": Row("Parts along one axis keep all others.", _selected, "splits"),
    "aten.cat": Row("Operands side by side along one axis keep all others.", _except("dim"), "concatenates along"),
    "aten.stack": Row("Operands side by side along a new axis keep all others.", _stacked, "adds"),
    "aten.sym_size.int": Row("The size of an axis does not depend on the others.", _sized, "reads the size of"),
    "aten.softmax.int": _SOFTMAX,
    "aten._softmax": _SOFTMAX,
    "aten.log_softmax.int": _SOFTMAX,
    "aten.cumsum": Row(_ALONG, _except("dim"), "sums up along"),
    "aten.sum.dim_IntList": _REDUCTION,
    "aten.mean.dim": _REDUCTION,
    "aten.amax": _REDUCTION,
    "aten.amin": _REDUCTION,
    "aten.rms_norm": Row(_ALONG, _normalized, "normalizes along"),
    "aten.layer_norm": Row(_ALONG, _normalized, "normalizes along"),
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


def row_of(op: Op) -> Row | None:
    """The row of an operation; None if it has none."""
    if op.effects and op.name not in RULES:
        return None
    return RULES.get(op.name) or (ELEMENTWISE if is_pointwise(op.name) else None)
