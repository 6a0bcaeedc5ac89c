"""`qcompiler compile --target iree-cpu`, and the other commands on the folder that it writes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler
from codegen.mlir.iree import load
from qcompiler.cli import main

pytest.importorskip("torch_mlir", reason="needs the extra mlir")
pytest.importorskip("iree.compiler", reason="needs the extra iree")
pytest.importorskip("iree.runtime", reason="needs the extra iree")

FACTORY = '''"""A model of a test."""

import torch


def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(256, 256), torch.nn.SiLU(), torch.nn.Linear(256, 128)
    return torch.nn.Sequential(*layers).eval(), torch.randn(4, 256)


def plain():
    return network()[0]
'''


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, in one with the module of the factory."""
    root = tmp_path_factory.mktemp("iree")
    (root / "cli_for_iree.py").write_text(FACTORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.syspath_prepend(str(root))
        patch.delitem(sys.modules, "cli_for_iree", raising=False)
        command = ["compile", "cli_for_iree:network", "--scheme", "fp8_tile", "--target", "iree-cpu", "-o", "built"]
        assert main([*command, "--quiet"]) == 0
        assert main([*command, "--quiet"]) == 0  # in its own place again
    return root / "built"


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == status
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """One that may be damaged."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for path in built.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_it_runs_and_computes_what_the_library_compiles(built: Path) -> None:
    torch.manual_seed(0)
    layers = torch.nn.Linear(256, 256), torch.nn.SiLU(), torch.nn.Linear(256, 128)
    compiled = qcompiler.compile(torch.nn.Sequential(*layers).eval(), example_inputs=(torch.randn(4, 256),))
    x = torch.randn(7, 256)
    got, want = load(built)(x), compiled(x)
    assert (
        got - want
    ).norm() / want.norm() < 1e-3  # a sum in another order may change a code: codegen/mlir/test_iree.py


def test_inspect_says_how_it_is_called(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(built)]) == 0
    out = capsys.readouterr().out
    assert "input   f32[s0, 256]" in out and "sizes: s0 in " in out and "1 output, 6 weights, 0 updates" in out
    assert f"{built}: @Sequential, compiled by IREE " in out
    assert answer(capsys, "inspect", str(built))["iree"]["inputs"] == {"input": "f32[s0, 256]"}
    assert main(["inspect", str(built), "--stage", "captured"]) == 1
    assert "a folder that IREE runs has no graphs: got --stage. Keep an artefact" in capsys.readouterr().err


def test_check_finds_damage(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "check", str(copied))
    assert found["ok"] and found["files"] == dict.fromkeys(["manifest.json", "model.vmfb", "weights.safetensors"])
    (copied / "note.txt").write_text("mine")
    data = bytearray((copied / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "weights.safetensors").write_bytes(data)
    (copied / "model.vmfb").unlink()
    found = answer(capsys, "check", str(copied), status=1)
    assert not found["ok"] and found["extra"] == ["note.txt"] and len(found["problems"]) == 2
    assert "cannot be read" in found["files"]["model.vmfb"]
    assert "has changed since it was written" in found["files"]["weights.safetensors"]
    assert main(["check", str(copied)]) == 1
    out = capsys.readouterr().out
    assert out.count("wrong: ") == 2 and out.endswith("not a part of it: note.txt\n")
    (copied / "manifest.json").write_text('{"format": "qcompiler-iree", "version": 99}')
    assert main(["check", str(copied)]) == 1
    assert "it is not format 'qcompiler-iree', version 1" in capsys.readouterr().err


def test_bench_times_calls_through_iree(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(built.parent)
    monkeypatch.syspath_prepend(str(built.parent))
    found = answer(capsys, "bench", "built", "--rows", "1,3", "--repeats", "2", "--against", "cli_for_iree:plain")
    assert [call["inputs"] for call in found["calls"]] == [{"0": "f32[1, 256]"}, {"0": "f32[3, 256]"}]
    for call in found["calls"]:
        assert all(0 < each["least"] <= each["median"] for each in call["milliseconds"].values())
    assert "iree-base-runtime" in found["versions"]
    assert main(["bench", "built", "--input", "input=f32[2,255]"]) == 1
    assert "input 'input' has the wrong shape" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["report"], ["export", "--to", "fp8", "-o", "out", "--model", "x:y"]])
def test_what_needs_an_artefact_says_so(built: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, str(built)]) == 1
    message = f"error: a folder that IREE runs has no graphs or report: got {built}; need an artefact. Keep an "
    assert capsys.readouterr().err.startswith(message)


def test_neither_kind_of_folder_replaces_the_other(
    built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(built.parent)
    monkeypatch.syspath_prepend(str(built.parent))
    assert main(["compile", "cli_for_iree:network", "-o", "built"]) == 1
    assert "the artefact would replace something else" in capsys.readouterr().err
    artefact = tmp_path / "artefact"
    assert main(["compile", "cli_for_iree:network", "-o", str(artefact), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["compile", "cli_for_iree:network", "--target", "iree-cpu", "-o", str(artefact)]) == 1
    assert "the folder does not hold a model that IREE can run" in capsys.readouterr().err
    assert (artefact / "stages").is_dir()
