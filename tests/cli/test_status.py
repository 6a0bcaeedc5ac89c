"""Exit codes, tracebacks, interrupts, broken pipes: how the program ends, whatever happens."""

import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qcompiler
import qcompiler.cli.command_line
from qcompiler.cli import EXIT_CODES, main
from qcompiler.errors import PassError


def ends_by(error: BaseException | None, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """How `main` ends when the command it runs raises `error`."""

    def run(_: Any) -> int:
        if error is not None:
            raise error
        return 0

    monkeypatch.setattr(qcompiler.cli.command_line, "import_module", lambda _: SimpleNamespace(run=run))
    return main(["passes", *arguments])


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (None, 0, ""),
        (PassError("it is wrong", got="this"), 1, "error: it is wrong: got this\n"),
        (KeyError("x"), 70, "internal error: KeyError: 'x'; run again with --debug to see where\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(28, "No room"), 1, "error: the disk is full: [Errno 28] No room. Make room and run again.\n"),
    ],
)
def test_how_a_command_ends(
    error: BaseException | None, status: int, message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert ends_by(error, monkeypatch) == status
    assert capsys.readouterr() == ("", message)
    assert status in EXIT_CODES


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_by(PassError("it is wrong"), monkeypatch, "--debug") == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):") and err.endswith("\nerror: it is wrong\n")
    assert ends_by(KeyError("x"), monkeypatch, "--debug") == 70
    assert capsys.readouterr().err.endswith("\ninternal error: KeyError: 'x'\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["nothing"], ["opt"], ["opt", "graph.qir"], ["compile", "m:f"], ["explain"], ["explain", "a", "-p", "b"],
        ["bench", "x", "--rows", "0"], ["bench", "x", "--rows", "1,b"], ["bench", "x", "--repeats", "0"],
        ["inspect", "x", "--stage", "a", "--source"], ["completion", "csh"], ["passes", "--js"],
    ],
)  # fmt: skip
def test_a_wrong_command_line_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(arguments)
    assert status.value.code == 2
    assert capsys.readouterr().err.startswith("usage: qcompiler")


# As programs


def program(root: Path, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "qcompiler", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, **options)


def test_help_and_usage_errors_need_no_torch(root: Path) -> None:
    code = (
        "import sys\nfrom qcompiler.cli import main\n"
        "for arguments in (['--help'], ['compile', '--help'], ['--version'], ['compile']):\n"
        "    try:\n        main(arguments)\n    except SystemExit:\n        pass\n"
        "print(sorted({'torch', 'triton', 'rich', 'numpy', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_stops_is_no_error(root: Path) -> None:
    command = f"{sys.executable} -m qcompiler passes | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("0", "141")  # 0 when all of it fits into the pipe before the reader is gone
    assert done.stderr == ""


def test_errors_of_a_program(root: Path) -> None:
    done = program(root, "explain", "fp9")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: no such scheme: got 'fp9'. Known: ")


def test_progress_is_shown_on_a_terminal(root: Path, tmp_path: Path) -> None:
    (tmp_path / "cli_terminal.py").write_text(
        "import torch\n\n\ndef make():\n    return torch.nn.Linear(128, 128), torch.randn(2, 128)\n"
    )
    command = [sys.executable, "-m", "qcompiler", "compile", "cli_terminal:make", "-o", "out"]
    environment = {**os.environ, "PYTHONPATH": str(root), "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}
    reading, writing = pty.openpty()
    done = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=writing, env=environment)
    os.close(writing)
    shown = everything(reading)
    assert done.communicate()[0].decode().splitlines()[-1].startswith("saved to out; ")
    assert done.returncode == 0
    last = shown.splitlines()[-1]
    assert all(stage in last for stage in ("loading ", "; capture ", "; passes ", "; code generation ", "; saving "))


PROGRAM = """
import os, sys
import torch, qcompiler
for arguments, knobs in (({}, {}), ({"progress": False}, {}), ({}, {"QCOMPILER_PROGRESS": "0"})):
    os.environ.update(knobs)
    fast = qcompiler.compile(torch.nn.Linear(128, 128).eval(), example_inputs=(torch.randn(2, 128),), **arguments)
    print(fast.report.summary())
    print("next", file=sys.stderr, flush=True)
"""


def test_compile_shows_its_stage_on_a_terminal_unless_it_is_switched_off(root: Path, tmp_path: Path) -> None:
    variables = {**os.environ, "PYTHONPATH": str(root), "NO_COLOR": "1", "TERM": "xterm"}
    reading, writing = pty.openpty()
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=writing, env=variables)
    os.close(writing)
    shown, without, switched_off, end = everything(reading).split("next\r\n")
    assert done.communicate()[0].count(b"1 of 1 matmuls") == 3 and done.returncode == 0
    assert "capture: tracing: all sizes are dynamic" in shown
    assert (without, switched_off, end) == ("", "", "")


def test_compile_is_silent_elsewhere(capfd: pytest.CaptureFixture[str]) -> None:
    qcompiler.compile(torch.nn.Linear(128, 128).eval(), example_inputs=(torch.randn(2, 128),))
    assert capfd.readouterr() == ("", "")


def everything(descriptor: int) -> str:
    """What is written to the other end of a pseudo-terminal, until it is closed there."""
    found = b""
    while True:
        try:
            chunk = os.read(descriptor, 4096)
        except OSError:  # how Linux says that the other end is closed
            chunk = b""
        if not chunk:
            os.close(descriptor)
            return found.decode(errors="replace")
        found += chunk
