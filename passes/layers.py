"""Which matmuls a pass is for: patterns over the names of weights, of which the last one that matches counts.

    ["*", "!*.down_proj", "!lm_head"]     all but those
    ["*.down_proj"]                       only those

A pattern is a shell pattern. It is held against the name of each weight (`model.lm_head.weight`), against that name
without its last part (`model.lm_head`), and against the other names of a weight that is tied. An exclamation mark
takes away what earlier patterns have selected.
"""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from passes.candidates import MATMULS
from qcompiler.errors import PassError, did_you_mean
from qcompiler.ir import Graph, Missed, Op
from qcompiler.ir.dataflow import parameters_of

EVERYTHING = ("*",)


def why_not_selected(patterns: Sequence[str], op: Op, graph: Graph) -> Missed | None:
    """Why the patterns leave a matmul out; None when they select it."""
    if tuple(patterns) == EVERYTHING:
        return None
    names = set(names_of(op, graph))
    for pattern in reversed(patterns):
        if any(fnmatchcase(name, pattern.removeprefix("!")) for name in names):
            return Missed(f"the pattern '{pattern}' leaves it out") if pattern.startswith("!") else None
    return Missed(f"no pattern selects it: {', '.join(patterns)}")


def check_patterns(patterns: Sequence[str], graph: Graph) -> None:
    """PassError for a pattern that matches the name of no matmul's weight: it is spelled wrong, or out of date."""
    wanted = {pattern.removeprefix("!") for pattern in patterns} - set(EVERYTHING)
    if not wanted:
        return
    matmuls = [op for op in graph.ops() if op.name in MATMULS]
    names = sorted({name for op in matmuls for name in names_of(op, graph)})
    for pattern in sorted(wanted):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PassError("a pattern matches no matmul's weight", got=repr(pattern), fix=did_you_mean(pattern, names))


def names_of(op: Op, graph: Graph) -> Iterator[str]:
    """The names that the constant operands of a matmul go by, whole and without their last part."""
    ties = getattr(graph.weights, "ties", {})
    for _, value in op.operands():
        if graph.is_constant(value):
            for param in parameters_of(value):
                name = str(param.attrs["name"])
                for alias in ties.get(name, (name,)):
                    yield alias
                    yield alias.rpartition(".")[0] or alias
