"""The environment variables: their types, their errors, their scope and their table."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler.errors import QCompilerError
from qcompiler.knobs import Knobs, current, scope


def test_an_empty_environment_gives_the_defaults() -> None:
    got = Knobs.from_environment({"PATH": "/bin", "QCOMPILERX": "1"})
    assert got == Knobs()
    assert (got.print_after, got.time_passes, got.dump_dir, got.update) == ((), False, None, False)
    assert got.cache_dir is None


def test_variables_are_typed() -> None:
    environment = {
        "QCOMPILER_PRINT_AFTER": "fp8-tile, dead-code",
        "QCOMPILER_TIME_PASSES": "1",
        "QCOMPILER_DUMP_DIR": "~/graphs",
        "QCOMPILER_CACHE_DIR": "/var/cache/q",
        "QCOMPILER_UPDATE": "Off",
    }
    assert Knobs.from_environment(environment) == Knobs(
        print_after=("fp8-tile", "dead-code"),
        time_passes=True,
        dump_dir=Path.home() / "graphs",
        cache_dir=Path("/var/cache/q"),
        update=False,
    )


def test_an_empty_variable_leaves_the_default() -> None:
    assert Knobs.from_environment({"QCOMPILER_DUMP_DIR": "", "QCOMPILER_TIME_PASSES": " "}) == Knobs()


def test_an_unknown_variable_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(QCompilerError, match=r"got QCOMPILER_TIME_PASES\. Did you mean 'QCOMPILER_TIME_PASSES'\?"):
        Knobs.from_environment({"QCOMPILER_TIME_PASES": "1"})


def test_a_wrong_value_is_an_error_that_says_what_is_expected() -> None:
    with pytest.raises(
        QCompilerError, match=r"QCOMPILER_UPDATE has an invalid value: got 'maybe'; need one of 1, true"
    ):
        Knobs.from_environment({"QCOMPILER_UPDATE": "maybe"})
    with pytest.raises(QCompilerError, match=r"need a path whose ~ names an existing home folder"):
        Knobs.from_environment({"QCOMPILER_DUMP_DIR": "~no-such-user/graphs"})


@pytest.mark.parametrize(
    ("print_after", "printed"),
    [((), []), (("fp8-tile",), ["fp8-tile"]), (("all",), ["fp8-tile", "dead-code"])],
)
def test_prints_after(print_after: tuple[str, ...], printed: list[str]) -> None:
    knob = Knobs(print_after=print_after)
    assert [name for name in ("fp8-tile", "dead-code") if knob.prints_after(name)] == printed


def test_current_reads_the_environment_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not current().time_passes
    monkeypatch.setenv("QCOMPILER_TIME_PASSES", "1")
    assert current().time_passes


def test_scopes_nest_and_end() -> None:
    before = current()
    with scope(time_passes=True) as outer, scope(print_after=("all",)) as inner:
        assert (outer.time_passes, outer.print_after) == (True, ())
        assert current() is inner
        assert (inner.time_passes, inner.print_after) == (True, ("all",))
    assert current() == before


def test_a_scope_ends_when_its_block_fails() -> None:
    before = current()
    with pytest.raises(ZeroDivisionError), scope(time_passes=True):
        _ = 1 / 0
    assert current() == before


def test_a_scope_of_an_unknown_knob_is_an_error() -> None:
    with pytest.raises(QCompilerError, match="Did you mean 'time_passes'"), scope(time_pases=True):
        pass


def run_table(root: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(root), **environment}
    command = [sys.executable, "-m", "qcompiler.knobs"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_the_table_shows_every_knob(root: Path) -> None:
    done = run_table(root, {"HOME": "/h", "QCOMPILER_PRINT_AFTER": "fp8-tile,dead-code"})
    assert done.returncode == 0
    head, *rows = [re.split(r" {2,}", line) for line in done.stdout.splitlines()]
    assert head == ["VARIABLE", "VALUE", "WHAT IT DOES"]
    assert {name: value for name, value, _ in rows} == {
        "QCOMPILER_PRINT_AFTER": "fp8-tile,dead-code", "QCOMPILER_TIME_PASSES": "False", "QCOMPILER_PROGRESS": "True",
        "QCOMPILER_DUMP_DIR": "-", "QCOMPILER_CACHE_DIR": "-", "QCOMPILER_PTXAS": "bundled",
        "QCOMPILER_TUNED": "False", "QCOMPILER_CPU_CACHE": "2000", "QCOMPILER_CAPTURE_SECONDS": "120.0",
        "QCOMPILER_COLLECTIVE_SECONDS": "-", "QCOMPILER_PEER_MEMORY": "True", "QCOMPILER_VLLM_FUSE": "False",
        "QCOMPILER_UPDATE": "False",
    }  # fmt: skip
    assert (
        len({line.index(says) for line, (*_, says) in zip(done.stdout.splitlines(), [head, *rows], strict=True)}) == 1
    )


def test_the_table_reports_a_wrong_environment_in_one_sentence(root: Path) -> None:
    done = run_table(root, {"QCOMPILER_DUMPDIR": "x"})
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("qcompiler.knobs: unknown qcompiler environment variable")
    assert done.stderr.count("\n") == 1
