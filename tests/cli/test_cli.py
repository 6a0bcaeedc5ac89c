"""The command line: text in, text out; questions and errors go to standard error."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler.cli import main
from qcompiler.ir import Graph
from qcompiler.schemes.named import SCHEMES, pipeline

TEXT = """func @m(%x: f32[s0, 256]) -> (f32[s0, 64]) where s0 in 1.. {
  %w = core.param() {name = "w"} : f32[256, 64]
  %g = core.param() {name = "g"} : f32[256]
  %n = aten.rms_norm(%x, [256], %g) : f32[s0, 256]
  %y = aten.matmul(%n, %w) : f32[s0, 64] loc("m.py":3)
  return %y
}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "graph.qir"
    path.write_text(TEXT)
    return str(path)


def test_opt(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", "--pipeline", "canonicalize; fp8-tile", "--verify-each", file]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    graph = Graph.parse(out)
    assert f"{graph}\n" == out
    assert len(graph.ops("quant.quantize")) == 2


def test_opt_without_passes_gives_the_text_back(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", "-p", "", file]) == 0
    assert capsys.readouterr().out == TEXT


def test_opt_tells_what_it_is_asked(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, dump = tmp_path / "out.qir", tmp_path / "dump"
    asked = [
        "--print-after",
        "all",
        "--time-passes",
        "--explain",
        "--no-locations",
        "--dump",
        str(dump),
        "-o",
        str(target),
    ]
    assert main(["opt", "--scheme", "fp8_tile", *asked, file]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    passes = len(pipeline("fp8_tile").passes)
    assert err.count("// ----- after ") == passes
    assert "ms  changed  fp8-tile\n" in err
    assert "\nfp8-tile skipped %n: the gain and bias of a norm are applied elementwise\n" in err
    assert "kernel.scaled_linear" in target.read_text()
    assert "loc(" not in target.read_text()
    assert len(list(dump.iterdir())) == passes + 1  # and the graph before them


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    assert main(["opt", "-p", "dead-code", "-"]) == 0
    assert capsys.readouterr().out == TEXT
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT.replace("matmul", "matmull")))
    assert main(["opt", "-p", "dead-code", "-"]) == 1
    assert capsys.readouterr().err.startswith(
        "error: <stdin>:5:8: unknown operation 'aten.matmull'. Did you mean 'aten.matmul'?"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "fp8-tyle"], "error: no such pass: got 'fp8-tyle'. Did you mean 'fp8-tile'?"),
        (
            ["-p", "fp8-tile{layers=[1"],
            "error: <pipeline>:1:19: expected ',' or ']', but got the end of the text",
        ),
        (["-s", "fp9"], "error: no such scheme: got 'fp9'. Known: fp8_channel_reference, fp8_row, "),
        (["-p", "dead-code", "--print-after", "al"], "error: no such pass: got 'al'."),
        (
            ["-p", "dead-code", "-o", "no/such/folder/x.qir"],
            "error: the graph cannot be written: got no/such/folder/x.qir: ",
        ),
    ],
)
def test_errors_are_one_message_and_status_1(
    file: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["opt", *arguments, file]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_graph_that_cannot_be_read(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "graph.qir"
    if content is not None:
        path.write_bytes(content)
    assert main(["opt", "-p", "", str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: the graph cannot be read: got {path}: ")


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes"]) == 0
    out = capsys.readouterr().out
    line = "linear(x, w)  ->  linear(dequantize(quantize(x)), dequantize(quantize(w))).\n"
    assert f"quantize                 lossy     {line}{'':35}x_format = #fp8_row\n" in out
    assert "x_format = #fp8_tile\n" in out
    assert main(["schemes"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("fp8_tile\n    FP8 e4m3: ")
    assert "smoothquant_o3\n    INT8, smoothed: " in out and "quantize{x_format=#int8_tensor, w_format=" in out
    assert [line for line in out.splitlines() if line[0] != " "] == [*SCHEMES]


def test_a_scheme_with_options(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", "-s", "fp8_row{numerics=vllm}", "--no-locations", file]) == 0
    out = capsys.readouterr().out
    assert '%n_q, %n_s = kernel.fused_quantize(%x, %g) {expression = "' in out
    assert '", format = #fp8_row<profile = "vllm">, keep = []}' in out


def test_a_scheme_that_needs_data_says_so(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", "-s", "smoothquant_o2", file]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: there is no calibration data, and this pipeline needs some (in pass 'cal")


def test_usage() -> None:
    with pytest.raises(SystemExit) as status:
        main(["opt", "graph.qir"])
    assert status.value.code == 2


def test_as_a_program(file: str, root: Path) -> None:
    command = [sys.executable, "-m", "qcompiler", "opt", "-p", "canonicalize", file]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "aten.linear(%n, %w_t)" in done.stdout
