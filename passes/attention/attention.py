"""Rewrites attention with a causal mask to one operation without a mask.

    %m = …                                                            b8[s0, 1, s1, s1], proven to be k <= q
    %o = aten.scaled_dot_product_attention(%q, %k, %v, %m)      ->      attention.causal(%q, %k, %v) {scale = 0.125}

Repeats of the keys' and values' heads for grouped queries are dropped. A window and chunks become attributes, and the
slopes of a bias that is linear in the key's position an operand. The mask is removed by `dead-code`. So is a mask that
hides nothing:

    %o = aten.scaled_dot_product_attention(%q, %k, %v, %all)    ->      aten.scaled_dot_product_attention(%q, %k, %v)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from passes.analyses.causal_masks import CausalMask, Mask, NotCausal, causal_mask, hides_nothing
from passes.analyses.linear_biases import Slopes
from passes.attention.eager import MATMULS, Attended, NotAttention, read_attention, softmax_before
from passes.attention.folded_heads import replace_joined
from passes.attention.repeated_heads import before_repeats
from passes.attention.slopes import StoreSlopes, insert_slopes, why_no_vector
from qcompiler.ir import Argument, Graph, Match, Missed, Op, Rewriter, Rule, Size, TensorType, Value, explain
from qcompiler.pass_manager.pipeline import Effect, Pass

SDPA = "aten.scaled_dot_product_attention"
NO_SOFTMAX = "its first operand is not a softmax"


@dataclass(frozen=True)
class SdpaToCausal(Rule):
    """scaled_dot_product_attention(q, k, v, mask)  ->  causal(q, k, v), if the mask is causal, also with a window"""

    consecutive: str
    from_zero: bool
    root: ClassVar[tuple[str, ...]] = (SDPA,)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if op.argument("dropout_p") != 0:
            return Missed("it drops elements")
        mask, scale, size = op.argument("attn_mask"), op.argument("scale"), op["query"].tensor.shape[-1]
        if scale is None and isinstance(size, int):
            scale = 1 / math.sqrt(size)
        if not isinstance(scale, int | float) or not 0 < scale < math.inf:
            return Missed("its scale is not a positive number")
        masks = (Mask(mask),) if isinstance(mask, Value) else ()
        found = Attended(op["query"], op["key"], op["value"], float(scale), masks=masks)
        if op.argument("is_causal") is True:
            return proven(op, graph, found, CausalMask())
        return proven(op, graph, found, recognized(op, graph, found, self.consecutive, from_zero=self.from_zero))

    def rewrite(self, op: Op, rewriter: Rewriter, found: Attended, form: CausalMask, **_: Any) -> None:
        replace_by_causal(op, rewriter, found, form)


@dataclass(frozen=True)
class EagerToCausal(Rule):
    """matmul(softmax(matmul(q, transpose(k)) * scale + mask), v)  ->  causal(q, k, v), if the mask is causal"""

    consecutive: str
    from_zero: bool
    root: ClassVar[tuple[str, ...]] = MATMULS

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        if softmax_before(op) is None:
            return Missed(NO_SOFTMAX)
        try:
            found = read_attention(op, graph)
        except NotAttention as error:
            return Missed(error.why, error.value)
        return proven(op, graph, found, recognized(op, graph, found, self.consecutive, from_zero=self.from_zero))

    def rewrite(self, op: Op, rewriter: Rewriter, found: Attended, form: CausalMask, **_: Any) -> None:
        replace_by_causal(op, rewriter, found, form)


@dataclass(frozen=True)
class DropMask(Rule):
    """scaled_dot_product_attention(q, k, v, mask)  ->  the same without the mask, if it hides nothing"""

    root: ClassVar[tuple[str, ...]] = (SDPA,)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        mask, query, key, value = op.argument("attn_mask"), op["query"].tensor, op["key"].tensor, op["value"].tensor
        if not isinstance(mask, Value):
            return Missed("it has no mask")
        if op.result.tensor.shape != (*query.shape[:-1], value.shape[-1]):
            return Missed("its mask broadcasts the scores to another shape")
        if not hides_nothing(graph, mask, (*query.shape[:-1], key.shape[-2])):
            return Missed("its mask is not proven to hide nothing")
        return {}

    def rewrite(self, op: Op, rewriter: Rewriter, **_: Any) -> None:
        attrs = {name: arg for name, arg in op.attrs.items() if name != "attn_mask"}
        beyond = op.args[4:]
        args = (op["query"], op["key"], op["value"], *((None, *beyond) if beyond else ()))
        rewriter.replace(op, rewriter.insert(SDPA, *args, attrs=attrs, types=[op.result.type]).result)


def recognized(op: Op, graph: Graph, found: Attended, consecutive: str, *, from_zero: bool) -> CausalMask | Missed:
    """The form of the masks of an attention, or why `attention.causal` cannot express them."""
    shape = scores_shape(found, op)
    if isinstance(shape, Missed):
        return shape
    if not found.masks:
        return Missed("it reads all keys: it has no mask")
    promised = [value for value in graph.inputs if value.name == consecutive]
    form = causal_mask(graph, found.masks, shape, promised, from_zero=from_zero)
    if isinstance(form, NotCausal):
        return Missed(form.why, form.value)
    if form.padding:
        return Missed("its mask is causal, but this value hides further keys", form.padding[0])
    return form


def proven(op: Op, graph: Graph, found: Attended, form: CausalMask | Missed) -> Match | Missed:
    """The operands and the form of the mask, if `attention.causal` can express the attention, or why it cannot."""
    shape = scores_shape(found, op)
    for missed in (shape, form):
        if isinstance(missed, Missed):
            return missed
    assert isinstance(form, CausalMask)
    if form.slopes is not None and (why := _why_no_slopes(graph, form.slopes, found)):
        return Missed(why, found.masks[0].value)
    return {"found": found, "form": form}


def _why_no_slopes(graph: Graph, slopes: Slopes, found: Attended) -> str | None:
    if found.sinks is not None and not slopes.exact:
        return "its bias moves the scores of the keys against its sinks"
    heads = found.query.tensor.shape[1]
    assert isinstance(heads, int)  # checked by scores_shape
    return why_no_vector(graph, slopes, heads)


def scores_shape(found: Attended, op: Op) -> tuple[Size, ...] | Missed:
    """The shape [batch, heads, queries, keys] of the scores, or why `attention.causal` does not take the operands."""
    query, key, value = (operand.tensor for operand in (found.query, found.key, found.value))
    if not len(query.shape) == len(key.shape) == len(value.shape) == 4:
        return Missed("its operands do not have four dimensions: batch, heads, positions and head size")
    if not query.dtype is key.dtype is value.dtype is op.result.tensor.dtype:
        return Missed("its queries, keys, values and result have different element types")
    batch, heads, length, _ = query.shape
    groups, keys = key.shape[1], key.shape[3 if found.transposed else 2]
    if not batch == key.shape[0] == value.shape[0]:
        return Missed("its queries, keys and values have different batch sizes")
    if groups != value.shape[1] or not isinstance(heads, int) or not isinstance(groups, int) or heads % groups:
        return Missed("its keys and values do not have one head for each group of heads of the queries")
    if length != keys:
        return Missed(f"it has {length} queries but {keys} keys", found.key)
    if op.result.tensor.shape not in ((batch, heads, length, value.shape[3]), (batch * heads, length, value.shape[3])):
        return Missed("its mask broadcasts the scores to another shape")
    return batch, heads, length, keys


def replace_by_causal(op: Op, rewriter: Rewriter, found: Attended, form: CausalMask) -> None:
    """Replaces the last operation of an attention by `attention.causal`."""
    attrs: dict[str, Argument] = {"scale": found.scale}
    attrs |= {} if form.window is None else {"window": form.window}
    attrs |= {} if form.chunk is None else {"chunk": form.chunk}
    attrs |= {} if found.softcap is None else {"softcap": found.softcap}
    key = straight(rewriter, found.key) if found.transposed else found.key
    args: list[Argument] = [found.query, *before_repeats(rewriter.graph, key, found.value)]
    args += [] if found.sinks is None and form.slopes is None else [found.sinks]
    if form.slopes is not None:
        heads = found.query.tensor.shape[1]
        assert isinstance(heads, int)  # checked by scores_shape
        args.append(insert_slopes(rewriter, form.slopes, heads))
    new = rewriter.insert("attention.causal", *args, attrs=attrs).result
    replace_joined(rewriter, op, new)
    if form.slopes is not None and form.slopes.narrow is not None:
        rewriter.graph.remark(new, f"its bias is computed in FP32, but the model rounds it to {form.slopes.narrow}")
    for assumed in form.assumed:
        how = "from 0" if form.from_zero else "by 1"
        rewriter.graph.remark(new, f"causal because {assumed} is assumed to count up {how} in each row")


def straight(rewriter: Rewriter, key: Value) -> Value:
    """A key [batch, groups, size, keys] with its last two dimensions transposed."""
    *lead, size, keys = key.tensor.shape
    types = [TensorType(key.tensor.dtype, (*lead, keys, size))]
    return rewriter.insert("aten.transpose.int", key, 2, 3, types=types, names=[f"{key.name}_straight"]).result


@dataclass(frozen=True)
class Attention(Pass):
    """attention with a causal mask  ->  `attention.causal` without a mask"""

    name: ClassVar[str] = "attention"
    effect: ClassVar[Effect] = Effect.REORDERS

    consecutive: str = ""
    """The name of an input, such as position_ids, that callers promise counts up by 1 along its last axis."""

    from_zero: bool = False
    """Whether callers promise that this input begins at 0, on which masks of chunks depend."""

    def rules(self) -> Sequence[Rule]:
        """Rules for torch's attention and for attention that a model spells out; masks without effect; slopes."""
        promised = self.consecutive, self.from_zero
        return (SdpaToCausal(*promised), EagerToCausal(*promised), DropMask(), StoreSlopes())

    def explain(self, graph: Graph) -> dict[str, str]:
        """Reports why attentions are not causal; other matmuls and masks that hide keys need no reason."""
        missed = explain(graph, self.rules()[:2])
        return {op.result.name: str(why) for op, _, why in missed if why.why != NO_SOFTMAX}
