"""Removes unused operations and frees unused weights.

    %unused = aten.relu(%x)   ->   (nothing)

Operations that write, communicate, check or draw random numbers are kept.
"""

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph, Role
from qcompiler.pass_manager.pipeline import Effect, Pass


@dataclass(frozen=True)
class DeadCode(Pass):
    """Operations without users and without effects  ->  nothing; their weights leave the store."""

    name: ClassVar[str] = "dead-code"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, graph: Graph) -> bool:
        """One sweep from the bottom: users are removed before their operands."""
        changed = False
        for op in reversed(graph.ops()):
            if not op.effects.ordered and not any(graph.uses(value) for value in op.results):
                graph.erase(op)
                changed = True
        read = {op.attrs["name"] for op in graph.ops() if op.role is Role.STATE}
        for name in [name for name in graph.weights if name not in read]:
            del graph.weights[name]
        return changed
