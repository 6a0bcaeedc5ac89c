"""Operations that commute with a positive factor per channel: a table with a proof for each.

    aten.relu(x · d)  ==  aten.relu(x) · d        for d > 0

A rule relates the labels of an operation's operands and results (see `channel_labels`), in both directions at once.
An operation that is not in the table does not commute.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from operator import add

import numpy as np

from passes.analyses.channel_labels import ALL, PART, Commutes, Fork, Labels, Pick, Site, Slot, runs
from qcompiler.ir import DType, Size, Value
from qcompiler.ir.op import Path

SHAPE_ONLY = (
    "aten.sym_size.int", "aten.sym_numel", "aten.sym_stride.int", "aten.zeros_like", "aten.ones_like",
    "aten.full_like", "aten.new_zeros", "aten.new_ones", "aten.new_full",
)  # fmt: skip
"""Operations that use only the shape and type of their operand, not its elements."""

# Elementwise operations


def _together(*names: str) -> Callable[[Site], None]:
    """The operands and the result all have the same factor."""

    def relate(site: Site) -> None:
        for name in names:
            if site.value(path := site.path(name)) is not None:
                site.join(path, 0)
            elif (addend := site.argument(name)) != 0 or isinstance(addend, Value):
                raise site.refused(f"{site.op.name} adds {addend}, which has no factor")

    return relate


def _masked_fill(site: Site) -> None:
    if site.argument("value") != 0:
        raise site.refused(f"aten.masked_fill.Scalar fills in {site.argument('value')}, which has no factor")
    site.join((0,), 0)


def _dropout(site: Site) -> None:
    if site.argument("train") is not False:
        raise site.refused("aten.dropout is in training mode")
    site.join((0,), 0)


def _product(site: Site) -> Fork | None:
    """Exactly one of the operands carries the factor of the result."""
    paths = [path for name in ("self", "other") if site.value(path := site.path(name)) is not None]
    return _one_of(site, paths, lambda path: site.join(path, 0))


def _one_of(site: Site, paths: Sequence[Path], join: Callable[[Path], None]) -> Fork | None:
    scaled = [path for path in paths if site.labels(path) is not None]
    if len(scaled) > 1:
        raise site.refused(f"both operands of {site.op.name} would be scaled, so its result would be scaled twice")
    if not scaled and site.chosen is None:
        return Fork(tuple(paths))
    join(scaled[0] if scaled else site.chosen or paths[0])
    return None


# Operations that move data


def _reshape(site: Site) -> None:
    """The same elements in the same order."""
    old, new = site.shape((0,)), site.shape(0)
    source, image = [1] * len(old), [1] * len(new)
    for left, right in runs(old, new):
        if any(site.varies((0,), axis) for axis in left) or any(site.varies(0, axis) for axis in right):
            for axis in left:
                source[axis] = site.full(old[axis])
            for axis in right:
                image[axis] = site.full(new[axis])
    site.link((0,), 0, source, lambda at: at.reshape(image))


def _permuted(order: Callable[[Site, int], list[int]]) -> Callable[[Site], None]:
    def relate(site: Site) -> None:
        axes = order(site, len(site.shape((0,))))
        site.join((0,), 0, axes, lambda at: at.transpose(axes))

    return relate


def _transposed(site: Site, rank: int) -> list[int]:
    axes = list(range(rank))
    first, second = site.axis("dim0"), site.axis("dim1")
    axes[first], axes[second] = second, first
    return axes


def _axes(site: Site, name: str, rank: int) -> list[int]:
    """An argument that is one axis or a list of axes, as nonnegative indices."""
    dims = site.argument(name)
    chosen = dims if isinstance(dims, Sequence) else () if dims is None else (dims,)
    return [site.integer(axis) % max(1, rank) for axis in chosen]


def _part(site: Site, axis: int, *cut: object) -> Pick:
    """A slice of the elements along an axis; all of it if nothing varies along that axis."""

    def pick(at: Labels) -> Labels:
        if at.shape[axis] == 1:
            return at
        limits = slice(*(None if n is None else site.integer(n) for n in cut))
        return at[(slice(None),) * axis + (limits,)]

    return pick


def _one(site: Site, axis: int, index: object) -> Pick:
    """One element along an axis; the axis is removed."""
    return lambda at: np.take(at, [0 if at.shape[axis] == 1 else site.integer(index)], axis).squeeze(axis)


def _cut(site: Site, whole: Slot, parts: Iterable[tuple[Slot, Pick]], axis: int, *, gone: bool) -> Fork | None:
    """Each part is `pick` of the whole, along one axis, which the part may lack."""
    size, rank, parts = site.shape(whole)[axis], len(site.shape(whole)), list(parts)
    seen = not gone and any(site.varies(part, axis) for part, _ in parts)
    free = site.labels(whole) is None and isinstance(size, int) and size > 1 and not seen
    if free and site.chosen is None:
        return Fork((ALL, PART))
    axes = [other for other in range(rank) if not (gone and other == axis)]
    for part, pick in parts:
        site.join(whole, part, axes, pick, [axis] if free and site.chosen == PART else ())
    return None


def _slice(site: Site) -> Fork | None:
    limits = [site.argument(name) for name in ("start", "end", "step")]
    return _cut(site, (0,), [(0, _part(site, site.axis(), *limits))], site.axis(), gone=False)


def _select(site: Site) -> Fork | None:
    return _cut(site, (0,), [(0, _one(site, site.axis(), site.argument("index")))], site.axis(), gone=True)


def _parts(site: Site, whole: Slot, parts: Sequence[Slot], axis: int) -> Fork | None:
    """The parts are concatenated along an axis of the whole."""
    zero: Size = 0
    ends = [*accumulate((site.shape(part)[axis] for part in parts), add, initial=zero)]
    picks = [_part(site, axis, *limits) for limits in pairwise(ends)]
    return _cut(site, whole, zip(parts, picks, strict=True), axis, gone=False)


def _layers(site: Site, whole: Slot, parts: Sequence[Slot], axis: int) -> Fork | None:
    """Each part is one element along an axis of the whole."""
    return _cut(site, whole, [(part, _one(site, axis, at)) for at, part in enumerate(parts)], axis, gone=True)


def _split(site: Site) -> Fork | None:
    return _parts(site, (0,), range(len(site.op.results)), site.axis())


def _unbind(site: Site) -> Fork | None:
    return _layers(site, (0,), range(len(site.op.results)), site.axis())


def _listed(site: Site) -> list[Path]:
    return [path for path, _ in site.op.operands() if site.name_at(path) == "tensors"]


def _cat(site: Site) -> Fork | None:
    paths = _listed(site)
    if any(len(site.shape(path)) != len(site.shape(0)) for path in paths):
        raise site.refused("aten.cat has operands of different ranks")
    return _parts(site, 0, paths, site.axis(slot=0))


def _stack(site: Site) -> Fork | None:
    return _layers(site, 0, _listed(site), site.axis(slot=0))


def _flip(site: Site) -> None:
    dims = tuple(_axes(site, "dims", len(site.shape((0,)))))
    site.join((0,), 0, pick=lambda at: np.flip(at, dims))


def _roll(site: Site) -> None:
    shifts, dims = site.argument("shifts"), site.argument("dims")
    if not isinstance(shifts, tuple) or not isinstance(dims, tuple) or len(shifts) != len(dims):
        raise site.refused("aten.roll without dims rolls the flattened tensor")
    axes = _axes(site, "dims", len(site.shape((0,))))

    def pick(at: Labels) -> Labels:
        for shift, axis in zip(shifts, axes, strict=True):
            at = at if at.shape[axis] == 1 else np.roll(at, site.integer(shift), axis)
        return at

    site.join((0,), 0, pick=pick)


def _repeat(site: Site) -> None:
    repeats, sizes = site.argument("repeats"), site.shape((0,))
    counts = repeats[-len(sizes) :] if isinstance(repeats, tuple) and sizes else ()

    def tile(at: Labels) -> Labels:
        return np.tile(at, [site.integer(n) if size > 1 else 1 for n, size in zip(counts, at.shape, strict=True)])

    site.join((0,), 0, pick=tile)


def _repeat_interleave(site: Site) -> None:
    axis, repeats = site.axis(), site.argument("repeats")
    site.join((0,), 0, pick=lambda at: at if at.shape[axis] == 1 else np.repeat(at, site.integer(repeats), axis))


# Operations along axes on which the factor must not vary


def _constant_along(site: Site, slot: Slot, axes: Iterable[int], what: str) -> None:
    if any(site.varies(slot, axis) for axis in axes):
        raise site.refused(f"{site.op.name} {what} an axis along which the factor varies")


def _sum(site: Site) -> None:
    rank = len(site.shape((0,)))
    dims = _axes(site, "dim", rank) or list(range(rank))
    _constant_along(site, (0,), dims, "sums over")
    if site.argument("keepdim"):
        site.join((0,), 0)
    else:
        kept = [axis for axis in range(rank) if axis not in dims]
        site.join((0,), 0, kept, lambda at: at.reshape([at.shape[axis] for axis in kept]))


def _index_select(site: Site) -> None:
    axis = site.axis()
    _constant_along(site, (0,), [axis], "picks along")
    site.join((0,), 0, [None if at == axis else at for at in range(len(site.shape((0,))))])


def _gather(site: Site) -> None:
    axis, sizes, image = site.axis(), site.shape((0,)), site.shape(0)
    _constant_along(site, (0,), [axis], "picks along")
    ends = [slice(n) if isinstance(n, int) else slice(None) for n in image]
    axes = [None if at == axis else at for at in range(len(sizes))]
    site.join((0,), 0, axes, lambda at: at[tuple(ends)])


def _index(site: Site) -> None:
    """The index axes replace the indexed axes: in place if these are adjacent, in front otherwise."""
    indices, rank = site.argument("indices"), len(site.shape((0,)))
    given = [(axis, v) for axis, v in enumerate(indices if isinstance(indices, tuple) else ()) if v is not None]
    if not all(isinstance(v, Value) and v.tensor.dtype not in (DType.b8, DType.u8) for _, v in given):
        raise site.refused("aten.index.Tensor has a mask as an index")
    if not (picked := [axis for axis, _ in given]):
        raise site.refused("aten.index.Tensor indexes no axis")
    _constant_along(site, (0,), picked, "picks along")
    kept = [axis for axis in range(rank) if axis not in picked]
    new = len(site.shape(0)) - len(kept)
    neighbours = picked == list(range(picked[0], picked[-1] + 1))
    place = picked[0] if neighbours else 0
    axes = [*kept[:place], *[None] * new, *kept[place:]]
    site.join((0,), 0, axes, lambda at: at.reshape([1 if axis is None else at.shape[axis] for axis in axes]))


# Matmuls


def _matmul(site: Site) -> Fork | None:
    """Rows of the left operand or columns of the right one, and batches of either; never the reduction axis."""
    left: Path = (0,)
    right: Path = (1,)
    if min(len(site.shape(path)) for path in (left, right)) < 2:
        raise site.refused(f"{site.op.name} multiplies by a vector")
    _constant_along(site, left, [-1], "sums over")
    _constant_along(site, right, [-2], "sums over")
    paths = [left] * (not site.varies(0, -1)) + [right] * (not site.varies(0, -2))
    paths += [path for path in (left, right) if path not in paths and site.labels(path) is not None]
    if not paths:
        raise site.refused(f"both operands of {site.op.name} would be scaled")
    return _one_of(site, paths, lambda path: site.join(path, 0, _batched(site, path, -1 if path == left else -2)))


def _batched(site: Site, path: Path, summed: int) -> list[int | None]:
    """The axes of a matmul operand in the result: aligned on the right, without the reduction axis."""
    rank, width = len(site.shape(path)), len(site.shape(0))
    return [None if at < 0 or at == rank + summed else at for at in range(rank - width, rank)]


def _attention(site: Site) -> None:
    value = site.path("value")
    _constant_along(site, value, [-2], "sums over")
    heads, groups = site.shape(value)[-3:-2], site.shape(0)[-3:-2]

    def repeated(at: Labels) -> Labels:
        grouped = site.op.name == "attention.causal" or site.argument("enable_gqa")
        if not grouped or at.shape[-3] == 1:
            return at
        return np.repeat(at, site.full(groups[0]) // site.full(heads[0]), -3)

    site.join(value, 0, _batched(site, value, -2), repeated)


# The table

_ONE = ("self",)
_SAME = Commutes("The result holds each element of the operand once, in place.", _ONE, _together("self"))
_VIEW = Commutes("The result holds the elements of the operand in the same order.", _ONE, _reshape)
_ADD = Commutes("d·a + c·(d·b) = d·(a + c·b): both have d.", ("self", "other"), _together("self", "other"))
_MOVED = "Elements keep their factors when they move."
_COPIED = "Copies of an element have its factor."
_PART = "Elements of a part keep their factors."
_PICKED = "All elements along the axis have one factor, so it does not matter which are picked."
_ATTENTION = Commutes("Σ p·(d·v) = d·Σ p·v: p does not depend on v.", ("value",), _attention)
_MATMUL = "Rows of the left operand, or columns of the right one, are rows or columns of the result."
_CAST = Commutes("Casts between floating types round relatively: d·x becomes d·round(x).", _ONE, _SAME.relate)

RULES: Mapping[str, Commutes] = {
    "aten.clone": _SAME,
    "aten.contiguous": _SAME,
    "aten.alias": _SAME,
    "aten.detach": _SAME,
    "aten.dropout": Commutes("Outside training the result is the operand.", ("input",), _dropout),
    "aten._to_copy": _CAST,
    "aten.to.dtype": _CAST,
    "aten.neg": Commutes("-(d·x) = d·(-x).", _ONE, _SAME.relate),
    "aten.relu": Commutes("max(d·x, 0) = d·max(x, 0) for d > 0.", _ONE, _SAME.relate),
    "aten.leaky_relu": Commutes("d > 0 keeps the sign of x, and either branch is linear.", _ONE, _SAME.relate),
    "aten.abs": Commutes("|d·x| = d·|x| for d > 0.", _ONE, _SAME.relate),
    "aten.add.Tensor": _ADD,
    "aten.sub.Tensor": _ADD,
    "aten.mul.Tensor": Commutes("(d·a)·b = d·(a·b): one of the factors carries d.", ("self", "other"), _product),
    "aten.mul.Scalar": Commutes("(d·x)·c = d·(x·c).", _ONE, _SAME.relate),
    "aten.div.Tensor": Commutes("(d·a) / b = d·(a / b): the numerator carries d.", _ONE, _SAME.relate),
    "aten.div.Scalar": Commutes("(d·x) / c = d·(x / c).", _ONE, _SAME.relate),
    "aten.where.self": Commutes("Either choice has d.", ("self", "other"), _together("self", "other")),
    "aten.masked_fill.Scalar": Commutes("Elements that are kept have d, and d·0 = 0.", _ONE, _masked_fill),
    "aten.view": _VIEW,
    "aten.reshape": _VIEW,
    "aten._unsafe_view": _VIEW,
    "aten.flatten.using_ints": _VIEW,
    "aten.unflatten.int": _VIEW,
    "aten.unsqueeze": _VIEW,
    "aten.squeeze": _VIEW,
    "aten.squeeze.dim": _VIEW,
    "aten.squeeze.dims": _VIEW,
    "aten.t": Commutes(_MOVED, _ONE, _permuted(lambda _, rank: [*range(rank)][::-1])),
    "aten.transpose.int": Commutes(_MOVED, _ONE, _permuted(_transposed)),
    "aten.permute": Commutes(_MOVED, _ONE, _permuted(lambda site, rank: _axes(site, "dims", rank))),
    "aten.flip": Commutes(_MOVED, _ONE, _flip),
    "aten.roll": Commutes(_MOVED, _ONE, _roll),
    "aten.expand": Commutes(_COPIED, _ONE, _SAME.relate),
    "aten.repeat": Commutes(_COPIED, _ONE, _repeat),
    "aten.repeat_interleave.self_int": Commutes(_COPIED, _ONE, _repeat_interleave),
    "aten.slice.Tensor": Commutes(_PART, _ONE, _slice),
    "aten.select.int": Commutes(_PART, _ONE, _select),
    "aten.split.Tensor": Commutes(_PART, _ONE, _split),
    "aten.split_with_sizes": Commutes(_PART, _ONE, _split),
    "aten.chunk": Commutes(_PART, _ONE, _split),
    "aten.unbind.int": Commutes(_PART, _ONE, _unbind),
    "aten.cat": Commutes("Each part of the result has the factors of its operand.", ("tensors",), _cat),
    "aten.stack": Commutes("Each part of the result has the factors of its operand.", ("tensors",), _stack),
    "aten.index_select": Commutes(_PICKED, _ONE, _index_select),
    "aten.index.Tensor": Commutes(_PICKED, _ONE, _index),
    "aten.gather": Commutes(_PICKED, _ONE, _gather),
    "aten.sum.dim_IntList": Commutes("Σ d·x = d·Σ x if all summed elements have the same d.", _ONE, _sum),
    "aten.mean.dim": Commutes("Σ d·x / n = d·(Σ x / n) if all summed elements have the same d.", _ONE, _sum),
    "aten.mm": Commutes(_MATMUL, ("self", "mat2"), _matmul),
    "aten.bmm": Commutes(_MATMUL, ("self", "mat2"), _matmul),
    "aten.matmul": Commutes(_MATMUL, ("self", "other"), _matmul),
    "aten.scaled_dot_product_attention": _ATTENTION,
    "attention.causal": _ATTENTION,
}
"""Operation -> why and how a positive factor per channel passes through it."""
