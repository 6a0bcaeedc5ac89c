"""Running a pipeline: stages, reasons, and the files written after a failure."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from passes.cleanup.canonicalize import Canonicalize
from qcompiler.errors import PassError, QCompilerError, VerifyError
from qcompiler.ir import Graph, Match, Missed, Op, Rewriter, Rule
from qcompiler.pass_manager.pipeline import Pass, Pipeline
from qcompiler.pass_manager.runner import Stages, run_pipeline

TEXT = """func @m(%x: f32[4, 8]) -> (f32[4, 8]) {
  %w = core.param() {name = "w"} : f32[8, 8]
  %k = core.param() {name = "k"} : f32[2, 8, 8]
  %y = aten.mm(%x, %w) : f32[4, 8] loc("m.py":3)
  %z = aten.mm(%y, %x) : f32[4, 8]
  %u = aten.matmul(%y, %k) : f32[2, 4, 8]
  return %y
}"""


@dataclass(frozen=True)
class Fails(Pass):
    """graph  ->  an error"""

    name: ClassVar[str] = "test-fails"

    how: str = "unexpectedly"

    def run(self, graph: Graph) -> bool:
        if self.how == "on-purpose":
            raise QCompilerError("this graph is not to my taste", got="mm", where="%y")
        if self.how == "illegally":
            graph["y"].name = "two words"
            return True
        raise ZeroDivisionError("oops")

    def explain(self, graph: Graph) -> dict[str, str]:
        return {}


@dataclass(frozen=True)
class Mute(Pass):
    """graph  ->  graph, without an answer"""

    name: ClassVar[str] = "test-mute"

    def run(self, graph: Graph) -> bool:
        return None  # type: ignore[return-value]  # what a forgetful author writes

    def explain(self, graph: Graph) -> dict[str, str]:
        raise KeyError("w")


@dataclass(frozen=True)
class Insert(Rule):
    """mm  ->  an error: attributes are given to `insert` as it takes none"""

    root: ClassVar[tuple[str, ...]] = ("aten.mm",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        return {}

    def rewrite(self, op: Op, rewriter: Rewriter, **_: object) -> None:
        rewriter.insert("aten.gelu", op.args[0], approximate="tanh")  # type: ignore[call-arg]


@dataclass(frozen=True)
class Clumsy(Pass):
    """graph  ->  an error from a rule"""

    name: ClassVar[str] = "test-clumsy"

    def rules(self) -> tuple[Rule, ...]:
        return (Insert(),)


def test_stages_and_reasons() -> None:
    graph = Graph.parse(TEXT)
    run = run_pipeline(Pipeline.parse("canonicalize; fp8-tile; dead-code; dead-code"), graph)
    assert list(run.stages) == ["captured", "canonicalize", "fp8-tile", "dead-code", "dead-code#2"]
    assert str(run.stages["captured"]) == TEXT
    assert str(run.stages["dead-code#2"]) == str(graph)
    assert run.skipped["canonicalize"] == {
        "z": "its right operand is computed from the inputs (%x)",
        "u": "its right operand has 3 dimensions, not 2 (%k)",
    }
    assert run.reasons["u"] == "it multiplies by a batch of matrices (a weight of 3 dimensions) (%k)"
    assert run.reasons["z"] == "both of its operands are computed from the inputs"
    assert repr(run.stages) == "<Stages: captured -> canonicalize -> fp8-tile -> dead-code -> dead-code#2>"


def test_stages_are_a_mapping_with_a_helpful_error() -> None:
    stages = Stages()
    stages.add("fp8-tile", Graph())
    assert "fp8-tyle" not in stages
    assert stages.get("fp8-tyle") is None
    with pytest.raises(KeyError) as error:
        stages["fp8-tyle"]
    assert isinstance(error.value, QCompilerError)
    assert str(error.value) == "no such stage: got 'fp8-tyle'. Did you mean 'fp8-tile'? Known: fp8-tile."


def test_notebooks_show_stages_that_open_to_their_graph() -> None:
    stages = run_pipeline(Pipeline.parse("canonicalize; dead-code"), Graph.parse(TEXT)).stages
    shown = stages._repr_html_()
    assert shown.count("<details>") == len(stages) == 3
    assert "<code>dead-code</code>" in shown and "%y = aten.linear(%x, %w_t) : f32[4, 8]\n" in shown
    assert "loc(" not in shown and "(f32[4, 8]) {" in shown and "-&gt; (" in shown


def test_an_unexpected_failure_keeps_the_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(PassError) as error:
        run_pipeline(Pipeline((*Pipeline.parse("canonicalize"), Fails())), graph := Graph.parse(TEXT))
    (kept,) = tmp_path.iterdir()
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if '("oops")' in text)
    assert str(error.value) == (
        f"pass 'test-fails' failed: ZeroDivisionError: oops (in {__file__}:{line}). The input graph is in {kept}."
    )
    assert kept.read_text() == f"{graph}\n"
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_failing_rule_of_a_user_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(PassError) as error:
        run_pipeline(Pipeline((Clumsy(),)), Graph.parse(TEXT))
    (kept,) = tmp_path.iterdir()
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "approximate=" in text)
    assert str(error.value) == (
        "pass 'test-clumsy' failed: TypeError: Rewriter.insert() got an unexpected keyword argument 'approximate' (in "
        f'rule Insert, at aten.mm loc("m.py":3); {__file__}:{line}). The input graph is in {kept}.'
    )


def test_a_failure_of_a_pass_of_qcompiler_is_to_be_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Canonicalize, "run", lambda self, graph: 1 // 0)
    with pytest.raises(PassError, match=r"pass 'canonicalize' failed: ZeroDivisionError: .* please report it with"):
        run_pipeline(Pipeline.parse("canonicalize"), Graph.parse(TEXT))


def test_an_error_raised_on_purpose_names_the_pass() -> None:
    with pytest.raises(QCompilerError) as error:
        run_pipeline(Pipeline((Fails("on-purpose"),)), Graph.parse(TEXT))
    assert str(error.value) == "this graph is not to my taste: got mm (in pass 'test-fails{how=on-purpose}', %y)"


def test_an_illegal_graph_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(VerifyError) as error:
        run_pipeline(Pipeline((Fails("illegally"),)), Graph.parse(TEXT))
    (kept,) = tmp_path.iterdir()
    assert str(error.value).startswith("after pass 'test-fails', in @m: rule V1: ")
    assert str(error.value).endswith(f"\n  the resulting graph: {kept}")
    assert "%two words = " in kept.read_text()


def test_a_failing_explain_is_a_failing_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(PassError, match=r"^pass 'test-mute' failed in explain\(\): KeyError"):
        run_pipeline(Pipeline((Mute(),)), Graph.parse(TEXT))


def test_a_graph_that_is_illegal_from_the_start() -> None:
    graph = Graph.parse(TEXT)
    graph["y"].name = "two words"
    with pytest.raises(VerifyError, match=r"^in @m: rule V1"):
        run_pipeline(Pipeline(), graph)


def test_rewriting_without_end_names_the_pass_once() -> None:
    class Again(Rule):
        """mm(x, w)  ->  mm(x, w)"""

        root = ("aten.mm",)

        def match(self, op: Op, graph: Graph) -> Match | Missed:
            return {}

        def rewrite(self, op: Op, rewriter: Rewriter, **_: object) -> None:
            rewriter.replace(op, rewriter.insert(op.name, *op.args, types=[op.result.type]).result)

    class Endless(Canonicalize):
        """Never ends."""

        def rules(self) -> list[Rule]:
            return [Again()]

    with pytest.raises(PassError) as error:
        run_pipeline(Pipeline((Endless(),)), Graph.parse(TEXT))
    assert str(error.value) == (
        "rewriting does not terminate: after 100 sweeps, Again still matches (in pass 'canonicalize')"
    )
