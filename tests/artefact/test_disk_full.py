"""A full disk is an error in one sentence wherever files are written, and existing files do not change."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import qcompiler
from codegen.mlir.iree import building
from qcompiler import CompiledModel, QCompilerError
from qcompiler.cli import main
from qcompiler.files.replacing import not_replaced
from qcompiler.runtime import tensor_files

GRAPH = """\
func @small(%x: f32[2, 4]) -> (f32[2, 4]) {
  %y = aten.relu(%x) : f32[2, 4]
  return %y
}
"""


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file can grow larger: the system refuses the write as a full disk does, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 128)).eval()


@pytest.fixture(scope="module")
def compiled(model: nn.Module) -> CompiledModel:
    return qcompiler.compile(model, scheme="int8_tensor_static", calibration=[torch.randn(4, 128)])


@pytest.fixture(scope="module")
def tiled(model: nn.Module) -> CompiledModel:
    return qcompiler.compile(model, example_inputs=(torch.randn(4, 128),))


WRITERS: dict[str, tuple[str, Callable[[Any, Any, Path], Any]]] = {
    "artefact": ("the artefact cannot be saved", lambda compiled, _, path: compiled.save(path)),
    "html": ("the report cannot be written", lambda compiled, _, path: compiled.to_html(path)),
    "calibration": ("the calibration cannot be saved", lambda compiled, _, path: compiled.calibration.save(path)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_limit_on_files_leaves_what_was_there(
    compiled: CompiledModel, model: nn.Module, tmp_path: Path, kind: str
) -> None:
    problem, save = WRITERS[kind]
    save(compiled, model, tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(QCompilerError) as error, files_of_at_most(512):
        save(compiled, model, tmp_path / "out")
    said = str(error.value)
    assert said.startswith(f"{problem}: got ") and "File too large" in said
    assert f"need a higher file size limit (ulimit -f) (in {tmp_path / 'out'}). Nothing was replaced." in said
    assert contents(tmp_path) == before


def full(*_: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_checkpoint_says_how_much_room_it_needs(
    tiled: CompiledModel, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiled.save_checkpoint(tmp_path / "out", "fp8", model=model)
    before = contents(tmp_path)
    monkeypatch.setattr(tensor_files, "save_file", full)
    room = r"need room for 16,900 bytes \([\d,]+ bytes are free\) \(in .*out\)\. Nothing was replaced\."
    with pytest.raises(QCompilerError, match=rf"cannot be written: got .*No space left on device.*{room}"):
        tiled.save_checkpoint(tmp_path / "out", "fp8", model=model)
    assert contents(tmp_path) == before


def test_a_model_for_iree_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_mlir")
    monkeypatch.setattr(tensor_files, "save_file", full)
    monkeypatch.setattr(building, "compile_module", lambda module, cpu: b"binary")
    with pytest.raises(QCompilerError, match=r"the compiled model cannot be written: got .*No space left on device"):
        building.build(qcompiler.Graph.parse(GRAPH), tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_other_errors_of_safetensors_are_not_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError) as error:
        tensor_files.write_tensors({"a": torch.ones(1)}, tmp_path / "none" / "x.safetensors")
    assert error.value.filename == str(tmp_path / "none" / "x.safetensors")

    def wrong(*_: Any) -> None:
        raise SafetensorError("wrong tensors")

    monkeypatch.setattr(tensor_files, "save_file", wrong)
    with pytest.raises(SafetensorError, match="wrong tensors"):
        tensor_files.write_tensors({"a": torch.ones(1)}, tmp_path / "x.safetensors")


def test_opt_leaves_the_old_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "x.qir", tmp_path / "y.qir"
    source.write_text(GRAPH)
    assert main(["opt", "-p", "dead-code", str(source), "-o", str(target)]) == 0
    before = contents(tmp_path)
    capsys.readouterr()
    with files_of_at_most(8):
        status = main(["opt", "-p", "dead-code", str(source), "-o", str(target)])
    assert status == 1 and "the graph cannot be written" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert main(["opt", "-p", "dead-code", str(source), "-o", os.devnull]) == 0


def test_an_error_that_is_not_of_room_keeps_its_need() -> None:
    said = not_replaced(QCompilerError("it", need="a folder"), PermissionError(13, "Permission denied"), Path("x"))
    assert str(said) == "it: need a folder (in x). Nothing was replaced."
