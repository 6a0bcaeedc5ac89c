"""Runs a pipeline on a graph: one stage per pass, verified, instrumented, and explained.

If a pass fails unexpectedly or produces an invalid graph, the text of the graph is saved to a file that the error
message names.
"""

import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from qcompiler.errors import PassError, QCompilerError, VerifyError, did_you_mean
from qcompiler.ir import Graph
from qcompiler.pass_manager.instruments import Instrument, Outcome
from qcompiler.pass_manager.pipeline import Effect, Pass, Pipeline, numbered

T = TypeVar("T")


class NoStage(PassError, KeyError):
    """There is no stage of this name."""


class Stages(Mapping[str, Graph]):
    """The graph as captured and after each pass, by name, in order. Weights are not kept.

    The second run of a pass is called `name#2`.
    """

    def __init__(self) -> None:
        self._graphs: dict[str, Graph | Callable[[], Graph]] = {}

    def add(self, name: str, graph: Graph) -> None:
        """Stores a copy of the structure of `graph`."""
        self._graphs[numbered(name, self._graphs)] = graph.clone(weights=False)

    def add_later(self, name: str, make: Callable[[], Graph]) -> None:
        """Stores a function that creates the graph on first access."""
        self._graphs[name] = make

    def __getitem__(self, name: str) -> Graph:
        if name not in self._graphs:
            guess = did_you_mean(str(name), self._graphs).partition(" Known")[0]
            fix = f"{guess} " if guess.endswith("?") else ""
            raise NoStage("no such stage", got=repr(name), fix=f"{fix}Known: {', '.join(self._graphs)}.")
        graph = self._graphs[name]
        if not isinstance(graph, Graph):
            graph = self._graphs[name] = graph()
        return graph

    def __iter__(self) -> Iterator[str]:
        return iter(self._graphs)

    def __len__(self) -> int:
        return len(self._graphs)

    def __repr__(self) -> str:
        return f"<Stages: {' -> '.join(self._graphs)}>"

    def _repr_html_(self) -> str:
        """One line per stage with its number of operations, which expands to the graph, for notebooks."""
        rows = (
            f"<details><summary><code>{escape(name)}</code>: {len(graph)} operations</summary>{graph._repr_html_()}"
            "</details>"
            for name, graph in self.items()
        )
        return "".join(rows)


@dataclass(frozen=True)
class Step:
    """One pass of a run.

    Attributes:
        stage: The name of the resulting stage.
        spec: The pass with its options, as text.
        effect: How the pass may change numerical results: "exact", "reorders" or "lossy".
        changed: Whether the pass reported a change.
        seconds: Run time, without the verifier and instruments.
    """

    stage: str
    spec: str
    effect: str
    changed: bool
    seconds: float


@dataclass(frozen=True)
class Run:
    """The result of a pipeline run.

    Attributes:
        stages: The graph as captured and after each pass.
        steps: The passes, in order.
        skipped: Stage -> operation name -> why the pass skipped it, determined after the pass.
        reasons: Operation name -> why it was skipped, from the first quantizing pass, or else the first pass, that
            gives a reason.
        remarks: Operation name -> remarks of passes, one clause per pass.
    """

    stages: Stages
    steps: tuple[Step, ...]
    skipped: Mapping[str, Mapping[str, str]]
    reasons: Mapping[str, str]
    remarks: Mapping[str, str]


@dataclass
class _Record:
    """A run in progress."""

    stages: Stages = field(default_factory=Stages)
    steps: list[Step] = field(default_factory=list)
    skipped: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def add(self, step: Pass, graph: Graph, outcome: Outcome) -> None:
        self.stages.add(step.name, graph)
        name = list(self.stages)[-1]
        self.steps.append(Step(name, str(step), step.effect.value, outcome.changed, outcome.seconds))
        reasons = _guarded(f"pass '{step}' failed in explain()", step, graph, step.explain)
        self.skipped[name] = reasons

    def finish(self, pipeline: Pipeline, remarks: Mapping[str, str]) -> Run:
        effects = [step.effect for step in pipeline]
        order = sorted(zip(effects, self.skipped.values(), strict=True), key=lambda pair: pair[0] is not Effect.LOSSY)
        reasons: dict[str, str] = {}
        for _, more in order:
            reasons = {**more, **reasons}
        return Run(self.stages, tuple(self.steps), self.skipped, reasons, remarks)


def run_pipeline(
    pipeline: Pipeline, graph: Graph, *, instruments: Sequence[Instrument] = (), inputs: Sequence[Any] | None = None
) -> Run:
    """Runs all passes on `graph`, in place.

    Args:
        pipeline: The passes.
        graph: Changed by the passes; verified before the first pass and after each pass.
        instruments: Called around each pass, in the given order.
        inputs: Real inputs of the graph, for instruments that run it.

    Raises:
        PassError: A pass failed; the message names it.
        VerifyError: The graph is invalid, or a pass produced an invalid graph.
    """
    record = _Record()
    graph.verify()
    graph.remarks = {}  # discard remarks from standalone runs
    record.stages.add("captured", graph)
    for instrument in instruments:
        instrument.begin(graph, inputs)
    for step in pipeline:
        for instrument in instruments:
            instrument.before(step, graph)
        outcome = _run_pass(step, graph, record.stages)
        _verify(step, graph)
        for instrument in instruments:
            instrument.after(step, graph, outcome)
        record.add(step, graph, outcome)
    for instrument in instruments:
        instrument.end(graph)
    remarks, graph.remarks = graph.remarks, {}
    return record.finish(pipeline, remarks)


def _run_pass(step: Pass, graph: Graph, stages: Stages) -> Outcome:
    before = stages[list(stages)[-1]]
    start = time.perf_counter()
    try:
        changed = _guarded(f"pass '{step}' failed", step, before, lambda _: step.run(graph))
    except QCompilerError as error:
        # Errors that a pass raises may not name the pass.
        if f"pass '{step.name}" not in str(error):
            error.where = f"pass '{step}'" + (f", {error.where}" if error.where else "")
        raise
    return Outcome(bool(changed), time.perf_counter() - start)


def _guarded(problem: str, step: Pass, graph: Graph, function: Callable[[Graph], T]) -> T:
    """Calls `function` on a graph; if it fails unexpectedly, saves the text of the graph."""
    try:
        return function(graph)
    except QCompilerError:
        raise
    except Exception as error:
        what, kept = f"{type(error).__name__}: {error}", keep_text(graph, step.name)
        notes = [note.removeprefix("in ") for note in getattr(error, "__notes__", ())]  # rule and op, by `apply_rules`
        if _is_ours(type(step).__module__):
            fix = f"The input graph is in {kept}; please report it with this message."
            raise PassError(f"{problem}: {what}", where="; ".join(notes) or None, fix=fix) from error
        notes += [f"{frame.filename}:{frame.lineno}" for frame in _last_frame_of_others(error)]
        fix = f"The input graph is in {kept}."
        raise PassError(f"{problem}: {what}", where="; ".join(notes) or None, fix=fix) from error


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("qcompiler", "passes", "codegen")


def _last_frame_of_others(error: Exception) -> list[traceback.FrameSummary]:
    """The innermost frame of an error outside qcompiler, such as a line of a user's rule."""
    frames = [
        (frame, number)
        for frame, number in traceback.walk_tb(error.__traceback__)
        if not _is_ours(str(frame.f_globals.get("__name__")))
    ]
    return list(traceback.StackSummary.extract(iter(frames[-1:]), lookup_lines=False))


def _verify(step: Pass, graph: Graph) -> None:
    try:
        graph.verify(after=step.name)
    except VerifyError as error:
        error.problem += f"\n  the resulting graph: {keep_text(graph, step.name)}"
        raise


def keep_text(graph: Graph, label: str) -> Path:
    """Writes the text of a graph to a new file in the temporary folder; returns the path."""
    prefix = f"qcompiler-{re.sub(r'[^A-Za-z0-9_-]', '_', label)}-"
    with tempfile.NamedTemporaryFile("w", prefix=prefix, suffix=".qir", delete=False, encoding="utf-8") as file:
        file.write(f"{graph}\n")
    return Path(file.name)
