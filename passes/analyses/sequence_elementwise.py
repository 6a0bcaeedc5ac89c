"""Elementwise operations, constants and counting, seen along the sequence, and what is known about their elements."""

from collections.abc import Callable, Sequence

from passes.analyses.sequence_labels import (
    Digit,
    Extent,
    Fill,
    Iota,
    Known,
    Label,
    Mixes,
    Number,
    broadcast,
    plain,
)
from passes.analyses.sequence_site import Answer, Row, Site, Table
from qcompiler.ir import Argument, DType, Role, Value

SAME = ("aten.clone", "aten.contiguous", "aten.alias", "aten.detach", "aten.lift_fresh_copy")
"""Operations that return their operand."""

EXACT = (DType.i64, DType.i32, DType.f32, DType.f64)
"""Element types that hold all position numbers below 2^24."""

SUMS = {"aten.add.Tensor": 1, "aten.sub.Tensor": -1}


def elementwise(site: Site) -> Answer:
    """Each element of the result is computed from the elements at the same place."""
    labels = site.tensors
    return (site.made(broadcast(*labels), *labels, known=_known(site, labels)),) * len(site.op.results)


def _known(site: Site, labels: Sequence[Label]) -> Known:
    """What is known about the elements of a copy, of a cast, and of a position number plus or times a constant."""
    op = site.op
    if op.result.tensor.dtype not in EXACT:
        return None
    if op.role is Role.CAST or op.name in SAME:
        return labels[0].known
    if op.name not in (*SUMS, "aten.mul.Tensor"):
        return None
    left, right = (_element(site, op.argument(name)) for name in ("self", "other"))
    if op.name == "aten.mul.Tensor":
        return left if right == Fill(1) else right if left == Fill(1) else None
    sign = SUMS[op.name]
    if op.argument("alpha") != 1:
        return None
    match left, right:
        case Number(offset), Fill(value):
            return Number(offset + sign * int(value)) if value == int(value) else None
        case Fill(value), Number(offset) if sign > 0:
            return Number(offset + int(value)) if value == int(value) else None
    return None


def _element(site: Site, arg: Argument) -> Known:
    """What is known about an operand, which may be a literal."""
    if isinstance(arg, int | float):
        return Fill(float(arg))
    fact = site.facts.get(arg) if isinstance(arg, Value) else None
    return fact.known if isinstance(fact, Label) else None


def _type_as(site: Site) -> Label:
    label = site.label("self")
    return site.made(label.axes, label)


def _dropout(site: Site) -> Answer:
    if site.op.argument("train") is not False:
        raise Mixes("aten.dropout is in training mode")
    return elementwise(site)


def _filled(value: float | None) -> Callable[[Site], Label]:
    """A constant: the argument `fill_value` unless given here."""

    def apply(site: Site) -> Label:
        fill = site.op.argument("fill_value") if value is None else value
        if not isinstance(fill, int | float):
            raise Mixes(f"{site.op.name} uses {fill}, a size, as a number")
        return Label(plain(site.shape()).axes, known=Fill(float(fill)))

    return apply


def _size(_: Site) -> Extent:
    return Extent()


def _arange(site: Site) -> Label | Iota:
    """Position numbers, if there are as many as positions."""
    (size,), name = site.shape(), site.op.name
    start = 0 if name == "aten.arange" else site.op.argument("start")
    step = site.op.argument("step") if name == "aten.arange.start_step" else 1
    if not isinstance(start, int) or step != 1:
        raise Mixes(f"{name} starts or steps at a number that is not fixed")
    if size == site.length:
        return Label(((Digit("positions", size),),), numbers=frozenset(site.op.results), known=Number(start))
    if start != 0:
        raise Mixes(f"{name} counts {size} elements from {start}, which are not the positions")
    return plain((size,)) if isinstance(size, int) else Iota(size)


def cumulative(site: Site) -> Label:
    """Sums of the elements so far: sums of ones along positions are position numbers."""
    label = site.label("self")
    axis, sizes = site.axis(label), site.op["self"].tensor.shape
    if isinstance(label.known, Fill) and label.known.value in (0, 1) and sizes[axis] == site.length:
        if label.known.value == 0:
            return label
        axes = [*label.axes[:axis], (Digit("positions", site.length),), *label.axes[axis + 1 :]]
        return Label(tuple(axes), numbers=frozenset(site.op.results), known=Number(1))
    site.within(label.axes[axis], "sums up")
    return site.made(label.axes, label)


_EACH = "Each element of the result depends on the elements at its own place."
_NOTHING = "The result depends on its shape only."
_COUNT = "The element at position p is p + start."

ELEMENTWISE = Row(f"{_EACH} So torch declares it: its tag is `pointwise`.", elementwise)
"""The row of all operations that torch tags as pointwise."""

ELEMENTWISE_RULES: Table = {
    **dict.fromkeys(
        (
            "aten._to_copy", "aten.to.dtype", "aten.contiguous", "aten.alias", "aten.detach", "aten.lift_fresh_copy",
            "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar", "aten.masked_fill.Tensor",
            "aten.floor_divide", "aten.floor_divide.Scalar", "aten.hardswish", "aten.polar", "aten.complex",
        ),
        Row(_EACH, elementwise),
    ),
    "aten.type_as": Row("It reads only the type of its second operand.", _type_as),
    "aten.dropout": Row("Outside training the result is the operand.", _dropout),
    "aten.sym_size.int": Row("A size is legal only as a size.", _size),
    "aten.sym_numel": Row("A size is legal only as a size.", _size),
    **{f"aten.{name}": Row(_NOTHING, _filled(0)) for name in ("zeros", "zeros_like", "new_zeros")},
    **{f"aten.{name}": Row(_NOTHING, _filled(1)) for name in ("ones", "ones_like", "new_ones")},
    **{f"aten.{name}": Row(_NOTHING, _filled(None)) for name in ("full", "full_like", "new_full")},
    **{
        f"aten.{name}": Row("The elements are undefined.", lambda site: plain(site.shape()))
        for name in ("empty.memory_format", "empty_like", "new_empty")
    },
    "aten.arange": Row(_COUNT, _arange),
    "aten.arange.start": Row(_COUNT, _arange),
    "aten.arange.start_step": Row(_COUNT, _arange),
    "aten.cumsum": Row("It sums along other axes, or it counts: sums of ones are p + 1.", cumulative),
}  # fmt: skip
"""Elementwise operation or constant -> why and how it is position-wise."""
