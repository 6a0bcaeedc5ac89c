"""Runs a pipeline over a graph: one stage a pass, verified, instrumented, and explained.

When a pass fails unexpectedly, or leaves an illegal graph behind, the text of the graph is kept in a file that the
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
    """No stage has that name."""


class Stages(Mapping[str, Graph]):
    """The graph as it was captured and after each pass, by name, in order. Structure only: the weights are not kept.

    A pass that runs a second time is called `name#2`.
    """

    def __init__(self) -> None:
        self._graphs: dict[str, Graph | Callable[[], Graph]] = {}

    def add(self, name: str, graph: Graph) -> None:
        """Keeps a copy of the structure of `graph`."""
        self._graphs[numbered(name, self._graphs)] = graph.clone(weights=False)

    def add_later(self, name: str, make: Callable[[], Graph]) -> None:
        """Keeps a function that makes the graph when somebody first asks for it."""
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
        """One line a stage with the number of its operations, which opens to the graph, as notebooks show it."""
        rows = (
            f"<details><summary><code>{escape(name)}</code>: {len(graph)} operations</summary>{graph._repr_html_()}"
            "</details>" for name, graph in self.items()
        )  # fmt: skip
        return "".join(rows)


@dataclass(frozen=True)
class Step:
    """One pass that has run.

    Attributes:
        stage: The name of the stage that it left.
        spec: The pass with its options, as text.
        effect: What it may do to the numbers: "exact", "reorders" or "lossy".
        changed: Whether it says that it changed the graph.
        seconds: How long it took, without the verifier and instruments.
    """

    stage: str
    spec: str
    effect: str
    changed: bool
    seconds: float


@dataclass(frozen=True)
class Run:
    """What came of a pipeline.

    Attributes:
        stages: The graph as captured and after each pass.
        steps: The passes, in order.
        skipped: Stage -> name of an operation -> why that pass left it alone; asked after the pass has run.
        reasons: Name of an operation -> why it was left alone, by the pass that knows best: the first that quantizes,
            or else the first that looked.
        remarks: Name of an operation -> what passes noted on it, one clause a pass.
    """

    stages: Stages
    steps: tuple[Step, ...]
    skipped: Mapping[str, Mapping[str, str]]
    reasons: Mapping[str, str]
    remarks: Mapping[str, str]


@dataclass
class _Record:
    """A run as far as it has come."""

    stages: Stages = field(default_factory=Stages)
    steps: list[Step] = field(default_factory=list)
    skipped: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def add(self, step: Pass, graph: Graph, outcome: Outcome) -> None:
        self.stages.add(step.name, graph)
        name = list(self.stages)[-1]
        self.steps.append(Step(name, str(step), step.effect.value, outcome.changed, outcome.seconds))
        reasons = _guarded(f"pass '{step}' failed while it was asked to explain", step, graph, step.explain)
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
    """Runs every pass over `graph`, in place.

    Args:
        pipeline: The passes.
        graph: Changed by the passes; verified before the first and after each.
        instruments: Called around each pass, in the given order.
        inputs: Real inputs of the graph, for the instruments that run it.

    Raises:
        PassError: A pass failed; the message names it.
        VerifyError: The graph is illegal, or a pass left an illegal one behind.
    """
    record = _Record()
    graph.verify()
    graph.remarks = {}  # what passes said that ran on their own is not of this run
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
        # What a pass raises on purpose need not name the pass.
        if f"pass '{step.name}" not in str(error):
            error.where = f"pass '{step}'" + (f", {error.where}" if error.where else "")
        raise
    return Outcome(bool(changed), time.perf_counter() - start)


def _guarded(problem: str, step: Pass, graph: Graph, function: Callable[[Graph], T]) -> T:
    """What `function` says of a graph; when it fails, as nothing should, the text of the graph is kept."""
    try:
        return function(graph)
    except QCompilerError:
        raise
    except Exception as error:
        what, kept = f"{type(error).__name__}: {error}", keep_text(graph, step.name)
        notes = [note.removeprefix("in ") for note in getattr(error, "__notes__", ())]  # rule and op, by `apply_rules`
        if _is_ours(type(step).__module__):
            fix = f"The graph that it was given is in {kept}; please report it with this message."
            raise PassError(f"{problem}: {what}", where="; ".join(notes) or None, fix=fix) from error
        notes += [f"{frame.filename}:{frame.lineno}" for frame in _last_frame_of_others(error)]
        fix = f"The graph that it was given is in {kept}."
        raise PassError(f"{problem}: {what}", where="; ".join(notes) or None, fix=fix) from error


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("qcompiler", "passes", "codegen")


def _last_frame_of_others(error: Exception) -> list[traceback.FrameSummary]:
    """The innermost frame of an error that is not in qcompiler's own code, such as a line of a user's rule."""
    frames = [
        (frame, number) for frame, number in traceback.walk_tb(error.__traceback__)
        if not _is_ours(str(frame.f_globals.get("__name__")))
    ]  # fmt: skip
    return list(traceback.StackSummary.extract(iter(frames[-1:]), lookup_lines=False))


def _verify(step: Pass, graph: Graph) -> None:
    try:
        graph.verify(after=step.name)
    except VerifyError as error:
        error.problem += f"\n  the graph that it left: {keep_text(graph, step.name)}"
        raise


def keep_text(graph: Graph, label: str) -> Path:
    """Writes the text of a graph to a new file in the temporary folder; its path."""
    prefix = f"qcompiler-{re.sub(r'[^A-Za-z0-9_-]', '_', label)}-"
    with tempfile.NamedTemporaryFile("w", prefix=prefix, suffix=".qir", delete=False, encoding="utf-8") as file:
        file.write(f"{graph}\n")
    return Path(file.name)
