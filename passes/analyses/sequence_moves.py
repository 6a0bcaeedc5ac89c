"""Operations that move elements, seen along the sequence: views, slices, concatenation, indexing along other axes."""

from collections.abc import Callable, Sequence

from passes.analyses.channel_labels import runs
from passes.analyses.sequence_labels import (
    Axis,
    Below,
    Fill,
    Known,
    Label,
    Mixes,
    axis_of,
    broadcast,
    divide,
    has_tokens,
    join,
    plain,
    regroup,
)
from passes.analyses.sequence_site import Answer, Row, Site, Table
from qcompiler.ir import Size, Value


def _view(site: Site) -> Label:
    """Groups of axes that a reshape keeps apart; an axis that stays may hold a part of the tokens, as ranks do."""
    label, old, new = site.label("self"), site.op["self"].tensor.shape, site.shape()
    axes: list[Axis] = []
    for left, right in runs(old, new):
        (stay, *rest), others = [at for at in left if old[at] != 1] or [0], [at for at in right if new[at] != 1]
        if not rest and [old[stay]] == [new[at] for at in others]:
            axes += [label.axes[stay] if at in others else () for at in right]
        else:
            axes += regroup([label.axes[at] for at in left], [new[at] for at in right])
    return site.made(axes, label, known=label.known)


def _permuted(order: Callable[[Site, Label], Sequence[int]]) -> Callable[[Site], Label]:
    def apply(site: Site) -> Label:
        label = site.label("self")
        return site.made([label.axes[at] for at in order(site, label)], label, known=label.known)

    return apply


def _transposed(site: Site, label: Label) -> list[int]:
    axes = list(range(len(label.axes)))
    first, second = site.axis(label, "dim0"), site.axis(label, "dim1")
    axes[first], axes[second] = second, first
    return axes


def _expand(site: Site) -> Label:
    label = site.label("self")
    new = plain(site.shape()).axes
    old = (((),) * (len(new) - len(label.axes))) + label.axes
    return site.made([axis or wide for axis, wide in zip(old, new, strict=True)], label, known=label.known)


def _copy(site: Site) -> Label:
    """The elements of `src`, broadcast to the shape of `self`."""
    label = site.label("src")
    wide = plain(site.shape()).axes
    old = (((),) * (len(wide) - len(label.axes))) + label.axes
    return site.made([axis or new for axis, new in zip(old, wide, strict=True)], label)


def _repeat(site: Site) -> Label:
    """Copies along axes. Copies of all tokens, one after the other, make an axis that counts copies, then tokens."""
    label = site.label("self")
    shape = site.shape()
    old = (((),) * (len(shape) - len(label.axes))) + label.axes
    sizes = (*(1,) * (len(shape) - len(label.axes)), *site.op["self"].tensor.shape)
    axes = []
    for axis, size, new in zip(old, sizes, shape, strict=True):
        copies = divide(new, size)
        if size != new and has_tokens(axis) and _in_order(site, axis) and isinstance(copies, int):
            axes.append((*axis_of(copies), *axis))
            continue
        if size != new and axis:
            site.within(axis, "repeats")
        axes.append(axis if size == new else site.fixed(new) if axis else axis_of(new))
    return site.made(axes, label, known=label.known)


def _in_order(site: Site, axis: Axis) -> bool:
    """Whether the tokens along an axis, which is repeated as a whole, are in their own order."""
    return site.op.name == "aten.repeat" and not any(digit.kind == "sorted" for digit in axis)


def part(site: Site, label: Label, axis: int, size: Size, new: Size) -> Axis:
    """The axis after a selection of `new` of its `size` elements."""
    digits = label.axes[axis]
    if size == new:
        return digits
    if has_tokens(digits):
        raise Mixes(f"{site.op.name} keeps only a part of {_name(digits)}")
    if not isinstance(new, int) and isinstance(size, int):
        raise Mixes(
            f"{site.op.name} keeps {new} of {size} elements of a table: its result depends on the number of positions;"
            " index the table with position numbers instead"
        )
    return axis_of(new)


def _name(digits: Axis) -> str:
    kinds = [digit.kind for digit in digits]
    return (
        "the rows of the batch" if kinds == ["batch"] else "the positions" if kinds == ["positions"] else "the tokens"
    )


def _slice(site: Site) -> Label:
    label = site.label("self")
    axis, axes = site.axis(label), list(label.axes)
    axes[axis] = part(site, label, axis, site.op["self"].tensor.shape[axis], site.shape()[axis])
    return site.made(axes, label, known=label.known)


def _select(site: Site) -> Label:
    label = site.label("self")
    axis = site.axis(label)
    if has_tokens(label.axes[axis]):
        raise Mixes(f"{site.op.name} keeps only one of {_name(label.axes[axis])}")
    return site.made([*label.axes[:axis], *label.axes[axis + 1 :]], label, known=label.known)


def _split(site: Site) -> Answer:
    label = site.label("self")
    axis, sizes = site.axis(label), site.op["self"].tensor.shape
    made = []
    for index in range(len(site.op.results)):
        axes = list(label.axes)
        axes[axis] = part(site, label, axis, sizes[axis], site.shape(index)[axis])
        made.append(site.made(axes, label, known=label.known))
    return tuple(made)


def _unbind(site: Site) -> Answer:
    return (_select(site),) * len(site.op.results)


def _listed(site: Site) -> list[Label]:
    return [site.label(value) for path, value in site.op.operands() if path[0] in (0, "tensors")]


def _shared(labels: Sequence[Label]) -> Known:
    """What is known about all parts, if it is the same."""
    first = labels[0].known
    return first if isinstance(first, Fill | Below) and all(label.known == first for label in labels) else None


def _cat(site: Site) -> Label:
    labels = _listed(site)
    result = plain(site.shape())
    axis = site.axis(result)
    for label in labels:
        if len(label.axes) != len(result.axes):
            raise Mixes("aten.cat has operands of different ranks")
        if has_tokens(label.axes[axis]) and len(labels) > 1:
            raise Mixes(f"aten.cat puts more elements beside {_name(label.axes[axis])}")
    rest = broadcast(*(Label((*label.axes[:axis], (), *label.axes[axis + 1 :])) for label in labels))
    along = labels[0].axes[axis] if len(labels) == 1 else result.axes[axis]
    if any(digit.kind == "same" for digit in along) and len(labels) > 1:
        raise Mixes(f"aten.cat makes an axis of {site.shape()[axis]} elements, a number that depends on the tokens")
    return site.made([*rest[:axis], along, *rest[axis + 1 :]], *labels, known=_shared(labels))


def _stack(site: Site) -> Label:
    labels = _listed(site)
    result = plain(site.shape())
    axis, axes = site.axis(result), broadcast(*labels)
    return site.made([*axes[:axis], result.axes[axis], *axes[axis:]], *labels, known=_shared(labels))


def _shifted(site: Site) -> Label:
    """flip and roll: a permutation of the elements along the axes."""
    label = site.label("self")
    for axis in site.axes(label, "dims"):
        site.within(label.axes[axis], "moves elements along")
    known = label.known if isinstance(label.known, Fill | Below) else None
    return site.made(label.axes, label, known=known)


def _pad(site: Site) -> Label:
    label, pad = site.label("self"), site.op.argument("pad")
    sizes, axes = site.op["self"].tensor.shape, list(label.axes)
    for back, at in enumerate(range(len(sizes) - 1, -1, -1)):
        ends = pad[2 * back : 2 * back + 2] if isinstance(pad, tuple) else ()
        if any(isinstance(end, Value) or end != 0 for end in ends):
            if has_tokens(axes[at]):
                raise Mixes(f"{site.op.name} adds elements beside {_name(axes[at])}")
            axes[at] = site.fixed(site.shape()[at])
    if isinstance(fill := site.op.argument("value"), Value):
        raise Mixes(f"{site.op.name} uses {fill}, a size, as a number")
    return site.made(axes, label)


def _slice_scatter(site: Site) -> Label:
    into, src = site.label("self"), site.label("src")
    axis = site.axis(into)
    for label in (into, src):
        if has_tokens(label.axes[axis]):
            raise Mixes(f"{site.op.name} replaces a part of {_name(label.axes[axis])}")
    axes = broadcast(*(Label((*label.axes[:axis], (), *label.axes[axis + 1 :])) for label in (into, src)))
    return site.made([*axes[:axis], into.axes[axis], *axes[axis + 1 :]], into, src)


def _gather(site: Site) -> Label:
    """gather: element i of the result is one of the row of `self` that has the index's other indices."""
    label, index = site.label("self"), site.label("index")
    axis = site.axis(label)
    site.within(label.axes[axis], "picks along")
    site.within(index.axes[axis], "picks along")
    sizes, shape = site.op["self"].tensor.shape, site.op["index"].tensor.shape
    axes = [
        index.axes[at] if at == axis or sizes[at] != shape[at] else join(label.axes[at], index.axes[at])
        for at in range(len(sizes))
    ]
    if any(has_tokens(label.axes[at]) for at in range(len(sizes)) if at != axis and sizes[at] != shape[at]):
        raise Mixes(f"{site.op.name} keeps only a part of the tokens")
    known = label.known if isinstance(label.known, Fill | Below) else None
    return site.made(axes, label, index, known=known)


def _scatter(site: Site) -> Label:
    """scatter: rows of the index and of the source write into the row of `self` with the same other indices."""
    into, index = site.label("self"), site.label("index")
    source = site.label(site.op.argument("value" if site.op.name == "aten.scatter.value" else "src"))
    axis = site.axis(into)
    shapes = [site.op[name].tensor.shape for name in ("self", "index")]
    for label in (into, index):
        site.within(label.axes[axis], "writes along")
    others = [at for at in range(len(into.axes)) if at != axis]
    if any(shapes[0][at] != shapes[1][at] for at in others):
        raise Mixes(f"{site.op.name} writes only a part of the rows")
    parts = [into, index] + ([source] if source.axes else [])
    axes = list(broadcast(*(Label(tuple(label.axes[at] for at in others)) for label in parts)))
    axes.insert(axis, into.axes[axis])
    return site.made(axes, *parts)


def _paired(site: Site) -> Label:
    """view_as_complex: the two elements of the last axis become one."""
    label = site.label("self")
    site.within(label.axes[-1], "joins pairs along")
    return site.made(label.axes[:-1], label)


def _unpaired(site: Site) -> Label:
    """view_as_real: each element becomes two along a new axis."""
    label = site.label("self")
    return site.made([*label.axes, axis_of(2)], label)


def _one_hot(site: Site) -> Label:
    label = site.label("self")
    return site.made([*label.axes, site.fixed(site.shape()[-1])], label, known=Below(2))


_ORDER = "The result holds the same elements in the same order, so its axes have the same digits."
_MOVED = "Each element belongs to the same token after axes are exchanged."
_COPIED = "Copies of an element depend on what the element depends on."
_PART = "Elements of a part keep their tokens, and each token keeps the same part."
_INDEXED = "Each token picks along an axis that holds only its own elements."

VIEW = Row(_ORDER, _view)
MOVES: Table = {
    "aten.view": VIEW,
    "aten.reshape": VIEW,
    "aten._unsafe_view": VIEW,
    "aten.view_as": VIEW,
    "aten.flatten.using_ints": VIEW,
    "aten.unflatten.int": VIEW,
    "aten.unsqueeze": VIEW,
    "aten.squeeze": VIEW,
    "aten.squeeze.dim": VIEW,
    "aten.squeeze.dims": VIEW,
    "aten.t": Row(_MOVED, _permuted(lambda _, label: range(len(label.axes))[::-1])),
    "aten.transpose.int": Row(_MOVED, _permuted(_transposed)),
    "aten.permute": Row(_MOVED, _permuted(lambda site, label: site.axes(label, "dims"))),
    "aten.expand": Row(_COPIED, _expand),
    "aten.copy": Row(_COPIED, _copy),
    "aten.repeat": Row(_COPIED, _repeat),
    "aten.repeat_interleave.self_int": Row(_COPIED, _repeat),
    "aten.slice.Tensor": Row(_PART, _slice),
    "aten.select.int": Row(_PART, _select),
    "aten.split.Tensor": Row(_PART, _split),
    "aten.split_with_sizes": Row(_PART, _split),
    "aten.chunk": Row(_PART, _split),
    "aten.unbind.int": Row(_PART, _unbind),
    "aten.cat": Row("Each token's elements are put side by side.", _cat),
    "aten.stack": Row("Each token's elements are put side by side.", _stack),
    "aten.flip": Row("Elements move along axes that hold only one token's elements.", _shifted),
    "aten.roll": Row("Elements move along axes that hold only one token's elements.", _shifted),
    "aten.constant_pad_nd": Row("Constants are put beside each token's elements.", _pad),
    "aten.slice_scatter": Row("Each token's part is replaced by elements of the same token.", _slice_scatter),
    "aten.gather": Row(_INDEXED, _gather),
    "aten.scatter.value": Row("Each token writes along an axis that holds only its own elements.", _scatter),
    "aten.scatter.src": Row("Each token writes along an axis that holds only its own elements.", _scatter),
    "aten.scatter_add": Row("Each token adds along an axis that holds only its own elements.", _scatter),
    "aten.view_as_complex": Row("A pair that belongs to one token becomes a number of this token.", _paired),
    "aten.view_as_real": Row("Both parts of a number belong to its token.", _unpaired),
    "aten.one_hot": Row("The new axis depends on the element that it replaces.", _one_hot),
}
"""Operation that moves elements -> why and how it is position-wise."""
