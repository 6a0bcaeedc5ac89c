"""Each case in tests/passes/golden/*.qir (one file per pass): a pipeline, a graph, and the exact resulting graph.

    // ----- a copy of an intermediate value is removed
    // RUN: canonicalize
    // EQUAL BITS                  optional; or // NO NUMBERS: why the graph cannot run
    func @m(...) ...
    // BECOMES                     or // UNCHANGED, without a second graph
    // MISSED: %y: why a rule did not match
    func @m(...) ...               unchanged lines are only counted

`QCOMPILER_UPDATE=1 pytest tests/passes/test_golden.py` rewrites everything from the line `// BECOMES` or `// UNCHANGED`
on; a new case may leave that part out. A person reads the diff.

Each case also runs on random numbers: each pass must keep its declared effect, or equal bits if the case says so; the
result survives a round-trip through text; and running the last pass again changes nothing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import pytest
import torch

import qcompiler.schemes  # noqa: F401  (makes the passes known)
from qcompiler import knobs
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.pass_manager.instruments import CheckChanged, Validate
from qcompiler.pass_manager.pipeline import PASSES, Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.testing import random_inputs, verified

FOLDER = Path(__file__).parent / "golden"
BECOMES, UNCHANGED, MISSED = "// BECOMES", "// UNCHANGED", "// MISSED: "
EQUAL, NO_NUMBERS = "// EQUAL BITS\n", "// NO NUMBERS: "
HEAD = r"// ----- (?P<name>[^\n]+)\n// RUN: (?P<run>[^\n]+)\n"
CASE = re.compile(HEAD + r"(?P<graph>.*?\n\}\n)(?P<expected>// (?:BECOMES|UNCHANGED)\n.*)?", re.S)


@dataclass(frozen=True)
class Case:
    name: str
    pipeline: str
    graph: str
    expected: str

    @classmethod
    def parse(cls, text: str) -> "Case":
        found = CASE.fullmatch(text)
        assert found, f"a case begins with '// ----- <name>' and '// RUN: <pipeline>', not with {text[:99]!r}"
        return cls(found["name"], found["run"], found["graph"], found["expected"] or "")

    def rerun(self) -> "Case":
        """The case with its current output."""
        graph = Graph.parse(self.graph)
        before = str(graph)
        done = run_pipeline(Pipeline.parse(self.pipeline), graph, instruments=[CheckChanged()])
        reasons = [f"{MISSED}%{name}: {why}" for name, why in done.reasons.items()]
        lines = [UNCHANGED, *reasons] if str(graph) == before else [BECOMES, *reasons, *changed(before, str(graph))]
        return Case(self.name, self.pipeline, self.graph, "\n".join([*lines, ""]))

    def __str__(self) -> str:
        return f"// ----- {self.name}\n// RUN: {self.pipeline}\n{self.graph}{self.expected}"


def changed(before: str, after: str) -> Iterator[str]:
    """The lines of a graph; replaces three or more consecutive lines of the input graph by their count."""
    old, new = before.splitlines(), after.splitlines()
    for tag, _, _, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal" and end - start > 2:
            yield f"  // ... {end - start} unchanged lines"
        else:
            yield from new[start:end]


def cases(path: Path) -> list[Case]:
    """The cases in a file."""
    texts = re.split(r"^(?=// -----)", path.read_text(encoding="utf-8"), flags=re.M)[1:]
    return [Case.parse(text.rstrip("\n") + "\n") for text in texts]


FILES = {path: cases(path) for path in sorted(FOLDER.glob("*.qir"))}
CASES = [pytest.param(case, id=f"{path.stem}: {case.name}") for path, each in FILES.items() for case in each]


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_golden(path: Path) -> None:
    today = [case.rerun() for case in FILES[path]]
    if knobs.current().update:
        path.write_text("\n".join(map(str, today)), encoding="utf-8")
    for case, golden in zip(today, FILES[path], strict=True):
        assert knobs.current().update or str(case) == str(golden)


@pytest.mark.parametrize("case", CASES)
def test_numbers_text_and_a_second_run(case: Case) -> None:
    graph, pipeline = Graph.parse(case.graph), Pipeline.parse(case.pipeline)
    if NO_NUMBERS in case.graph:
        run_pipeline(pipeline, graph)
    else:
        inputs, graph.weights = random_inputs(graph, 3)
        before = interpret(graph, inputs) if EQUAL in case.graph else ()
        run_pipeline(pipeline, graph, instruments=[Validate()], inputs=inputs)
    verified(graph)
    if EQUAL in case.graph:
        for old, new in zip(before, interpret(graph, inputs), strict=True):
            assert old.dtype is new.dtype and torch.equal(old.float(), new.float())
    *_, last = pipeline
    assert not last.run(graph)


def test_each_of_our_passes_has_a_golden_text() -> None:
    shown = {step.name for each in FILES.values() for case in each for step in Pipeline.parse(case.pipeline)}
    ours = {name for name, kind in PASSES.items() if kind.__module__.split(".")[0] == "passes"}
    assert ours <= shown
