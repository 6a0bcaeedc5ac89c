"""Operations that move elements: a table that says, with a proof, where an element of the result comes from.

aten.slice.Tensor(x, 1, 3, …)[b, i]         x[b, i + 3]
aten.index.Tensor(x, [y, z])[i, j]          x[y[i, j], z[i, j]]
aten.cat([x, y], 0)[i]                      x[i] if i < n, else y[i - n]
"""

from collections.abc import Callable, Mapping

from passes.analyses.channel_labels import runs
from passes.analyses.index_arithmetic import converted
from passes.analyses.index_expressions import Element, Index, Row, Site, choose, constant
from passes.analyses.inequalities import (
    TRUE,
    Condition,
    both,
    implies,
    impossible,
    negation,
    nonnegative,
    simplified,
    zero,
)
from qcompiler.ir import DType, Size, Value
from qcompiler.ir.sizes import Call, Expr, call, floordiv, mod

# Elements of one operand


def _moved(index: Callable[[Site, Index], Index]) -> Callable[[Site], Element]:
    """The element of the first operand at an index computed from the result's."""

    def row(site: Site) -> Element:
        value = site.op.args[0]
        assert isinstance(value, Value)
        return site.element(value, index(site, site.at))

    return row


def _aligned(site: Site, at: Index) -> Index:
    """The same index, without the axes that broadcasting adds."""
    return at[len(at) - len(site.shape("self")) :]


def _reshaped(site: Site, at: Index) -> Index:
    """The elements in the same order: the row-major position is the same."""
    old, new = site.shape("self"), site.op.results[site.output].tensor.shape
    found: list[Size] = [0] * len(old)
    for left, right in runs(old, new):
        position: Size = 0
        for axis in right:
            position = position * new[axis] + at[axis]
        wide = [axis for axis in left if old[axis] != 1]
        for axis in reversed(wide[1:]):
            position, found[axis] = _divided(site, position, old[axis])
        if wide:
            found[wide[0]] = position
    return tuple(found)


def _divided(site: Site, position: Size, size: Size) -> tuple[Size, Size]:
    """Quotient and remainder; for a * size + b, where b is proven to be inside, a and b."""
    rest = mod(position, size)
    match rest:
        case Expr(terms=(((Call("mod", (inner, int())),), 1),)):
            inside = both(nonnegative(inner), nonnegative(size - 1 - inner))
            if implies(frozenset({site.facts}), inside, frozenset()):
                return floordiv(position - inner, size), inner
    return floordiv(position, size), rest


def _permuted(site: Site, at: Index) -> Index:
    rank = len(at)
    if site.op.name == "aten.permute":
        dims = site.argument("dims")
        order = [site.size(axis) % max(1, rank) for axis in dims] if isinstance(dims, tuple) else []
    else:
        order = list(range(rank))
        first, second = (0, rank - 1) if site.op.name == "aten.t" else (site.axis("dim0"), site.axis("dim1"))
        order[first], order[second] = order[second], order[first]
    found: list[Size] = [0] * rank
    for axis, source in enumerate(order):
        found[int(str(source))] = at[axis]
    return tuple(found)


def _sliced(site: Site, at: Index) -> Index:
    """Element i is element start + step * i; a start before the first element is the first one."""
    axis = site.axis()
    start, step = site.argument("start"), site.size(site.argument("step"))
    first = _from_start(site, 0 if start is None else site.size(start), site.shape("self")[axis])
    return (*at[:axis], first + step * at[axis], *at[axis + 1 :])


def _from_start(site: Site, start: Size, size: Size) -> Size:
    """A start that may be negative, as torch counts; a start beyond the size leaves no element to ask for."""
    if impossible(nonnegative(-start - 1), site.facts):
        return start
    if impossible(nonnegative(start), site.facts):
        return call("max", 0, start + size)
    raise site.unknown("its start may be negative or not")


def _selected(site: Site) -> Element:
    axis = site.axis()
    size = site.shape("self")[axis]
    index = site.within(site.size(site.argument("index")), size)
    return site.join(lambda i: site.element(site.op["self"], (*site.at[:axis], i, *site.at[axis:])), index)


def _parted(site: Site, at: Index) -> Index:
    """A part of a split begins after the parts before it."""
    axis = site.axis()
    start: Size = 0
    for part in site.op.results[: site.output]:
        start = start + part.tensor.shape[axis]
    return (*at[:axis], start + at[axis], *at[axis + 1 :])


def _flipped(site: Site, at: Index) -> Index:
    dims = site.argument("dims")
    sizes = site.shape("self")
    axes = [site.size(axis) % len(sizes) for axis in dims] if isinstance(dims, tuple) else []
    return tuple(size - 1 - at[axis] if axis in axes else at[axis] for axis, size in enumerate(sizes))


def _repeated(site: Site, at: Index) -> Index:
    own, all_sizes = site.shape("self"), site.op.results[site.output].tensor.shape
    sizes = all_sizes[len(at) - len(own) :]
    once = zip(at[len(at) - len(own) :], own, sizes, strict=True)
    return tuple(i if size == repeated else _divided(site, i, size)[1] for i, size, repeated in once)


def _interleaved(site: Site, at: Index) -> Index:
    axis = site.axis()
    return (*at[:axis], floordiv(at[axis], site.size(site.argument("repeats"))), *at[axis + 1 :])


# Elements of several operands


def _concatenated(site: Site) -> Element:
    """The first part that reaches the index, at the index minus the sizes of the parts before it."""
    parts = site.argument("tensors")
    values = [part for part in parts if isinstance(part, Value)] if isinstance(parts, tuple) else []
    values = [value for value in values if value.tensor.shape != (0,)]  # torch ignores these, whatever the rank
    axis = site.axis(rank=len(site.at))
    cases: list[tuple[Condition, Element]] = []
    start: Size = 0
    for value in values:
        size, place = value.tensor.shape[axis], site.at[axis] - start
        inside = simplified(both(nonnegative(place), nonnegative(size - place - 1)), site.facts)
        if inside:
            part = site.assuming(inside, (*site.at[:axis], place, *site.at[axis + 1 :]))
            cases.append((inside, converted(part, value)))
        start = start + size
    return choose(cases, site.facts)


def _copied(site: Site) -> Element:
    return converted(site, site.op["src"])


def _replaced(site: Site) -> Element:
    """The source's elements from start to end; the others come from the first operand."""
    axis, at = site.axis(), site.at
    start, size = site.argument("start"), site.shape("self")[axis]
    if site.argument("step") != 1:
        raise site.unknown("it replaces elements that are not next to each other")
    first = _from_start(site, 0 if start is None else site.size(start), size)
    place, count = at[axis] - first, site.shape("src")[axis]
    inside = simplified(both(nonnegative(place), nonnegative(count - place - 1)), site.facts)
    cases: list[tuple[Condition, Element]] = []
    if inside:
        part = site.assuming(inside, (*at[:axis], place, *at[axis + 1 :]))
        cases.append((inside, part.operand(site.op["src"], part.at)))
    for beyond in simplified(negation(inside), site.facts):
        outside: Condition = frozenset({beyond})
        cases.append((outside, site.assuming(outside, at).operand(site.op["self"], at)))
    return choose(cases, site.facts)


def _stacked(site: Site) -> Element:
    parts = site.argument("tensors")
    values = [part for part in parts if isinstance(part, Value)] if isinstance(parts, tuple) else []
    axis = site.axis(rank=len(site.at))
    part = site.assuming(TRUE, (*site.at[:axis], *site.at[axis + 1 :]))
    cases = [(simplified(zero(site.at[axis] - i), site.facts), value) for i, value in enumerate(values)]
    return choose([(where, converted(part, value)) for where, value in cases if where], site.facts)


def _indexed(site: Site) -> Element:
    """Index tensors broadcast together; their axes come where they are, or first if a whole axis is between them."""
    x, indices = site.op["self"], site.argument("indices")
    given = list(indices) if isinstance(indices, tuple) else []
    tensors = [index.tensor for index in given if isinstance(index, Value)]
    if any(tensor.dtype in (DType.b8, DType.u8) for tensor in tensors):
        raise site.unknown("it selects elements with a mask")
    chosen = [axis for axis, index in enumerate(given) if isinstance(index, Value)]
    rank = max(len(tensor.shape) for tensor in tensors)
    together = chosen == list(range(chosen[0], chosen[-1] + 1))
    first = chosen[0] if together else 0
    common, rest = site.at[first : first + rank], [*site.at[:first], *site.at[first + rank :]]
    found = [
        _index(site, index, common, size) if isinstance(index, Value) else constant(rest.pop(0))
        for index, size in zip([*given, *[None] * (len(x.tensor.shape) - len(given))], x.tensor.shape, strict=True)
    ]
    return site.join(lambda *at: site.element(x, at), *found)


def _index(site: Site, index: Value, at: Index, size: Size) -> Element:
    """An element of an index tensor, counted from the start."""
    element = site.operand(index, at)
    return site.join(lambda i: site.within(i, size), element)


def _gathered(site: Site) -> Element:
    axis, x, at = site.axis(), site.op["self"], site.at
    index = site.element(site.op["index"], at)
    return site.join(lambda i: site.element(x, (*at[:axis], i, *at[axis + 1 :])), index)


def _index_selected(site: Site) -> Element:
    axis, x, at = site.axis(), site.op["self"], site.at
    index = site.element(site.op["index"], (at[axis],))
    return site.join(lambda i: site.element(x, (*at[:axis], i, *at[axis + 1 :])), index)


def _embedded(site: Site) -> Element:
    *at, column = site.at
    row = site.element(site.op["indices"], tuple(at))
    return site.join(lambda i: site.element(site.op["weight"], (i, column)), row)


# The table

_ORDER = "The elements in row-major order stay the same."
_AXES = "The axes change places."
_COPIED = "Copies of an element are equal."

MOVES: Mapping[str, Row] = {
    **{
        f"aten.{name}": Row("The result holds the elements of the operand.", _moved(_aligned))
        for name in ("clone", "contiguous", "alias", "detach", "lift_fresh_copy")
    },
    **{
        f"aten.{name}": Row(_ORDER, _moved(_reshaped))
        for name in (
            "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "squeeze.dim", "squeeze.dims",
            "flatten.using_ints", "unflatten.int",
        )
    },
    **{f"aten.{name}": Row(_AXES, _moved(_permuted)) for name in ("t", "transpose.int", "permute")},
    **{f"aten.{name}": Row(_COPIED, _moved(_aligned)) for name in ("expand", "expand_as")},
    "aten.repeat": Row(_COPIED, _moved(_repeated)),
    "aten.repeat_interleave.self_int": Row(_COPIED, _moved(_interleaved)),
    "aten.slice.Tensor": Row("Element i is element start + step * i.", _moved(_sliced)),
    **{
        f"aten.{name}": Row("Each part begins where the part before it ends.", _moved(_parted))
        for name in ("split_with_sizes", "split.sizes", "split.Tensor", "chunk")
    },
    "aten.flip": Row("Element i is element n - 1 - i.", _moved(_flipped)),
    "aten.select.int": Row("All elements have the given index along the axis.", _selected),
}  # fmt: skip
"""Operation -> why and where each element of its result is in its first operand."""

_PICK = "Each element is one of the operand's, at an index that is computed."

PICKS: Mapping[str, Row] = {
    "aten.cat": Row("An element of the first part that reaches so far.", _concatenated),
    "aten.copy": Row("The elements of the second operand, which broadcasts.", _copied),
    "aten.slice_scatter": Row("From start to end the elements of the second operand.", _replaced),
    "aten.stack": Row("An element of the operand that the index along the new axis names.", _stacked),
    "aten.index.Tensor": Row(_PICK, _indexed),
    "aten.index_select": Row(_PICK, _index_selected),
    "aten.gather": Row(_PICK, _gathered),
    "aten.embedding": Row(_PICK, _embedded),
}
"""Operation -> why and where each element of its result is, in an operand or at an index that depends on elements."""
