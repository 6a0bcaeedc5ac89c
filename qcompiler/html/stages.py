"""The stages of a pipeline as data for the page: each distinct line once, each stage a list of line numbers.

    stages: captured [0, 1, 2, 3], fp8-tile [0, 1, 4, 5, 3]        ops: the lines with these numbers

Most passes change few lines, so a dozen stages take little more space than two.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from qcompiler.ir import Graph, Location, Op, TensorType, print_argument, print_op
from qcompiler.ir.graph import BUFFER, PARAM
from qcompiler.ir.printer import print_binding
from qcompiler.ir.structure import INPUT
from qcompiler.pass_manager.runner import Step


class Lines:
    """The distinct operations of all stages, in order of first appearance."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, Location], int] = {}
        self._places: dict[Location, int] = {}
        self.ops: list[dict[str, Any]] = []

    def of(self, graph: Graph) -> list[int]:
        """Returns the line numbers of a graph's operations, in order."""
        return [self._number(op) for op in graph]

    @property
    def places(self) -> list[list[str | int]]:
        """Returns file, line, module and pass of each location."""
        return [[loc.file, loc.line, loc.module, loc.made_by] for loc in self._places]

    def _number(self, op: Op) -> int:
        text = print_binding(op.result) if op.name == INPUT else print_op(op, locations=False)
        number = self._numbers.setdefault((text, op.loc), len(self.ops))
        if number == len(self.ops):
            self.ops.append(_described(op, text, self._places.setdefault(op.loc, len(self._places))))
        return number


def _described(op: Op, text: str, place: int) -> dict[str, Any]:
    """Returns one operation: its line, and the data that the page draws, links and lists."""
    found: dict[str, Any] = {"text": text, "name": op.name, "place": place}
    if op.results:
        found["results"] = [[value.name, str(value.type)] for value in op.results]
    if operands := [[".".join(map(str, path)), value.name] for path, value in op.operands()]:
        found["operands"] = operands
    if op.attrs:
        found["attrs"] = [[key, print_argument(op.attrs[key])] for key in sorted(op.attrs)]
    if op.name in (PARAM, BUFFER) and isinstance(kind := op.result.type, TensorType) and isinstance(kind.elements, int):
        found["bytes"] = kind.bytes
    return found


def describe_stages(
    stages: Mapping[str, Graph], steps: Iterable[Step], skipped: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Returns the page's data on the graphs.

    Args:
        stages: The graph after capture and after each pass.
        steps: The passes that ran; may be fewer than the stages if records were not kept.
        skipped: Stage -> name of a value -> why the pass skipped the operation that computes it.
    """
    lines, sentences, ran = Lines(), dict[str, int](), {step.stage: step for step in steps}
    rows = []
    for name, graph in stages.items():
        row: dict[str, Any] = {"name": name, "ops": lines.of(graph)}
        if (step := ran.get(name)) is not None:
            row |= {"spec": step.spec, "effect": step.effect, "changed": step.changed, "seconds": step.seconds}
        row["leftAlone"] = {
            value: sentences.setdefault(why, len(sentences)) for value, why in skipped.get(name, {}).items()
        }
        rows.append(row)
    return {"stages": rows, "ops": lines.ops, "places": lines.places, "sentences": list(sentences)}
