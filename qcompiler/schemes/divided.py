"""Whether the tactics of a sharding have divided anything: a note for one that has not, an error if none has.

"tp; ep", mixture of experts whose heads do not divide     note: tactic 'tp' divides nothing: %y: 16 elements along …
"tp", the same model                                       PassError: nothing can be sharded
"""

from collections.abc import Iterator, Mapping, Sequence

from passes.sharding.on_mesh import AlongAxis
from passes.sharding.partition import Partition
from qcompiler.errors import PassError
from qcompiler.ir import Graph, Mesh
from qcompiler.pass_manager.instruments import Instrument, Outcome
from qcompiler.pass_manager.pipeline import Pass


class Divided(Instrument):
    """Raises PassError after the last tactic if none of them has divided anything.

    Args:
        mesh: The mesh.
        tactics: Each tactic, as text -> its passes, of which the last one divides.
    """

    def __init__(self, mesh: Mesh, tactics: Mapping[str, Sequence[AlongAxis]]) -> None:
        self.mesh = mesh
        self.tactics = {text: steps for text, steps in tactics.items() if steps[-1].ranks > 1}
        self.reasons: dict[str, dict[str, str]] = {text: {} for text in tactics}
        self.idle: dict[str, list[str]] = {}

    def after(self, step: Pass, graph: Graph, outcome: Outcome) -> None:
        """Keeps why a tactic has divided nothing; raises PassError before the program of one rank is made."""
        for text, steps in self.tactics.items():
            if isinstance(step, AlongAxis) and step in steps and not outcome.changed:
                more = {why.partition(" (%")[0]: f"%{name}: {why}" for name, why in step.explain(graph).items()}
                self.reasons[text] |= more
                if step == steps[-1]:
                    self.idle[text] = [*self.reasons[text].values()] or [step.absent]
        if isinstance(step, Partition) and self.tactics and len(self.idle) == len(self.tactics):
            reasons = (f"Tactic '{text}':\n" + "\n".join(lines) for text, lines in self.idle.items())
            raise PassError("nothing can be sharded", got=f"the mesh {self.mesh}", fix="\n".join(reasons))

    def notes(self) -> Iterator[str]:
        """A sentence about each tactic that has divided nothing, with its first reason."""
        for text, (first, *others) in self.idle.items():
            more = f", and {len(others)} other reason{'s' * (len(others) > 1)}" if others else ""
            yield f"tactic '{text}' divides nothing: {first}{more}"
