"""Factors of operations that keep or move axes: which axes of operands and results can be cut together.

    %y = aten.transpose.int(%x, 1, 2)          axis 0 of both; axis 1 of %x and 2 of %y; axis 2 of %x and 1 of %y
    %y = aten.view(%x, [%b, %s, 4, 16])        axis 2 of both: a step is 16 elements of %x, and one of %y

`sharding_rules` has the table of all operations.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd

from passes.analyses.channel_labels import Slot, runs
from qcompiler.ir import Op, Size, TensorType, Value
from qcompiler.ir.op import Path
from qcompiler.ir.traits import traits_of


@dataclass(frozen=True)
class Place:
    """Where a factor appears: an axis of an operand or a result.

    Attributes:
        slot: The path of an operand, or the index of a result.
        axis: The axis.
        inner: Elements along the axis for each step of the factor, such as the size of a head.
        shared: Consecutive steps of the factor that have the same elements, such as a head of keys that several query
            heads read. An axis with one such head is whole for all steps.
    """

    slot: Slot
    axis: int
    inner: int = 1
    shared: int = 1


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


def value_at(op: Op, slot: Slot) -> Value | None:
    """The tensor at a slot; None for a number, a literal, or an operand that is absent."""
    if isinstance(slot, int):
        value: object = op.results[slot]
    else:
        value = dict(op.operands()).get(slot)
    return value if isinstance(value, Value) and isinstance(value.type, TensorType) else None


def shape_of(op: Op, slot: Slot) -> tuple[Size, ...]:
    """The shape of the tensor at a slot; empty if there is none."""
    value = value_at(op, slot)
    return () if value is None else value.tensor.shape


def tensor_results(op: Op) -> list[int]:
    """The indices of the results that are tensors."""
    return [index for index, value in enumerate(op.results) if isinstance(value.type, TensorType)]


def axis_of(op: Op, name: str, rank: int) -> int | None:
    """An argument that is one axis, as a nonnegative index; None if it is not fixed."""
    axis = op.argument(name)
    return axis % max(1, rank) if isinstance(axis, int) else None


def range_of(op: Op, size: Size) -> tuple[int, int] | None:
    """The first element that a slice or a scatter takes of an axis, and the one after the last; None if not fixed."""
    start, end, step = (op.argument(name) for name in ("start", "end", "step"))
    if not isinstance(size, int) or step != 1 or not isinstance(start, int | None) or not isinstance(end, int | None):
        return None
    begin, stop, _ = slice(start, end).indices(size)
    return (begin, stop) if stop > begin else None


def axes_of(op: Op, name: str, rank: int) -> set[int] | None:
    """An argument that is an axis or several; all axes if it is absent or empty, None if it is not fixed."""
    axes = op.argument(name)
    listed = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
    fixed = [axis % max(1, rank) for axis in listed if isinstance(axis, int)]
    return None if len(fixed) < len(listed) else set(fixed or range(rank))


# Operations that keep axes


def aligned(op: Op, slots: Sequence[Slot], skip: frozenset[int] = frozenset()) -> Iterator[Factor]:
    """Operands are aligned on the right with the result; an operand of size 1 along an axis lacks the factor."""
    shape = shape_of(op, 0)
    for axis, size in enumerate(shape):
        places = [Place(index, axis) for index in tensor_results(op)]
        for slot in slots:
            own = shape_of(op, slot)
            at = axis - len(shape) + len(own)
            if at >= 0 and own[at] == size:
                places.append(Place(slot, at))
        if axis not in skip and size != 1:
            yield Factor(tuple(places))


def tensor_slots(op: Op) -> list[Slot]:
    """The paths of the operands that are tensors."""
    return [path for path, value in op.operands() if isinstance(value.type, TensorType)]


def elementwise(op: Op) -> Iterator[Factor]:
    """All axes of the result, with the operands that have them."""
    yield from aligned(op, tensor_slots(op))


def all_but(name: str, default: int | None = None) -> Callable[[Op], Iterator[Factor]]:
    """All axes but the ones that an argument names."""

    def factors(op: Op) -> Iterator[Factor]:
        rank = len(shape_of(op, 0))
        axes = {default % rank} if default is not None else axes_of(op, name, rank)
        if axes is not None:
            yield from aligned(op, tensor_slots(op), frozenset(axes))

    return factors


def reduced(op: Op) -> Iterator[Factor]:
    """All axes but the reduced ones, which the result lacks unless it keeps them."""
    rank = len(shape_of(op, (0,)))
    axes = axes_of(op, "dim", rank)
    kept = [axis for axis in range(rank) if axes is not None and axis not in axes]
    for at, axis in enumerate(kept):
        image = axis if op.argument("keepdim") else at
        yield Factor((Place((0,), axis), *(Place(index, image) for index in tensor_results(op))))


def summed(op: Op) -> Iterator[Factor]:
    """All axes: along the reduced ones, each part makes a term of the result."""
    yield from reduced(op)
    for axis in sorted(axes_of(op, "dim", len(shape_of(op, (0,)))) or ()):
        yield Factor((Place((0,), axis),), summed=True)


def normalized(op: Op) -> Iterator[Factor]:
    """All axes but the last ones, which the argument `normalized_shape` lists."""
    shape = op.argument("normalized_shape")
    count = len(shape) if isinstance(shape, tuple) else len(shape_of(op, (0,)))
    for axis in range(len(shape_of(op, (0,))) - count):
        yield Factor((Place((0,), axis), Place(0, axis)))


# Operations that move axes


def permuted(order: Callable[[Op, int], Sequence[int] | None]) -> Callable[[Op], Iterator[Factor]]:
    """Axis `order[i]` of the operand is axis i of the result."""

    def factors(op: Op) -> Iterator[Factor]:
        for image, axis in enumerate(order(op, len(shape_of(op, (0,)))) or ()):
            yield Factor((Place((0,), axis), Place(0, image)))

    return factors


def transposed(op: Op, rank: int) -> list[int] | None:
    """The axes of the operand of a transpose, in the order of its result."""
    axes, first, second = list(range(rank)), axis_of(op, "dim0", rank), axis_of(op, "dim1", rank)
    if first is None or second is None:
        return None
    axes[first], axes[second] = second, first
    return axes


def permutation(op: Op, rank: int) -> list[int] | None:
    """The axes of the operand of a permutation, in the order of its result."""
    dims = op.argument("dims")
    fixed = [axis % rank for axis in dims if isinstance(axis, int)] if isinstance(dims, tuple) else []
    return fixed if len(fixed) == rank else None


def reshaped(op: Op) -> Iterator[Factor]:
    """The first axes of two groups with equal numbers of elements: their common steps, each of whole inner axes."""
    old, new = shape_of(op, (0,)), shape_of(op, 0)
    for left, right in runs(old, new):
        a, b = (
            next((axis for axis in group if shape[axis] != 1), None) for group, shape in ((left, old), (right, new))
        )
        if a is None or b is None:
            continue
        if (size := _common(old[a], new[b])) is not None:
            yield Factor((Place((0,), a, size[0]), Place(0, b, size[1])))


def squeezed(op: Op) -> Iterator[Factor]:
    """All axes that are not listed: a part of one that is listed is removed if it has only one element."""
    old = shape_of(op, (0,))
    listed = axes_of(op, "dim", len(old)) if "dim" in traits_of(op.name).positions else None
    kept = [axis for axis in range(len(old)) if listed is not None and (axis not in listed or old[axis] != 1)]
    for at, axis in enumerate(kept):
        if listed is not None and axis not in listed:
            yield Factor((Place((0,), axis), Place(0, at)))


def _common(left: Size, right: Size) -> tuple[int, int] | None:
    """Elements of two leading axes for each of their common steps; None if there is only one step."""
    if left == right:
        return 1, 1
    if isinstance(left, int) and isinstance(right, int) and (steps := gcd(left, right)) > 1:
        return left // steps, right // steps
    return None


def sliced(op: Op) -> Iterator[Factor]:
    """All axes but the sliced one; that one, too, if the slice is the whole axis."""
    shape = shape_of(op, (0,))
    axis = axis_of(op, "dim", len(shape))
    if axis is not None:
        skip = frozenset[int]() if shape == shape_of(op, 0) else frozenset((axis,))
        yield from aligned(op, [(0,)], skip)


def selected(op: Op) -> Iterator[Factor]:
    """All axes but the one of which an element is selected."""
    rank = len(shape_of(op, (0,)))
    gone = axis_of(op, "dim", rank)
    kept = [axis for axis in range(rank) if gone is not None and axis != gone]
    for image, axis in enumerate(kept):
        yield Factor((Place((0,), axis), *(Place(index, image) for index in tensor_results(op))))


def first_axes(op: Op) -> Iterator[Factor]:
    """All axes, from the first on, that the operand and the result both have."""
    for axis in range(min(len(shape_of(op, (0,))), len(shape_of(op, 0)))):
        yield Factor((Place((0,), axis), Place(0, axis)))


def stacked(op: Op) -> Iterator[Factor]:
    """All axes of the operands, which the result has beside a new one."""
    new, rank = axis_of(op, "dim", len(shape_of(op, 0))), len(shape_of(op, 0))
    for at, axis in enumerate(axis for axis in range(rank) if new is not None and axis != new):
        yield Factor((Place(0, axis), *(Place(slot, at) for slot in tensor_slots(op))))


def sized(op: Op) -> Iterator[Factor]:
    """All axes but the one whose size is the result."""
    rank = len(shape_of(op, (0,)))
    read = axis_of(op, "dim", rank)
    for axis in range(rank):
        if read is not None and axis != read:
            yield Factor((Place((0,), axis),))
