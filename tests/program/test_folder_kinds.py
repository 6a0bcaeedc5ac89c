"""A path that is not what a reader expects: the error says what it is and what to do."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qcompiler
from qcompiler import ArtefactError, InputError, QCompilerError
from qcompiler.checkpoints import load_model
from qcompiler.cli import main
from qcompiler.cli.models import load_model as named_model
from qcompiler.program.folder_kinds import advice


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artefacts") / "model"
    model = torch.nn.Sequential(torch.nn.Linear(128, 128)).eval()
    qcompiler.compile(model, example_inputs=(torch.randn(2, 128),)).save(path)
    return path


def checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    save_file({"a": torch.ones(1)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


def test_an_artefact_where_a_checkpoint_is_expected(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = r"the folder holds no checkpoint.* The folder is a qcompiler artefact: load it with qcompiler\.load\("
    for read in (qcompiler.compile, load_model, qcompiler.checkpoints.read):
        with pytest.raises(QCompilerError, match=words):
            read(artefact)
    assert main(["compile", str(artefact), "-o", str(artefact.parent / "out")]) == 1
    assert "load it with qcompiler.load(folder)" in capsys.readouterr().err


def test_a_checkpoint_where_an_artefact_is_expected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(tmp_path / "model")
    with pytest.raises(
        ArtefactError, match=r"no manifest.*Hugging Face checkpoint: compile it with qcompiler\.compile"
    ):
        qcompiler.load(path)
    for command in ("check", "inspect"):
        assert main([command, str(path)]) == 1
        assert "compile it with qcompiler.compile(folder)" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["model.gguf"], r"The folder has model\.gguf\. GGUF weights are not read\. Convert them"),
        (["onnx/.keep", "model.onnx"], "Compile the PyTorch model that was exported"),
        (["config.json", "pytorch_model.bin"], r"The folder has pytorch_model\.bin\. Pickled weights are never read"),
        (["model.pth"], "Pickled weights are never read"),
        (["config.json", "tf_model.h5"], "TensorFlow and Flax weights are not read"),
        (["adapter_config.json", "adapter_model.safetensors"], "The folder contains an adapter. Merge it"),
        (["config.json", "consolidated.safetensors"], r"files have other names: consolidated\.safetensors"),
        (["config.json"], r"The folder has a config\.json and no weights: download them too"),
        (["snapshots/1f/config.json"], r"A subfolder may be meant: .*snapshots/1f"),
        (["text_encoder/config.json"], r"A subfolder may be meant: .*text_encoder"),
        (["a/b"], "The folder has no files"),
        ([], "The folder is empty"),
    ],
)
def test_other_folders(tmp_path: Path, files: list[str], words: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    for read in (load_model, qcompiler.load):
        with pytest.raises(QCompilerError, match=words):
            read(tmp_path)


def test_a_folder_for_iree(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "qcompiler-iree", "version": 1}))
    for read in (load_model, qcompiler.load):
        with pytest.raises(QCompilerError, match=r"load it with codegen\.mlir\.iree\.load\(folder\)"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.safetensors", "Pass the folder that contains it"), ("model.gguf", "GGUF weights are not read"),
        ("model.pt2", r"torch\.export\.load"), ("model.bin", "Pickled weights"), ("notes.txt", "a folder is needed"),
    ],
)  # fmt: skip
def test_a_file_is_not_a_folder(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(QCompilerError, match=f"a checkpoint is a folder, but this is a file: .*{words}"):
        load_model(tmp_path / name)
    with pytest.raises(ArtefactError, match=f"there is no artefact: .*{words}"):
        qcompiler.load(tmp_path / name)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3-8B", "gpt2"])
def test_a_name_on_the_hub_is_not_downloaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = rf"nothing is downloaded\. Call huggingface_hub\.snapshot_download\('{name}'\) and give its folder\."
    with pytest.raises(QCompilerError, match=f"there is no such folder: got {name}.*{words}"):
        qcompiler.compile(name)
    with pytest.raises(ArtefactError, match=rf"there is no artefact: got .*{words}"):
        qcompiler.load(name)
    with pytest.raises(InputError, match=f"there is no such model: got '{name}'.*{words}"):
        named_model(name)
    assert main(["compile", name, "-o", "out"]) == 1
    assert "nothing is downloaded" in capsys.readouterr().err


def test_other_paths_that_do_not_exist_get_no_advice(tmp_path: Path) -> None:
    assert advice(tmp_path / "none") is None and advice(Path("a/b/c")) is None and advice(Path("../up")) is None
    assert advice(Path("none.gguf")) is None and advice(Path("x" * 9999)) is None


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("x" * 300, "the folder cannot be read: got File name too long"), ("a\0b", "this is not a path: got 'a"),
        (3, "this is not a path: got int"), (None, "got NoneType"), (b"folder", "got b'folder'"),
    ],
)  # fmt: skip
def test_what_is_no_path_is_an_error(path: Any, words: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 16)).eval()
    compiled = qcompiler.compile(model, example_inputs=(torch.randn(2, 16),))
    for call in (compiled.save, lambda path: compiled.save_checkpoint(path, "fp8"), qcompiler.load, load_model):
        with pytest.raises(QCompilerError, match=words):
            call(path)


def test_a_name_that_is_too_long_is_no_internal_error(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["check"], ["inspect"], ["report"], ["compile", "-o", "out"]):
        assert main([*arguments, "x" * 300]) == 1
        assert "File name too long" in capsys.readouterr().err


def test_a_folder_that_may_not_be_read_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path / "model")
    monkeypatch.setattr(os, "access", lambda found, mode: Path(found).is_dir())
    with pytest.raises(QCompilerError, match="a file of the checkpoint cannot be read: got Permission denied"):
        qcompiler.checkpoints.read(path)
    monkeypatch.setattr(os, "access", lambda found, mode: False)
    with pytest.raises(QCompilerError, match="the folder cannot be read: got Permission denied"):
        qcompiler.checkpoints.read(path)
