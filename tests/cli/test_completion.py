"""`qcompiler completion`: the scripts run in real shells, and complete options, values and paths."""

import shutil
import subprocess
from pathlib import Path

import pytest

from qcompiler.cli import main
from qcompiler.cli.parser import COMMANDS
from qcompiler.schemes.named import SCHEMES

# Completes the words given as arguments, as bash would at the end of the line, and prints what it offers.
ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
function=$(complete -p qcompiler | sed -E 's/.* -F ([^ ]+) .*/\\1/')
"$function" qcompiler "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.fixture
def bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The script for bash, in a file."""
    path = tmp_path / "qcompiler.bash"
    path.write_text(script("bash", capsys))
    return path


def offered(bash: Path, *words: str) -> set[str]:
    command = ["bash", "-c", ASK, "bash", str(bash), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=bash.parent)
    return set(done.stdout.split())


def test_bash_takes_the_script(bash: Path) -> None:
    subprocess.run(["bash", "-n", str(bash)], check=True)


def test_bash_completes_commands_schemes_and_files(bash: Path) -> None:
    assert offered(bash, "qcompiler", "") >= COMMANDS.keys()
    assert offered(bash, "qcompiler", "ex") == {"explain", "export"}
    assert offered(bash, "qcompiler", "explain", "fp8_tile") == {"fp8_tile", "fp8_tile_smooth"}
    assert offered(bash, "qcompiler", "compile", "m:f", "--scheme", "smooth") == {
        name for name in SCHEMES if name.startswith("smooth")
    }
    assert "--calibration" in offered(bash, "qcompiler", "compile", "--")
    (bash.parent / "graph.qir").touch()
    assert "graph.qir" in offered(bash, "qcompiler", "inspect", "gra")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    assert all(name in text for name in ("smoothquant_o3", "inspect", "--scheme" if shell == "zsh" else "-l scheme"))
    if (found := shutil.which(shell)) is not None:
        path = tmp_path / "script"
        path.write_text(text)
        subprocess.run([found, "-n", str(path)], check=True)
