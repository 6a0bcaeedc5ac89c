"""Reads attention that a model spells out, from its last matmul back to queries and keys.

    softmax(cap * tanh(q @ k^T * scale / cap) + mask) @ v           ->      Attended(q, k, v, scale, cap, masks)
    softmax(cat(q @ k^T * scale + mask, sinks))[..., :-1] @ v       ->      … and sinks

Constant factors, casts between floating types, masks as addends or as choices, and a subtracted maximum may come in any
equivalent order. Batch and heads may share an axis in some of the operations, as in BLOOM.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from passes.analyses.causal_masks import HIDDEN, Mask
from passes.analyses.elements import Elements
from passes.analyses.index_expressions import Index, Unknown
from passes.analyses.index_moves import MOVES
from passes.analyses.inequalities import TooComplex
from passes.attention.folded_heads import joins, split_before, splits
from qcompiler.ir import Argument, Graph, Op, Role, Size, TensorType, Value
from qcompiler.ir.sizes import call, symbol

SOFTMAX = ("aten.softmax.int", "aten._softmax")
MATMULS = ("aten.matmul", "aten.bmm")
PRODUCTS = (*MATMULS, "aten.baddbmm")


class NotAttention(Exception):
    """The operations are not attention: the reason and the value at fault."""

    def __init__(self, why: str, value: Value) -> None:
        super().__init__(why)
        self.why, self.value = why, value


@dataclass(frozen=True)
class Attended:
    """One attention.

    Attributes:
        query: [batch, heads, queries, size].
        key: [batch, groups, keys, size], or [batch, groups, size, keys] if `transposed`.
        value: [batch, groups, keys, value size].
        scale: Factor of the scores.
        transposed: Whether the key has its size before its positions.
        softcap: The limit of the scores, if any.
        sinks: [heads], logits without a value, if any.
        masks: Which keys each query reads.
    """

    query: Value
    key: Value
    value: Value
    scale: float
    transposed: bool = False
    softcap: float | None = None
    sinks: Value | None = None
    masks: tuple[Mask, ...] = ()


def softmax_before(op: Op) -> Op | None:
    """The softmax whose result is the first operand of a matmul; None if none is.

    In between, the result may be cast, cut along the last axis, and its batch and heads joined.
    """
    weights = op["x"] if op.name in MATMULS else None
    while weights is not None and weights.op.name not in SOFTMAX:
        moves = weights.op.role is Role.CAST or weights.op.name == "aten.slice.Tensor" or joins(weights.op)
        weights = weights.op["self"] if moves else None
    return None if weights is None else weights.op


def read_attention(op: Op, graph: Graph) -> Attended:
    """The attention that ends with the matmul `op`, for which `softmax_before` is not None.

    Raises:
        NotAttention: It computes something else.
    """
    softmax = softmax_before(op)
    assert softmax is not None
    scores = softmax["self"]
    rank = len(scores.tensor.shape)
    if rank != 4:
        raise NotAttention(f"its scores have {rank} dimensions, not batch, heads, queries and keys", scores)
    if softmax.argument("dim") not in (-1, rank - 1):
        raise NotAttention("its softmax is not over the last dimension", softmax.result)
    scores = _without_shift(scores)
    sinks = None
    if op["x"].tensor.shape[-1] != scores.tensor.shape[-1]:
        _check_cut(op["x"])
        scores, sinks = _without_sinks(scores, graph)
    if op["x"].tensor.shape[-1] != scores.tensor.shape[-1]:
        raise NotAttention("its weights do not cover all keys", op["x"])
    batch, heads = scores.tensor.shape[:2]
    found = _Reading(graph, heads).read(scores)
    query, key, value = (_with_heads(graph, each, batch, heads) for each in (found.query, found.key, op["w"]))
    return replace(found, query=query, key=key, value=value, sinks=sinks)


def _with_heads(graph: Graph, operand: Value, batch: Size, heads: Size) -> Value:
    """The operand [batch, heads, …] of a matmul over four axes, or over three that join batch and heads."""
    if len(operand.tensor.shape) != 3:
        return operand
    if (found := split_before(graph, operand, batch, heads)) is None:
        raise NotAttention("one of its operands does not have separate axes for batch and heads", operand)
    return found


def _check_cut(weights: Value) -> None:
    """Checks that the weights which are used are the first ones."""
    while weights.op.name not in SOFTMAX:
        cut = weights.op
        if cut.name == "aten.slice.Tensor":
            own = (cut.argument("dim"), cut.argument("start"), cut.argument("step"))
            if own[0] not in (-1, 3) or own[1] not in (0, None) or own[2] != 1:
                raise NotAttention("it uses a part of the weights that does not begin with the first key", weights)
        weights = cut["self"]


def _without_shift(scores: Value) -> Value:
    """The scores before subtracting one number per query, which a softmax ignores."""
    op = scores.op
    other = op.get("other") if op.name == "aten.sub.Tensor" else None
    shifted = other is not None and other.tensor.shape[-1:] == (1,) and op.argument("alpha") == 1
    return op["self"] if shifted and op["self"].type == scores.type else scores


def _without_sinks(scores: Value, graph: Graph) -> tuple[Value, Value]:
    """The scores of the keys, and the sinks [heads] that are concatenated to them."""
    parts = scores.op.argument("tensors") if scores.op.name == "aten.cat" else None
    match parts:
        case (Value() as kept, Value() as beside) if scores.op.argument("dim") in (-1, 3):
            return kept, _per_head(beside, graph)
    raise NotAttention("some of its weights are dropped that do not belong to sinks", scores)


def _per_head(beside: Value, graph: Graph) -> Value:
    """The vector [heads] whose element h is element [b, h, q, 0] of `beside`."""
    head = symbol("sink.h")
    at: Index = (symbol("sink.b"), head, symbol("sink.q"), 0)
    source = beside
    while source.op.name in MOVES and isinstance(operand := source.op.args[0], Value):
        source = operand
        if source.tensor.shape == (beside.tensor.shape[1],):
            try:
                only = Elements(graph, leaves=(source,)).element(beside, at).only
            except (Unknown, TooComplex):
                break
            if only == call(f"%{source.name}", head):
                return source
    raise NotAttention("what it concatenates to the scores is not one number per head", beside)


@dataclass
class _Reading:
    """Follows scores from the softmax down to the matmul of queries and keys.

    Attributes:
        heads: The number of heads.
        masks: The masks so far.
        factor: The product of the constant factors since the softmax, or since the tanh.
        softcap: The product of the factors after the tanh; None before it is found.
    """

    graph: Graph
    heads: Size
    masks: list[Mask] = field(default_factory=list)
    factor: Fraction = Fraction(1)
    softcap: Fraction | None = None

    def read(self, scores: Value) -> Attended:
        """The attention without its value; raises NotAttention if an operation does not belong to one."""
        while scores.op.name not in PRODUCTS:
            step = STEPS.get(scores.op.name)
            if step is None:
                raise NotAttention(f"its scores pass through {scores.op.name}, which is not part of attention", scores)
            scores = step(self, scores.op)
        if scores.op.name == "aten.baddbmm":
            self.summed(scores.op)
        query, key = scores.op["x"], scores.op["w"]
        straight = swaps_last(key.op)
        scale = self.factor if self.softcap is None else self.factor * self.softcap
        softcap = None if self.softcap is None else float(self.softcap)
        key = key.op["self"] if straight else key
        return Attended(query, key, query, float(scale), not straight, softcap, None, tuple(self.masks))

    def cast(self, op: Op) -> Value:
        """A cast between floating types."""
        if not (op["self"].tensor.dtype.is_float and op.result.tensor.dtype.is_float):
            raise NotAttention("its scores are not floating-point numbers", op.result)
        return op["self"]

    def scaled(self, op: Op) -> Value:
        """scores * c, c * scores or scores / c"""
        scores, other = op.argument("self"), op.argument("other")
        inverse = op.name.startswith("aten.div")
        if not inverse and self.number(scores) is not None:
            scores, other = other, scores
        number = self.number(other)
        if not isinstance(scores, Value) or number is None or not 0 < number < math.inf:
            raise NotAttention("its scores are multiplied by a value that is not a positive constant", op.result)
        self.factor *= 1 / Fraction(number) if inverse else Fraction(number)
        return scores

    def joined(self, op: Op) -> Value:
        """Scores [batch, heads, queries, keys] as [batch * heads, queries, keys], or the other way around."""
        if not joins(op) and not splits(op):
            raise NotAttention(f"its scores pass through {op.name}, which is not part of attention", op.result)
        return op["self"]

    def summed(self, op: Op) -> None:
        """alpha * q @ k^T + beta * mask"""
        beta, alpha = self.number(op.argument("beta")), self.number(op.argument("alpha"))
        if alpha is None or beta is None or not 0 < alpha < math.inf or not 0 <= beta < math.inf:
            raise NotAttention("its scores are multiplied by a value that is not a positive constant", op.result)
        if beta:
            self.masked(op, op.result, Mask(op["self"], factor=beta))
        self.factor *= Fraction(alpha)

    def capped(self, op: Op) -> Value:
        """tanh(scores)"""
        if self.softcap is not None:
            raise NotAttention("its scores pass through two tanh", op.result)
        self.softcap, self.factor = self.factor, Fraction(1)
        return op["self"]

    def added(self, op: Op) -> Value:
        """scores + mask or mask + scores"""
        scores, mask = op.argument("self"), op.argument("other")
        if not isinstance(scores, Value) or not isinstance(mask, Value) or op.argument("alpha") != 1:
            raise NotAttention("its scores have an addend that is not a mask", op.result)
        if reaches_matmul(mask):
            scores, mask = mask, scores
        return self.masked(op, scores, Mask(mask))

    def chosen(self, op: Op) -> Value:
        """where(seen, scores, lowest) or where(hidden, lowest, scores)"""
        kept, other = op.argument("self"), op.argument("other")
        inverted = self.hides(kept)
        if inverted:
            kept, other = other, kept
        if not self.hides(other) or not isinstance(kept, Value):
            raise NotAttention("its scores are replaced by a value that does not hide a key", op.result)
        return self.masked(op, kept, Mask(op["condition"], inverted))

    def filled(self, op: Op) -> Value:
        """masked_fill(scores, hidden, lowest)"""
        if not self.hides(op.argument("value")):
            raise NotAttention("its scores are replaced by a value that does not hide a key", op.result)
        return self.masked(op, op["self"], Mask(op["mask"], inverted=True))

    def masked(self, op: Op, scores: Value, mask: Mask) -> Value:
        """Adds a mask, with the factor of the scores after it; a limit must not come after it."""
        if self.softcap is not None:
            raise NotAttention("its scores have an addend or a mask before they are limited", op.result)
        joined = len(op.result.tensor.shape) == 3
        factor = mask.factor * float(self.factor)
        self.masks.append(mask._replace(factor=factor, folded=self.heads if joined else None))
        return scores

    def number(self, arg: Argument) -> float | None:
        """A constant: a literal, or a tensor of one element that no input affects."""
        if isinstance(arg, int | float):
            return float(arg)
        if not isinstance(arg, Value) or not isinstance(arg.type, TensorType) or arg.type.elements != 1:
            return None
        try:
            only = Elements(self.graph).element(arg, (0,) * len(arg.type.shape)).only
        except (Unknown, TooComplex):
            return None
        return float(only) if isinstance(only, int | float) else None

    def hides(self, arg: Argument) -> bool:
        """Whether a score of this value hides a key."""
        number = self.number(arg)
        return number is not None and number * float(self.factor) <= HIDDEN


STEPS: Mapping[str, Callable[[_Reading, Op], Value]] = {
    "aten._to_copy": _Reading.cast,
    "aten.to.dtype": _Reading.cast,
    "aten.mul.Tensor": _Reading.scaled,
    "aten.mul.Scalar": _Reading.scaled,
    "aten.div.Tensor": _Reading.scaled,
    "aten.div.Scalar": _Reading.scaled,
    "aten.view": _Reading.joined,
    "aten.reshape": _Reading.joined,
    "aten._unsafe_view": _Reading.joined,
    "aten.tanh": _Reading.capped,
    "aten.add.Tensor": _Reading.added,
    "aten.where.self": _Reading.chosen,
    "aten.where.ScalarOther": _Reading.chosen,
    "aten.where.ScalarSelf": _Reading.chosen,
    "aten.masked_fill.Scalar": _Reading.filled,
    "aten.masked_fill.Tensor": _Reading.filled,
}
"""Operation on scores -> how it is read; returns the scores before it."""


def reaches_matmul(value: Value) -> bool:
    """Whether a value is computed from a matmul by operations on scores."""
    waiting = [value]
    while waiting:
        op = waiting.pop().op
        if op.name in PRODUCTS:
            return True
        if op.name in STEPS:
            waiting += [operand for _, operand in op.operands()]
    return False


def swaps_last(op: Op) -> bool:
    """Whether an operation transposes the last two of three or four dimensions."""
    rank = len(op.results[0].tensor.shape) if op.name in ("aten.permute", "aten.transpose.int") else 0
    if op.name == "aten.permute":
        dims, swapped = op.argument("dims"), [*range(rank - 2), rank - 1, rank - 2]
        return isinstance(dims, tuple) and [d % rank for d in dims if isinstance(d, int)] == swapped
    axes = [op.argument(name) for name in ("dim0", "dim1")] if rank else []
    return sorted(axis % rank for axis in axes if isinstance(axis, int)) == [rank - 2, rank - 1]
