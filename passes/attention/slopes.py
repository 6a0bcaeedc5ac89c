"""Computes the slopes of a linear bias, one FP32 number for each head, from the values that a model multiplies.

    slope[h] = 0.25 * %s(h, 0)      %s: bf16[8, 1]
  ->
    %v = aten.view(%s, [8]) : bf16[8]
    %c = aten._to_copy(%v) {dtype = f32} : f32[8]
    %slopes = aten.mul.Tensor(%c, 0.25) : f32[8]

Layers with the same slopes share the operations. If these read literals only, the result becomes a weight:

    %slopes = core.param() {name = "slopes_folded"} : f32[8]
"""

from collections.abc import Mapping, Sequence
from typing import Any

from passes.analyses.causal_masks import HEAD
from passes.analyses.linear_biases import Slopes
from passes.cleanup.fold_constants import store
from qcompiler.ir import Argument, DType, Graph, Match, Missed, Op, Rewriter, Rule, TensorType, Type, Value
from qcompiler.ir.dataflow import parameters_of
from qcompiler.ir.graph import PARAM
from qcompiler.ir.sizes import Call, substitute, symbols


class StoreSlopes(Rule):
    """attention.causal(…, slopes that are computed from literals)  ->  attention.causal(…, param)"""

    root = ("attention.causal",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        slopes = op.get("slopes")
        if slopes is None or slopes.op.name == PARAM:
            return Missed("it has no slopes that are computed")
        if not graph.weights or not graph.is_constant(slopes):
            return Missed("its slopes are inputs, or the graph has no weights", slopes)
        if parameters_of(slopes):
            return Missed("its slopes are computed from weights, which fold-constants may store", slopes)
        return {"slopes": slopes}

    def rewrite(self, op: Op, rewriter: Rewriter, slopes: Value, **_: Any) -> None:
        store(slopes.op, rewriter, ("_folded",))


def why_no_vector(graph: Graph, slopes: Slopes, heads: int) -> str | None:
    """Why slopes cannot be computed as a vector [heads]; None if they can."""
    for calls, _ in slopes.terms:
        for call in calls:
            value = graph[call.function.removeprefix("%")]
            if value.tensor.elements != 1 and _places(value, call, heads) is None:
                return f"the slopes of its bias are not one number for each of {heads} heads"
    return None


def _places(value: Value, call: Call, heads: int) -> range | None:
    """Where the number of each head is in a value with one axis of several elements; None if nowhere."""
    wide = [(size, at) for size, at in zip(value.tensor.shape, call.args, strict=True) if size != 1]
    (size, at), *others = wide
    first, second = (substitute(at, {name: head for name in symbols(HEAD)}) for head in (0, 1))
    if others or not isinstance(size, int) or not isinstance(first, int) or not isinstance(second, int):
        return None
    step = second - first
    regular = at == first + HEAD * step and step > 0 and first + step * (heads - 1) < size
    return range(first, first + step * (heads - 1) + 1, step) if regular else None


def insert_slopes(rewriter: Rewriter, slopes: Slopes, heads: int) -> Value:
    """The slopes f32[heads], for which `why_no_vector` is None."""
    products = [_product(rewriter, calls, factor, heads) for calls, factor in slopes.terms]
    total, *others = products
    for other in others:
        total = _shared(rewriter, "aten.add.Tensor", (total, other), total.type)
    return total


def _product(rewriter: Rewriter, calls: Sequence[Call], factor: float, heads: int) -> Value:
    kind = TensorType(DType.f32, (heads,))
    if not calls:
        return _shared(rewriter, "aten.full", ((heads,), factor), kind, {"dtype": DType.f32})
    product, *others = (_vector(rewriter, call, heads) for call in calls)
    for other in others:
        product = _shared(rewriter, "aten.mul.Tensor", (product, other), kind)
    return product if factor == 1 else _shared(rewriter, "aten.mul.Tensor", (product, factor), kind)


def _vector(rewriter: Rewriter, call: Call, heads: int) -> Value:
    value = rewriter.graph[call.function.removeprefix("%")]
    dtype, size = value.tensor.dtype, value.tensor.elements
    assert isinstance(size, int)  # of a constant
    places = range(1) if size == 1 else _places(value, call, heads)
    if len(value.tensor.shape) != 1:
        value = _shared(rewriter, "aten.view", (value, (size,)), TensorType(dtype, (size,)))
    if size == 1 and heads > 1:
        value = _shared(rewriter, "aten.expand", (value, (heads,)), TensorType(dtype, (heads,)))
    elif places != range(size):
        assert places is not None  # why_no_vector is None
        cut = (value, 0, places.start, places.stop, places.step)
        value = _shared(rewriter, "aten.slice.Tensor", cut, TensorType(dtype, (heads,)))
    if dtype is not DType.f32:
        kind = TensorType(DType.f32, (heads,))
        value = _shared(rewriter, "aten._to_copy", (value,), kind, {"dtype": DType.f32})
    return value


def _shared(
    rewriter: Rewriter, name: str, args: tuple[Argument, ...], kind: Type, attrs: Mapping[str, Argument] | None = None
) -> Value:
    """The result of an operation: of an equal one before the anchor if there is one, else of a new one."""
    graph = rewriter.graph
    attrs = dict(attrs or {})
    operands = [arg for arg in args if isinstance(arg, Value)]
    for op in graph.users(operands[0]) if operands else graph.ops(name):
        same = op.name == name and op.args == args and dict(op.attrs) == attrs
        if same and graph.rank(op) < graph.rank(rewriter.anchor):
            return op.result
    return rewriter.insert(name, *args, attrs=attrs, types=[kind], names=["slopes"]).result
