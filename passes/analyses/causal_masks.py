"""Proves that a mask is causal, possibly with a window, chunks, padding or a linear bias, or says why it is not.

    mask[b, h, q, k]  =  k <= q and q - 4 < k           ->   CausalMask(window=4)
    mask[b, h, q, k]  =  0.0 if k <= q else -inf        ->   CausalMask()
    mask[b, h, q, k]  =  %s(h) * k if k <= q else -inf  ->   CausalMask(slopes=…)

Names and order of the operations do not matter: the elements of the mask become linear inequalities, and a mask is
causal if they imply k <= q and the other way around.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from passes.analyses.elements import Elements
from passes.analyses.index_expressions import Element, Index, Unknown
from passes.analyses.inequalities import (
    TRUE,
    Condition,
    Conjunction,
    TooComplex,
    both,
    either,
    implies,
    negation,
    nonnegative,
    simplified,
)
from passes.analyses.linear_biases import NotLinear, Slopes, slopes_of
from passes.analyses.real_numbers import Real, real
from qcompiler.ir import DType, Graph, Size, TensorType, Value
from qcompiler.ir.sizes import Call, Expr, call, symbol, symbols

BATCH, HEAD, QUERY, KEY = (symbol(f"mask.{name}") for name in ("b", "h", "q", "k"))

HIDDEN = -65504.0
"""The largest addend that hides a key, the lowest float16: exp of it is 0, for scores up to 6.5e4 below the maximum."""


@dataclass(frozen=True)
class CausalMask:
    """Which keys k a query q reads: k <= q, and what the attributes add.

    Attributes:
        window: Only the latest `window` keys, q - window < k; None for all.
        chunk: Only keys of the query's own chunk of `chunk` positions; None for all.
        padding: Values that hide further keys, independent of the query.
        assumed: Inputs that must count up by 1 along their last axis.
        from_zero: Whether these must begin at 0.
        slopes: What the masks add to the scores of the keys that are read, per position; None if nothing.
    """

    window: int | None = None
    chunk: int | None = None
    padding: tuple[Value, ...] = ()
    assumed: tuple[Value, ...] = ()
    from_zero: bool = False
    slopes: Slopes | None = None


class Mask(NamedTuple):
    """A mask of scores: booleans or addends. True means that the query reads the key, or not if `inverted`.

    Attributes:
        value: Broadcasts to the scores.
        inverted: Whether True hides a key.
        factor: A positive factor of the addends.
        folded: The number of heads if the first of three axes holds rows of the batch and heads; None for an own axis.
    """

    value: Value
    inverted: bool = False
    factor: float = 1.0
    folded: Size | None = None


@dataclass(frozen=True)
class NotCausal:
    """Why a mask is not proven causal, and the value at fault."""

    why: str
    value: Value


def causal_mask(
    graph: Graph, masks: Sequence[Mask], shape: tuple[Size, ...], consecutive: Collection[Value] = (), *,
    from_zero: bool = False,
) -> CausalMask | NotCausal:  # fmt: skip
    """The form of masks that together are causal, or why they are not.

    Args:
        graph: The graph of the masks.
        masks: At least one; each value broadcasts to `shape`.
        shape: The shape of the scores, [batch, heads, queries, keys], as many queries as keys.
        consecutive: Inputs that may be assumed to count up by 1 along their last axis.
        from_zero: Whether these may be assumed to begin at 0.
    """
    found = _recognized(graph, masks, shape, ())
    if isinstance(found, NotCausal) and consecutive:
        found = _recognized(graph, masks, shape, tuple(consecutive))
    if isinstance(found, NotCausal) and consecutive and from_zero:
        found = _recognized(graph, masks, shape, tuple(consecutive), from_zero=True)
    if isinstance(found, NotCausal):
        for value, zero in product(filter(_may_be_positions, graph.inputs), (False, True)):
            if isinstance(_recognized(graph, masks, shape, (value,), from_zero=zero), CausalMask):
                how, option = ("from 0", ", from_zero=true") if zero else ("by 1", "")
                promise = f"as attention{{consecutive={value.name}{option}}} promises"
                return NotCausal(f"its mask is causal only if this input counts up {how}, {promise}", value)
    return found


def hides_nothing(graph: Graph, mask: Value, shape: tuple[Size, ...]) -> bool:
    """Whether each query reads each key, for a mask of booleans or addends that broadcasts to `shape`."""
    elements, rank = Elements(graph), len(mask.tensor.shape)
    at = tuple(symbol(f"mask.{axis}") for axis in range(len(shape)))
    facts = in_range(at, shape) | elements.facts
    try:
        element = elements.element(mask, at[len(at) - rank :], facts)
        cases = _visible(element, Mask(mask), facts)
        return not any(bias.terms for _, bias in cases) and _seen(cases, facts) == TRUE
    except (Unknown, TooComplex):
        return False


def _may_be_positions(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.dtype in (DType.i64, DType.i32) and bool(value.type.shape)


def _recognized(
    graph: Graph, masks: Sequence[Mask], shape: tuple[Size, ...], assumed: tuple[Value, ...], *, from_zero: bool = False
) -> CausalMask | NotCausal:
    elements = Elements(graph, consecutive=assumed, from_zero=from_zero, heads=symbols(HEAD))
    at = (BATCH, HEAD, QUERY, KEY)
    facts = in_range(at, shape) | elements.facts
    cases: Cases = [(TRUE, Real())]
    try:
        for mask in masks:
            place = at if mask.folded is None else (BATCH * mask.folded + HEAD, QUERY, KEY)
            element = elements.element(mask.value, place[len(place) - len(mask.value.tensor.shape) :], facts)
            cases = _joined(cases, _visible(element, mask, facts), facts)
        form = _classified(graph, _seen(cases, facts), masks[0].value, facts, assumed)
        if isinstance(form, NotCausal):
            return form
        return replace(form, from_zero=from_zero, slopes=slopes_of(cases, HEAD, QUERY, KEY, facts))
    except NotLinear as error:
        return NotCausal(str(error), masks[-1].value)
    except Unknown as error:
        return NotCausal(f"its mask is not computed from indices alone: {error.why}", error.value)
    except TooComplex:
        return NotCausal("its mask has too many cases", masks[0].value)


def in_range(at: Index, shape: tuple[Size, ...]) -> Conjunction:
    """The facts 0 <= index < size for each axis."""
    limits = both(*(nonnegative(limit) for i, size in zip(at, shape, strict=True) for limit in (i, size - 1 - i)))
    return next(iter(limits), frozenset())


Cases = list[tuple[Condition, Real]]
"""Where the query reads the key, and what is added to its score there."""


def _visible(element: Element, mask: Mask, facts: Conjunction) -> Cases:
    if mask.value.tensor.dtype is DType.b8:
        truth = element.truth(facts)
        return [(simplified(negation(truth), facts) if mask.inverted else truth, Real())]
    visible = []
    for condition, number in element.cases:
        if isinstance(number, Expr | Real):
            visible.append((condition, real(number) * mask.factor))
        elif number == 0:
            visible.append((condition, Real()))
        elif not number * mask.factor <= HIDDEN:
            raise Unknown(f"it adds {number} to scores, which neither keeps a key (0) nor hides it (-inf)", mask.value)
    return visible


def _joined(cases: Cases, others: Cases, facts: Conjunction) -> Cases:
    """The keys that two masks show, and the sum of their addends."""
    joined = [(simplified(both(a, b), facts), x + y) for a, x in cases for b, y in others]
    return [case for case in joined if case[0]]


def _seen(cases: Cases, facts: Conjunction) -> Condition:
    """Where the query reads the key."""
    return simplified(either(*(condition for condition, _ in cases)), facts)


def _classified(
    graph: Graph, seen: Condition, mask: Value, facts: Conjunction, assumed: tuple[Value, ...]
) -> CausalMask | NotCausal:
    causal = nonnegative(QUERY - KEY)
    if seen == TRUE:
        return NotCausal("its mask hides nothing", mask)
    padding = _about_keys(seen)
    for window, chunk, hides in product((None, *_windows(seen)), (None, *_chunks(seen)), (TRUE, padding)):
        form = both(causal, _latest(window), _same_chunk(chunk), hides)
        if implies(seen, form, facts) and implies(form, seen, facts):
            return CausalMask(window, chunk, _opaque(graph, hides), assumed)
    if others := _opaque(graph, seen):
        return NotCausal("its mask also depends on this value", others[0])
    if not implies(seen, causal, facts):
        return NotCausal("its mask also shows keys after the query", mask)
    return NotCausal("its mask hides keys before the query, other than by a window", mask)


def _latest(window: int | None) -> Condition:
    return TRUE if window is None else nonnegative(KEY - QUERY + (window - 1))


def _same_chunk(chunk: int | None) -> Condition:
    return TRUE if chunk is None else nonnegative(KEY - call("floordiv", QUERY, chunk) * chunk)


def _inequalities(seen: Condition) -> Iterator[Expr]:
    for conjunction in sorted(seen, key=lambda each: sorted(map(str, each))):
        yield from sorted(conjunction, key=str)


def _windows(seen: Condition) -> list[int]:
    """Candidates: each inequality that limits how far a key is before the query."""
    distances = [size - (KEY - QUERY) for size in _inequalities(seen)]
    return sorted({distance + 1 for distance in distances if isinstance(distance, int) and distance >= 0})


def _calls(seen: Condition) -> set[Call]:
    atoms = {atom for size in _inequalities(seen) for atoms, _ in size.terms for atom in atoms}
    return {atom for atom in atoms if isinstance(atom, Call)}


def _chunks(seen: Condition) -> list[int]:
    """Candidates: each divisor of a position."""
    found = {atom.args[1] for atom in _calls(seen) if atom.function == "floordiv"}
    return sorted(chunk for chunk in found if isinstance(chunk, int))


def _opaque(graph: Graph, seen: Condition) -> tuple[Value, ...]:
    """The values whose elements are unknowns."""
    names = {atom.function.removeprefix("%") for atom in _calls(seen) if atom.function.startswith("%")}
    return tuple(graph[name] for name in sorted(names))


def _about_keys(seen: Condition) -> Condition:
    """What a mask says about keys alone, by elements of values: the candidate for padding."""
    (query,), (key,) = symbols(QUERY), symbols(KEY)

    def about_key(size: Expr) -> bool:
        unknown = any(atom.function.startswith("%") for atom in _calls(frozenset({frozenset({size})})))
        return unknown and key in symbols(size) and query not in symbols(size)

    return either(*(frozenset({frozenset(filter(about_key, each))}) for each in seen))
