"""Reductions, norms, matmuls and lookups, seen along the sequence: legal along axes that hold one token's elements."""

from collections.abc import Callable, Sequence

from passes.analyses.sequence_labels import Axis, Below, Label, Mixes, broadcast, join
from passes.analyses.sequence_site import Answer, Row, Site, Table
from qcompiler.ir import DType


def _limit(axis: Axis) -> Below | None:
    """The range of an index along an axis of fixed size."""
    if not axis:
        return Below(1)
    sizes = [digit.size for digit in axis]
    return Below(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], int) else None


def _reduces(what: str) -> Callable[[Site], Answer]:
    """A reduction over the axes `dim`; integers with an axis are indices along it."""

    def apply(site: Site) -> Answer:
        label = site.label("self")
        dims = site.axes(label)
        for axis in dims:
            site.within(label.axes[axis], what)
        kept = [() if at in dims else axis for at, axis in enumerate(label.axes)]
        if not site.op.argument("keepdim"):
            kept = [axis for at, axis in enumerate(label.axes) if at not in dims]
        index = _limit(label.axes[dims[0]]) if len(dims) == 1 else None
        return tuple(site.made(kept, label, known=index if _is_index(site, at) else None) for at in _results(site))

    return apply


def _along(what: str) -> Callable[[Site], Answer]:
    """An operation that combines the elements along one axis, and keeps the axis."""

    def apply(site: Site) -> Answer:
        label = site.label("self")
        axis, sizes = site.axis(label), site.op["self"].tensor.shape
        site.within(label.axes[axis], what)
        made = []
        for at in _results(site):
            axes = list(label.axes)
            if (size := site.shape(at)[axis]) != sizes[axis]:
                axes[axis] = site.fixed(size)
            known = _limit(label.axes[axis]) if _is_index(site, at) else None
            made.append(site.made(axes, label, known=known))
        return tuple(made)

    return apply


def _results(site: Site) -> range:
    return range(len(site.op.results))


def _is_index(site: Site, at: int) -> bool:
    """Whether a result holds indices along the reduced axis."""
    return site.op.results[at].tensor.dtype is DType.i64 and (at == 1 or site.op.name.startswith("aten.arg"))


def _norm(site: Site) -> Answer:
    label, sizes = site.label("input"), site.op.argument("normalized_shape")
    count = len(label.axes) - (len(sizes) if isinstance(sizes, tuple) else 1)
    for axis in label.axes[count:]:
        site.within(axis, "normalizes over")
    site.free("weight")
    site.free("bias")
    statistics = site.made([*label.axes[:count], *[()] * (len(label.axes) - count)], label)
    return (site.made(label.axes, label), *[statistics] * (len(site.op.results) - 1))


# Matmuls

LETTERS = "abcdefghij"


def _contract(site: Site, terms: Sequence[tuple[Label, str]], result: str) -> Label:
    """The label of a sum of products: like einsum, with one letter for each axis."""
    axes: dict[str, Axis] = {}
    for label, letters in terms:
        for letter, axis in zip(letters, label.axes, strict=True):
            axes[letter] = join(axes.get(letter, ()), axis)
    for letter, axis in axes.items():
        if letter not in result:
            site.within(axis, "sums over")
    return site.made([axes[letter] for letter in result], *(label for label, _ in terms))


def _linear(site: Site) -> Answer:
    label = site.label("input")
    site.free("weight")
    site.free("bias")
    site.within(label.axes[-1], "sums over")
    return site.made([*label.axes[:-1], site.fixed(site.shape()[-1])], label)


def _matmul(left: str, right: str, addend: str | None = None) -> Callable[[Site], Answer]:
    """A matmul of batches, which are aligned on the right, and an addend that is broadcast."""

    def apply(site: Site) -> Answer:
        operands = site.label(left), site.label(right)
        if any(len(label.axes) < 2 for label in operands):
            raise Mixes(f"{site.op.name} multiplies by a vector")
        batch = LETTERS[: len(site.shape()) - 2]
        letters = [batch[len(batch) + 2 - len(label.axes) :] for label in operands]
        made = _contract(site, [(operands[0], f"{letters[0]}mk"), (operands[1], f"{letters[1]}kn")], f"{batch}mn")
        if addend is None:
            return made
        other = site.label(addend)
        return site.made(broadcast(made, other), made, other)

    return apply


def _einsum(site: Site) -> Answer:
    left, arrow, result = str(site.op.argument("equation")).replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in left or any(len(set(letters)) < len(letters) for letters in terms):
        raise Mixes("aten.einsum has an ellipsis, a repeated letter, or no explicit result")
    return _contract(site, list(zip(site.tensors, terms, strict=True)), result)


# Lookups


def _embedding(site: Site) -> Answer:
    site.free("weight")
    index = site.label("indices")
    return site.made([*index.axes, site.fixed(site.shape()[-1])], index)


_SUM = "It combines elements of one token."
_KEPT = "It combines elements of one token, and keeps their places."
_DOT = "It sums over an axis that holds one token's elements; a token axis comes from one operand, or both have it."

REDUCTIONS: Table = {
    "aten.sum.dim_IntList": Row(_SUM, _reduces("sums over")),
    "aten.mean.dim": Row(_SUM, _reduces("averages over")),
    "aten.amax": Row(_SUM, _reduces("takes the maximum over")),
    "aten.amin": Row(_SUM, _reduces("takes the minimum over")),
    "aten.max.dim": Row(_SUM, _reduces("takes the maximum over")),
    "aten.min.dim": Row(_SUM, _reduces("takes the minimum over")),
    "aten.argmax": Row(_SUM, _reduces("takes the maximum over")),
    "aten.argmin": Row(_SUM, _reduces("takes the minimum over")),
    "aten.logsumexp": Row(_SUM, _reduces("sums over")),
    "aten.prod.dim_int": Row(_SUM, _reduces("multiplies over")),
    "aten.any.dim": Row(_SUM, _reduces("combines")),
    "aten.all.dim": Row(_SUM, _reduces("combines")),
    "aten.var.correction": Row(_SUM, _reduces("takes the variance over")),
    "aten.std.correction": Row(_SUM, _reduces("takes the deviation over")),
    "aten.linalg_vector_norm": Row(_SUM, _reduces("takes the norm over")),
    "aten.softmax.int": Row(_KEPT, _along("normalizes over")),
    "aten._softmax": Row(_KEPT, _along("normalizes over")),
    "aten.log_softmax.int": Row(_KEPT, _along("normalizes over")),
    "aten.cumprod": Row(_KEPT, _along("multiplies up")),
    "aten.topk": Row(_KEPT, _along("selects among")),
    "aten.layer_norm": Row("It normalizes over elements of one token.", _norm),
    "aten.native_layer_norm": Row("It normalizes over elements of one token.", _norm),
    "aten.rms_norm": Row("It normalizes over elements of one token.", _norm),
    "aten.linear": Row("Row t of the result depends on row t of the input.", _linear),
    "aten.mm": Row(_DOT, _matmul("self", "mat2")),
    "aten.bmm": Row(_DOT, _matmul("self", "mat2")),
    "aten.matmul": Row(_DOT, _matmul("self", "other")),
    "aten.addmm": Row(_DOT, _matmul("mat1", "mat2", "self")),
    "aten.baddbmm": Row(_DOT, _matmul("batch1", "batch2", "self")),
    "aten.einsum": Row(_DOT, _einsum),
    "aten.embedding": Row("Row t of the result is the weight's row that index t names.", _embedding),
}
"""Operation that combines elements -> why and how it is position-wise."""
