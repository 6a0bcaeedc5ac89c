"""Runs a pipeline over a graph: one stage a pass, verified, instrumented, and explained.

An unexpected failure keeps the text of the graph that the pass was given, in a file that the message names.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompiler.errors import PassError, QCompilerError
from qcompiler.instruments import Instrument
from qcompiler.ir import Graph
from qcompiler.pass_manager import Pass, Pipeline


class Stages(Mapping[str, Graph]):
    """The graph as it was captured and after each pass, by name, in order. Structure only: the weights are not kept.

    A pass that runs a second time is called `name#2`.
    """

    def __init__(self) -> None:
        self._graphs: dict[str, Graph] = {}

    def add(self, name: str, graph: Graph) -> None:
        """Keeps a copy of the structure of `graph`."""
        count = 1 + sum(known.split("#")[0] == name for known in self._graphs)
        self._graphs[name if count == 1 else f"{name}#{count}"] = graph.clone(weights=False)

    def __getitem__(self, name: str) -> Graph:
        if name not in self._graphs:
            raise KeyError(f"no stage is called {name!r}; there are: {', '.join(self._graphs)}")
        return self._graphs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._graphs)

    def __len__(self) -> int:
        return len(self._graphs)

    def __repr__(self) -> str:
        return f"<Stages: {' -> '.join(self._graphs)}>"


@dataclass(frozen=True)
class Run:
    """What came of a pipeline: the stages, and for each operation that a pass left alone, why (name -> reason)."""

    stages: Stages
    reasons: Mapping[str, str]


def run_pipeline(
    pipeline: Pipeline, graph: Graph, *, instruments: Sequence[Instrument] = (), inputs: Sequence[Any] | None = None
) -> Run:
    """Runs every pass over `graph`, in place.

    Args:
        pipeline: The passes.
        graph: Changed by the passes; verified before the first and after each.
        instruments: Called around each pass.
        inputs: Real inputs of the graph, for the instruments that run it.

    Raises:
        PassError: A pass failed; the message names it.
        VerifyError: A pass left an illegal graph behind.
    """
    stages = Stages()
    reasons: dict[str, str] = {}
    graph.verify()
    stages.add("captured", graph)
    for instrument in instruments:
        instrument.begin(graph, inputs)
    for step in pipeline:
        for instrument in instruments:
            instrument.before(step, graph)
        changed = _run_pass(step, graph, stages)
        graph.verify(after=step.name)
        for instrument in instruments:
            instrument.after(step, graph, changed)
        stages.add(step.name, graph)
        reasons = {**step.explain(graph), **reasons}  # the first pass that looked knows best
    for instrument in instruments:
        instrument.end(graph)
    return Run(stages, reasons)


def _run_pass(step: Pass, graph: Graph, stages: Stages) -> bool:
    try:
        return step.run(graph)
    except QCompilerError as error:
        error.where = f"pass '{step}'" + (f", {error.where}" if error.where else "")
        raise
    except Exception as error:
        kept = keep_text(stages[list(stages)[-1]], step.name)
        raise PassError(
            f"pass '{step}' failed unexpectedly: {type(error).__name__}: {error}",
            fix=f"The graph that it was given is in {kept}; please report it together with this message.",
        ) from error


def keep_text(graph: Graph, label: str) -> Path:
    """Writes the text of a graph to a new file in the temporary folder; its path."""
    with tempfile.NamedTemporaryFile("w", prefix=f"qcompiler-{label}-", suffix=".qir", delete=False) as file:
        file.write(f"{graph}\n")
    return Path(file.name)
