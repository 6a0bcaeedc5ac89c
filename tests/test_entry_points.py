"""Passes, schemes and exporters of other distributions, found through the metadata of a distribution made up here."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.cli import main
from qcompiler.entry_points import offered
from qcompiler.errors import InputError, PassError
from qcompiler.pass_manager.pipeline import PASSES, Pipeline
from qcompiler.schemes.named import SCHEMES, all_schemes, pipeline

MODULE = '''
from dataclasses import dataclass
from typing import ClassVar
from qcompiler import Pass, Scheme
from qcompiler.program.exporters import Exporter

@dataclass(frozen=True)
class Theirs(Pass):
    """nothing  ->  nothing"""

    name: ClassVar[str] = "their-pass"
    width: int = 3

THEIRS = Scheme("their_scheme", "Theirs.", "canonicalize; their-pass{width=4}")
WRONG = "no scheme"

class TheirExporter(Exporter):
    target = "their-cpu"

    def write(self, program, output, stage=None, suffix=""):
        output.write_text(f"{program.stages[stage or 'captured']}{suffix}")
        return output
'''
ENTRY_POINTS = """
[qcompiler.passes]
their-pass = made_up_passes:Theirs
their-lost-pass = made_up_passes:Theirs
their-broken-pass = made_up_broken:Nothing

[qcompiler.schemes]
their_scheme = made_up_passes:THEIRS
their_wrong_scheme = made_up_passes:WRONG

[qcompiler.exporters]
theirs = made_up_passes:TheirExporter
not-theirs = made_up_passes:WRONG
"""


@pytest.fixture(autouse=True)
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A third-party distribution, installed."""
    (tmp_path / "made_up_passes.py").write_text(MODULE)
    (tmp_path / "made_up_broken.py").write_text("raise RuntimeError('not today')")
    metadata = tmp_path / "made_up-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    PASSES.pop("their-pass", None)
    SCHEMES.pop("their_scheme", None)
    sys.modules.pop("made_up_passes", None)


def test_a_pass_is_found_by_its_name() -> None:
    assert "their-pass" not in PASSES
    steps = Pipeline.parse("dead-code; their-pass{width=7}")
    assert str(steps) == "dead-code; their-pass{width=7}"
    assert type(steps["their-pass"]).__module__ == "made_up_passes"


def test_nothing_is_imported_before_it_is_needed() -> None:
    Pipeline.parse("dead-code")
    assert {"their-pass", "their-broken-pass"} <= set(offered("qcompiler.passes"))
    assert "made_up_passes" not in sys.modules


def test_a_scheme_is_found_by_its_name() -> None:
    assert str(pipeline("their_scheme")) == "canonicalize; their-pass{width=4}"


def test_did_you_mean_knows_them() -> None:
    with pytest.raises(PassError, match=r"no such pass: got 'ther-pass'. Did you mean 'their-pass'"):
        Pipeline.parse("ther-pass")
    with pytest.raises(PassError, match=r"no such scheme: got 'ther_scheme'. Did you mean 'their_scheme'"):
        pipeline("ther_scheme")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "their-broken-pass",
            "an installed extension cannot be loaded: got 'their-broken-pass = made_up_broken:Nothing' of made-up 1.2: "
            "RuntimeError: not today. Repair or uninstall it.",
        ),
        (
            "their-lost-pass",
            "an entry point does not define a pass of its name: "
            "got 'their-lost-pass = made_up_passes:Theirs' of made-up 1.2; "
            "need a pass called 'their-lost-pass'",
        ),
    ],
)
def test_a_broken_extension_names_its_distribution(spec: str, message: str) -> None:
    with pytest.raises(PassError) as error:
        Pipeline.parse(spec)
    assert str(error.value) == message


def test_a_broken_extension_does_not_hide_others(capsys: pytest.CaptureFixture[str]) -> None:
    found = all_schemes()
    assert isinstance(found["their_wrong_scheme"], PassError)
    assert main(["passes"]) == 0
    out, err = capsys.readouterr()
    assert "their-pass               exact     nothing  ->  nothing\n" in out
    assert "width = 3\n" in out
    assert "not today" in err
    assert main(["schemes"]) == 0
    out, err = capsys.readouterr()
    assert "their_scheme\n    Theirs.\n    canonicalize; their-pass{width=4}\n" in out
    assert "their_wrong_scheme: an entry point does not define a scheme of its name" in err


def test_an_exporter_is_found_by_its_name(tmp_path: Path) -> None:
    fast = qcompiler.compile(nn.Linear(64, 64).eval(), example_inputs=(torch.randn(4, 64),))
    written = fast.export("theirs", tmp_path / "text", "fp8-tile", suffix="!")
    assert written.read_text() == f"{fast.stages['fp8-tile']}!"
    for name, message in {
        "their": "no such exporter is installed: got 'their'. Did you mean 'theirs'?",
        "not-theirs": "an entry point does not provide an exporter: got "
        "'not-theirs = made_up_passes:WRONG' of made-up 1.2",
    }.items():
        with pytest.raises(InputError) as error:
            fast.export(name, tmp_path / "other")
        assert str(error.value).startswith(message)


def test_the_command_line_lists_exporters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "folder", "--to", "x", "-o", "out"])
    assert "need one of mlir-torch, mlir-linalg, compressed-tensors, float, fp8, qcompiler, " in (
        err := capsys.readouterr().err
    )
    assert "theirs" in err
