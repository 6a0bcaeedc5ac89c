"""Every tests/golden/*.qir: a pipeline, a graph, and the graph that it becomes, compared to the letter.

`QCOMPILER_UPDATE=1 pytest tests/test_golden.py` rewrites what is behind the line "becomes"; a person reads the diff.
"""

from pathlib import Path

import pytest

import qcompiler.schemes.named  # noqa: F401  (makes the passes known)
from qcompiler import knobs
from qcompiler.ir import Graph
from qcompiler.pass_manager.instruments import CheckChanged
from qcompiler.pass_manager.pipeline import PASSES, Pipeline
from qcompiler.pass_manager.runner import run_pipeline

FOLDER = Path(__file__).parent / "golden"
FILES = sorted(FOLDER.glob("*.qir"))
RUN, EXPLAIN, BECOMES = "// RUN: ", "// LEFT ALONE: ", "// ----- becomes -----\n"


def rerun(golden: str) -> str:
    """The file as it should be today."""
    head, _, _ = golden.partition(BECOMES)
    first, rest = head.split("\n", 1)
    assert first.startswith(RUN), f"a golden file starts with '{RUN}<pipeline>', not with {first!r}"
    source = "\n".join(line for line in rest.splitlines() if not line.startswith(EXPLAIN))
    graph = Graph.parse(source)
    done = run_pipeline(Pipeline.parse(first.removeprefix(RUN)), graph, instruments=[CheckChanged()])
    reasons = [f"{EXPLAIN}%{name}: {why}" for name, why in done.reasons.items()]
    return "\n".join([first, source.rstrip("\n"), BECOMES.rstrip("\n"), *reasons, str(graph), ""])


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_golden(path: Path) -> None:
    golden = path.read_text(encoding="utf-8")
    today = rerun(golden)
    if knobs.current().update:
        path.write_text(today, encoding="utf-8")
    else:
        assert today == golden


def test_every_pass_of_ours_has_a_golden_text() -> None:
    shown = {
        step.name for path in FILES for step in Pipeline.parse(path.read_text().split("\n", 1)[0].removeprefix(RUN))
    }
    ours = {name for name, kind in PASSES.items() if kind.__module__.split(".")[0] == "passes"}
    assert ours <= shown
