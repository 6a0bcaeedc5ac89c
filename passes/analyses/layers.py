"""Which matmuls a pass selects: patterns over weight names, of which the last match decides.

    ["*", "!*.down_proj", "!lm_head"]     all but those
    ["*.down_proj"]                       only those

Patterns use shell syntax. They are matched against the name of each weight (`model.lm_head.weight`), that name without
its last part (`model.lm_head`), and the other names of a tied weight. An exclamation mark deselects what earlier
patterns have selected.

A pattern *names* the layers that it selects if its last part, not counting a final `.weight`, has no wildcard:
`lm_head`, `*.gate` and `model.layers.*.mlp.gate.weight` do, `*`, `model.layers.0.*` and `*.weight` do not. A named
layer is quantized even if the heuristics of `candidates` would skip it. `*lm_head*` works too: a pattern that selects
only layers that would be skipped names them all.
"""

import difflib
from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from passes.analyses.candidates import ALREADY, why_not_quantized
from qcompiler.errors import PassError
from qcompiler.ir import Graph, Missed, Op, Role
from qcompiler.ir.dataflow import origins_of, parameters_of
from qcompiler.ir.graph import PARAM

EVERYTHING = ("*",)

WILDCARDS = frozenset("*?[")

EXAMPLES = 3
"""Maximum number of known names in an error."""


def why_not_selected(patterns: Sequence[str], op: Op, graph: Graph) -> Missed | None:
    """Why the patterns exclude a matmul; None if they select it."""
    if tuple(patterns) == EVERYTHING:
        return None
    decides = deciding_pattern(patterns, op, graph)
    if decides is None:
        return Missed(f"no pattern selects it: {', '.join(patterns)}")
    return Missed(f"the pattern '{decides}' excludes it") if decides.startswith("!") else None


def why_not_layer(patterns: Sequence[str], op: Op, graph: Graph) -> Missed | None:
    """Why an operation that reads weights is not quantized; None if the patterns select it, or name it."""
    if (why := why_not_quantized(op, graph)) is None:
        return why_not_selected(patterns, op, graph)
    return why if naming_pattern(patterns, op, graph) is None else why_not_quantized(op, graph, named=True)


def deciding_pattern(patterns: Sequence[str], op: Op, graph: Graph) -> str | None:
    """The last pattern that matches a weight of a matmul; None if there is none."""
    names = set(names_of(op, graph))
    matching = (
        pattern for pattern in reversed(patterns) if any(fnmatchcase(name, pattern.removeprefix("!")) for name in names)
    )
    return next(matching, None)


def naming_pattern(patterns: Sequence[str], op: Op, graph: Graph) -> str | None:
    """The pattern that selects a matmul and names it; None if there is none."""
    if tuple(patterns) == EVERYTHING:
        return None
    pattern = deciding_pattern(patterns, op, graph)
    if pattern is None or pattern.startswith("!") or pattern in EVERYTHING:
        return None
    if is_name(pattern) or _selects_only_skipped(pattern, patterns, graph):
        return pattern
    return None


def is_name(pattern: str) -> bool:
    """Whether the last part of a pattern, not counting a final `.weight`, has no wildcard."""
    last = pattern.removesuffix(".weight").rpartition(".")[2]
    return WILDCARDS.isdisjoint(last)


def requested_layers(patterns: Sequence[str], graph: Graph) -> dict[str, list[Op]]:
    """The matmuls that each pattern except `*` selects."""
    if tuple(patterns) == EVERYTHING:
        return {}
    found: dict[str, list[Op]] = {}
    for op in graph.ops():
        pattern = deciding_pattern(patterns, op, graph) if _is_layer(op, graph) else None
        if pattern is not None and not pattern.startswith("!") and pattern not in EVERYTHING:
            found.setdefault(pattern, []).append(op)
    return found


def _selects_only_skipped(pattern: str, patterns: Sequence[str], graph: Graph) -> bool:
    """Whether a pattern selects only linears that would be skipped, so that it would have no effect."""

    def skipped(op: Op) -> bool:
        return op.name == "aten.linear" and why_not_quantized(op, graph) not in (None, ALREADY)

    # Layers that this pass has already quantized count, or the answer would change while the pass runs.
    candidates = (op for op in graph.ops() if op.role is Role.QUANTIZED_MATMUL or _is_layer(op, graph))
    return all(skipped(op) for op in candidates if deciding_pattern(patterns, op, graph) == pattern)


def _is_layer(op: Op, graph: Graph) -> bool:
    """Whether an operation is a matmul that is not computed from weights alone."""
    return op.role is Role.MATMUL and not graph.is_constant(op.results[0])


def check_patterns(patterns: Sequence[str], graph: Graph) -> None:
    """Raises PassError for a pattern that matches no matmul's weight: a typo, or outdated.

    A pattern that only deselects may match any weight: embeddings and convolutions stay in float anyway.
    """
    wanted = _without_marks(patterns)
    if not wanted:
        return
    matmuls = [op for op in graph.ops() if op.role is Role.MATMUL]
    names = sorted({name for op in matmuls for name in names_of(op, graph)})
    others = {*graph.weights, *(str(op.attrs["name"]) for op in graph.ops(PARAM))}
    others |= {name.rpartition(".")[0] for name in others}
    missing = unmatched(wanted, names)
    missing = [pattern for pattern in missing if pattern in patterns or unmatched([pattern], others)]
    if missing:
        raise PassError("a pattern matches no matmul's weight", got=repr(missing[0]), fix=similar(missing[0], names))


def check_names(patterns: Sequence[str], names: Collection[str]) -> None:
    """Raises PassError for a pattern that matches none of a model's full weight names; runs before capture."""
    stems = {name.rpartition(".")[0] or name for name in names}
    known = sorted({*names, *stems})
    if missing := unmatched(_without_marks(patterns), known):
        raise PassError(
            "a pattern matches no weight of the model", got=repr(missing[0]), fix=similar(missing[0], known)
        )


def unmatched(patterns: Iterable[str], names: Collection[str]) -> list[str]:
    """The patterns that match none of the names, sorted."""
    return sorted(pattern for pattern in set(patterns) if not any(fnmatchcase(name, pattern) for name in names))


def similar(pattern: str, names: Sequence[str]) -> str:
    """Suggestions after a pattern that matches nothing: the closest pattern and a few known names."""
    head, dot, _ = pattern.rpartition(".")
    ends = {f"{head}.{name.rpartition('.')[2]}" for name in names} if dot and not WILDCARDS.isdisjoint(head) else ()
    near = difflib.get_close_matches(pattern, [*ends, *names], n=1, cutoff=0.5)
    guess = f"Did you mean {near[0]!r}? " if near and any(fnmatchcase(name, near[0]) for name in names) else ""
    shown = difflib.get_close_matches(pattern, names, n=EXAMPLES, cutoff=0) or ["none"]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{guess}Known: {', '.join(shown)}{more}."


def names_of(op: Op, graph: Graph) -> Iterator[str]:
    """All names of a matmul's constants, and of the weights that they derive from, with and without their last part."""
    ties = getattr(graph.weights, "ties", {})
    for _, value in op.operands():
        if graph.is_constant(value):
            for param in parameters_of(value):
                name = str(param.attrs["name"])
                for alias in (*ties.get(name, (name,)), *origins_of(graph, name)):
                    yield alias
                    yield alias.rpartition(".")[0] or alias


def _without_marks(patterns: Sequence[str]) -> set[str]:
    return {pattern.removeprefix("!") for pattern in patterns} - set(EVERYTHING)
