"""`qcompiler inspect` on graphs as text: the stages, their differences, and the history of one operation."""

import json
from pathlib import Path
from typing import Any

import pytest

from qcompiler.cli import main
from qcompiler.ir import Graph
from qcompiler.pass_manager.history import history
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.schemes.named import pipeline

TEXT = """func @m(%x: f32[s0, 256]) -> (f32[s0, 64]) where s0 in 1.. {
  %w = core.param() {name = "w"} : f32[256, 64]
  %b = core.param() {name = "b"} : f32[64]
  %g = core.param() {name = "g"} : f32[256]
  %n = aten.rms_norm(%x, [256], %g) : f32[s0, 256]
  %y = aten.matmul(%n, %w) : f32[s0, 64] loc("m.py":3)
  %z = aten.relu(%y) : f32[s0, 64] loc("m.py":4)
  return %z
}
"""
STAGES = ["captured", "canonicalize", "attention", "dead-code", "merge-linears", "fp8-tile", "share-quantize",
          "fuse-linear", "fold-constants", "dead-code#2", "to-kernels", "gather-codes", "fuse-norm-quantize",
          "fuse-activation-quantize", "fuse-epilogue"]  # fmt: skip


@pytest.fixture
def dump(tmp_path: Path) -> str:
    """A folder of dumped graphs."""
    (tmp_path / "graph.qir").write_text(TEXT)
    folder = str(tmp_path / "dump")
    asked = ["--scheme", "fp8_tile", "--dump", folder, "-o", str(tmp_path / "out.qir")]
    assert main(["opt", *asked, str(tmp_path / "graph.qir")]) == 0
    return folder


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["inspect", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_stages_of_a_dump(dump: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, dump)
    assert [stage["stage"] for stage in found["stages"]] == STAGES
    assert found["report"] is None
    by_name = {stage["stage"]: stage for stage in found["stages"]}
    assert by_name["captured"]["by_dialect"] == {"aten": 3, "core": 3} and by_name["captured"]["more"] is None
    assert by_name["dead-code"]["more"] == -1
    assert by_name["to-kernels"]["by_dialect"]["kernel"] == 2
    assert by_name["fp8-tile"]["pass"] is None and by_name["fp8-tile"]["seconds"] is None


def test_the_table_has_a_line_a_stage(dump: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", dump]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "operations", "+/-", "aten", "quant", "kernel"]
    assert [line.split()[0] for line in lines[2:]] == STAGES
    assert lines[2 + STAGES.index("fp8-tile")].split() == ["fp8-tile", "10", "+4", "4", "4"]


def test_a_stage_is_a_text_that_parses(dump: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", dump, "--stage", "captured"]) == 0
    assert capsys.readouterr().out == TEXT
    assert main(["inspect", dump, "--stage", "fp8-tile", "--no-locations"]) == 0
    text = capsys.readouterr().out
    assert len(Graph.parse(text).ops("quant.quantize")) == 2 and "loc(" not in text
    assert Graph.parse(document(capsys, dump, "--stage", "captured")["graph"]).name == "m"
    assert main(["inspect", dump, "--stage", "captured", "--dot"]) == 0
    assert capsys.readouterr().out == f"{Graph.parse(TEXT).to_dot()}\n"


def test_two_stages_differ(dump: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", dump, "--diff", "captured", "canonicalize"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "-  %y = aten.matmul(%n, %w) : f32[s0, 64]" in out and "+  %w_t = aten.t(%w) : f32[64, 256]" in out
    assert main(["inspect", dump, "--diff", "fp8-tile", "share-quantize"]) == 0
    assert capsys.readouterr() == ("", "fp8-tile and share-quantize are identical\n")


def test_a_narrow_terminal_has_fewer_columns(
    dump: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qcompiler.cli.output.WIDTH", 45)
    assert main(["inspect", dump]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "operations", "+/-"]
    assert [line.split()[0] for line in lines[2:]] == STAGES and max(map(len, lines)) <= 45


# One operation


def fates(stages: Any, name: str) -> dict[str, str]:
    return {chapter.stage: chapter.fate for chapter in history(stages, name) if chapter.fate != "same"}


@pytest.fixture(scope="module")
def stages() -> Any:
    return run_pipeline(pipeline("fp8_tile"), Graph.parse(TEXT)).stages


def test_an_operation_is_followed_into_what_it_is_fused_with(stages: Any) -> None:
    chapters = {chapter.stage: chapter for chapter in history(stages, "y")}
    assert fates(stages, "y") == {
        "captured": "appears", "canonicalize": "changed", "fp8-tile": "changed", "fuse-linear": "changed",
        "fold-constants": "changed", "to-kernels": "changed", "fuse-epilogue": "fused",
    }  # fmt: skip
    assert chapters["canonicalize"].new == ("%w_t = aten.t(%w) : f32[64, 256]",)
    made = [line.partition(" = ")[2].partition("(")[0] for line in chapters["fp8-tile"].new]
    assert made == ["quant.quantize", "quant.dequantize", "quant.quantize", "quant.dequantize"]
    assert chapters["fuse-epilogue"].value == "z"
    assert chapters["fuse-epilogue"].line.startswith("%z = kernel.fused_linear(%n_q, %n_s, %w_q, %w_s) {expression =")


def test_an_operation_that_nobody_reads_is_removed(stages: Any) -> None:
    assert fates(stages, "b") == {"captured": "appears", "dead-code": "removed"}
    assert [chapter.stage for chapter in history(stages, "b")] == STAGES[:4]


def test_an_operation_that_a_pass_makes_appears(stages: Any) -> None:
    chapters = history(stages, "w_t")
    assert [chapter.fate for chapter in chapters[:2]] == ["absent", "appears"]
    assert 'by "canonicalize"' in chapters[1].line


def test_an_operation_in_whose_place_another_stands() -> None:
    """By the location, which names the pass that made it."""
    text = """func @m(%x: f32[4]) -> (f32[4]) {
      %a = aten.abs(%x) : f32[4] loc("m.py":1)
      %b = aten.add.Tensor(%a, %a) : f32[4]
      %c = aten.mul.Tensor(%a, %b) : f32[4]
      return %c
    }"""
    other = text.replace("%a", "%k").replace("aten.abs", "aten.relu").replace('"m.py":1', '"m.py":1 by "my-pass"')
    before, after = Graph.parse(text), Graph.parse(other)
    _, chapter = history({"captured": before, "my-pass": after}, "a")
    assert (chapter.fate, chapter.value) == ("replaced", "k")


def test_the_history_as_text(dump: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", dump, "--op", "%b"]) == 0
    assert capsys.readouterr().out == (
        "captured      appears\n"
        '                %b = core.param() {name = "b"} : f32[64]\n'
        "canonicalize  unchanged\n"
        "attention     unchanged\n"
        "dead-code     removed: it has no users\n"
    )
    found = document(capsys, dump, "--op", "y")
    assert found["operation"] == "y" and found["stages"][-1]["fate"] == "fused"


def test_a_module_stands_for_what_it_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """func @m(%x: f32[4]) -> (f32[4]) {
      %w = core.param() {name = "layer.0.w"} : f32[4] loc(in "layer.0")
      %a = aten.abs(%x) : f32[4] loc("m.py":1 in "layer.0")
      %b = aten.add.Tensor(%a, %w) : f32[4] loc("m.py":2 in "layer.0")
      %c = aten.neg(%b) : f32[4] loc("m.py":3 in "layer.1")
      return %c
    }"""
    file = tmp_path / "graph.qir"
    file.write_text(text)
    assert main(["inspect", str(file), "--op", "layer.0"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("appears") == 2 and shown.startswith("%a\n") and "\n\n%b\n" in shown and "%c" not in shown
    found = document(capsys, str(file), "--op", "layer.0")
    assert found["module"] == "layer.0" and [each["operation"] for each in found["operations"]] == ["a", "b"]
    (only,) = document(capsys, str(file), "--op", "layer.1")["operations"]
    assert only["operation"] == "c" and only["stages"][0]["fate"] == "appears"
    assert main(["inspect", str(file), "--op", "layer.2"]) == 1
    assert "Did you mean 'layer." in capsys.readouterr().err


# What is wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--stage", "fp8-tyle"],
            "error: no such stage: got 'fp8-tyle'. Did you mean 'fp8-tile'? Known: attention, canonicalize, ",
        ),
        (["--diff", "captured", "x"], "error: no such stage: got 'x'. Known: "),
        (["--op", "w_tt"], "error: no stage has this operation or module: got w_tt. Did you mean 'w_t'?\n"),
        (
            ["--op", "nothing_alike"],
            "error: no stage has this operation or module: got nothing_alike. `qcompiler inspect PATH",
        ),
        (["--dot"], "error: the option needs a graph to print: got --dot; need --stage NAME as well\n"),
        (["--op", "b", "--no-locations"], "error: the option needs a graph to print: got --no-locations;"),
        (["--source"], "error: bare graphs have no host module: got "),
    ],
)
def test_what_is_not_there(arguments: list[str], message: str, dump: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", dump, *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message)


def test_a_single_file_and_a_folder_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "graph.qir").write_text(TEXT)
    assert [stage["stage"] for stage in document(capsys, str(tmp_path / "graph.qir"))["stages"]] == ["graph"]
    assert main(["inspect", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: the folder has nothing to inspect: got ")
    assert main(["inspect", "nowhere"]) == 1
    assert capsys.readouterr().err == (
        "error: there is nothing to inspect: got nowhere; need an artefact, a folder of dumped graphs, or a .qir file\n"
    )
