"""The history of one operation through all passes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from qcompiler.errors import InputError, did_you_mean
from qcompiler.ir import Graph, Op, print_op
from qcompiler.ir.graph import PARAM
from qcompiler.pass_manager.lineage import fused_into, values_of

Fate = Literal["absent", "appears", "same", "changed", "fused", "replaced", "removed"]


@dataclass(frozen=True)
class Chapter:
    """The effect of one stage on the operation.

    Attributes:
        stage: The name of the stage.
        fate: What happened to the operation.
        value: The name of the operation's result after the stage; empty if it does not exist.
        line: The operation's text after the stage.
        new: New operations of this stage that the operation, or its replacement, is computed from.
    """

    stage: str
    fate: Fate
    value: str = ""
    line: str = ""
    new: tuple[str, ...] = ()


def values_named(stages: Mapping[str, Graph], name: str) -> list[str]:
    """The values that `name` selects: one value, with or without `%`, or all values of a module of the model.

    Raises:
        InputError: No stage has this value or module.
    """
    name = name.removeprefix("%")
    known = set().union(*map(values_of, stages.values()))
    if name in known:
        return [name]
    computed = [op for op in next(iter(stages.values())).ops() if op.results and op.loc.module]
    if found := [op.results[0].name for op in computed if op.loc.module == name and op.name != PARAM]:
        return found
    known |= {op.loc.module for op in computed}
    raise InputError("no stage has this operation or module", got=name, fix=_nearest(name, known))


def history(stages: Mapping[str, Graph], name: str) -> list[Chapter]:
    """One chapter per stage for the value called `name`, which must be in at least one stage."""
    names = list(stages)
    chapters = [_first(stages[names[0]], names[0], name)]
    for before, after in pairwise(names):
        last = chapters[-1]
        if last.fate == "removed":
            break
        if last.fate == "absent":
            chapters.append(_first(stages[after], after, name, stages[before]))
        else:
            chapters.append(_next(stages[before], stages[after], after, last))
    return chapters


def _nearest(name: str, known: set[str]) -> str:
    guess = did_you_mean(name, known).partition(" Known")[0]
    return guess if guess.endswith("?") else "`qcompiler inspect PATH --stage captured` prints the names."


def _first(graph: Graph, stage: str, name: str, before: Graph | None = None) -> Chapter:
    if name not in values_of(graph):
        return Chapter(stage, "absent")
    op = graph[name].op
    return Chapter(
        stage, "appears", name, print_op(op), tuple(_made_for(before, graph, op)) if before is not None else ()
    )


def _next(before: Graph, after: Graph, stage: str, last: Chapter) -> Chapter:
    """The effect of the pass between two graphs on the value that `last` names."""
    alive = values_of(after)
    if last.value in alive:
        op = after[last.value].op
        if _bare(op) == _bare(before[last.value].op):
            return Chapter(stage, "same", last.value, print_op(op))
        return Chapter(stage, "changed", last.value, print_op(op), tuple(_made_for(before, after, op)))
    if fused := fused_into(before, alive, last.value):
        op = after[fused[-1]].op
        return Chapter(stage, "fused", fused[-1], print_op(op), tuple(_made_for(before, after, op)))
    for op in _in_place_of(before[last.value].op, before, after, stage):
        return Chapter(stage, "replaced", op.results[0].name, print_op(op), tuple(_made_for(before, after, op)))
    return Chapter(stage, "removed")


def _bare(op: Op) -> str:
    return print_op(op, locations=False)


def _made_for(before: Graph, after: Graph, op: Op) -> Iterator[str]:
    """The operations that are not in `before` and that `op` is computed from, in order."""
    old, found, waiting = values_of(before), set[Op](), [op]
    while waiting:
        for _, value in waiting.pop().operands():
            if value.name not in old and value.op.name != PARAM and value.op not in found:
                found.add(value.op)
                waiting.append(value.op)
    yield from (_bare(each) for each in after if each in found)


def _in_place_of(op: Op, before: Graph, after: Graph, stage: str) -> Iterator[Op]:
    """The operations that this stage created for the model location of `op`."""
    old, place, maker = values_of(before), (op.loc.file, op.loc.line, op.loc.module), stage.partition("#")[0]
    for new in after.ops():
        made_here = new.loc.made_by == maker and (new.loc.file, new.loc.line, new.loc.module) == place
        if made_here and any(place) and new.results and new.results[0].name not in old:
            yield new
