"""Saving is all or nothing: a process that dies at any step leaves the old artefact or none."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler import ArtefactError, CompiledModel
from qcompiler.artefact.checking import check
from qcompiler.artefact.saving import failed
from qcompiler.files.replacing import locked, replacing

X = torch.ones(3, 128)


class Killed(BaseException):
    """The process is dead: nothing that it would still have done happens."""


class Killer:
    """Lets a number of steps on the disk happen, and none after them."""

    STEPS: tuple[tuple[Any, str], ...] = (
        (Path, "mkdir"), (Path, "rename"), (Path, "open"), (os, "fsync"), (shutil, "rmtree"),
    )  # fmt: skip

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
        self.left, self.died = allowed, False
        for owner, name in self.STEPS:
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.left == 0:
                self.died = True
                raise Killed
            self.left -= 1
            return step(*args, **kwargs)

        return call


def model(seed: int) -> CompiledModel:
    torch.manual_seed(seed)
    pipeline = "fp8-tile; fuse-linear; fold-constants; to-kernels"
    layer = nn.Sequential(nn.Linear(128, 128)).eval()
    return qcompiler.compile(layer, example_inputs=(torch.randn(2, 128),), pipeline=pipeline)


@pytest.fixture(scope="module")
def old() -> CompiledModel:
    return model(0)


@pytest.fixture(scope="module")
def new() -> CompiledModel:
    return model(1)


def deaths(compiled: CompiledModel, folder: Path) -> Iterator[int]:
    """Saves as often as there are steps to die at, each time one step later, until the process lives to the end."""
    allowed = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            killer = Killer(patch, allowed)
            with suppress(Killed):
                compiled.save(folder)
        if not killer.died:
            return
        yield allowed
        allowed += 1


def test_dying_while_saving_leaves_nothing(new: CompiledModel, tmp_path: Path) -> None:
    """Or, at the last steps, all of it."""
    seen = set()
    for _ in deaths(new, tmp_path / "model"):
        if (tmp_path / "model").exists():
            assert torch.equal(qcompiler.load(tmp_path / "model")(X), new(X)) and check(tmp_path / "model").ok
            seen.add("new")
            shutil.rmtree(tmp_path / "model")
        else:
            with pytest.raises(ArtefactError, match="there is no artefact"):
                qcompiler.load(tmp_path / "model")
            seen.add("none")
    assert seen == {"none", "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "what was left over is swept"


def test_dying_while_replacing_leaves_the_old_one_or_the_new(
    old: CompiledModel, new: CompiledModel, tmp_path: Path
) -> None:
    old.save(tmp_path / "model")
    seen = set()
    for _ in deaths(new, tmp_path / "model"):
        answer = qcompiler.load(tmp_path / "model")(X)
        seen.add("old" if torch.equal(answer, old(X)) else "new" if torch.equal(answer, new(X)) else "half")
        assert check(tmp_path / "model").ok
        if seen == {"old", "new"}:
            old.save(tmp_path / "model")
    assert seen == {"old", "new"}
    new.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_dying_between_the_two_renames(old: CompiledModel, new: CompiledModel, tmp_path: Path) -> None:
    """A crash between the two renames leaves no folder of the name; the next reader restores the old one."""
    old.save(tmp_path / "model")
    missing = 0
    for _ in deaths(new, tmp_path / "model"):
        missing += not (tmp_path / "model").exists()
        qcompiler.load(tmp_path / "model")
    assert missing >= 1


def test_a_failure_leaves_the_old_one_and_nothing_beside_it(
    old: CompiledModel, new: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old.save(tmp_path / "model")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtefactError, match=r"the artefact cannot be saved: got .*No space left on device.*model"):
        new.save(tmp_path / "model")
    assert torch.equal(qcompiler.load(tmp_path / "model")(X), old(X))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_work_of_another_process_is_not_swept(tmp_path: Path) -> None:
    with replacing(tmp_path / "model", failed) as first, replacing(tmp_path / "model", failed) as second:
        (first / "a").write_text("1")
        (second / "a").write_text("2")
    assert (tmp_path / "model" / "a").read_text() == "1", "who ends last wins"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_only_looks_like_the_work_of_a_dead_process_is_left_alone(tmp_path: Path) -> None:
    (file := tmp_path / ".m.1.qcompiler-new").write_text("a file")
    (link := tmp_path / ".m.2.qcompiler-new").symlink_to(tmp_path / "gone")
    with replacing(tmp_path / "m", failed) as work:
        (work / "new").touch()
    assert (tmp_path / "m" / "new").exists() and file.exists() and link.is_symlink()


def test_a_folder_is_read_while_nobody_replaces_it(tmp_path: Path) -> None:
    with locked(tmp_path, shared=True), locked(tmp_path, shared=True):
        pass  # two readers do not wait for one another
    with locked(tmp_path / "is not there"):
        pass


@pytest.mark.parametrize("what", ["file", "folder", "extra", "damaged"])
def test_nothing_but_an_artefact_is_replaced(old: CompiledModel, tmp_path: Path, what: str) -> None:
    target = tmp_path / "mine"
    if what == "file":
        target.write_text("precious")
    elif what == "folder":
        (target / "inner").mkdir(parents=True)
    else:
        old.save(target)
        (target / ("notes.txt" if what == "extra" else "manifest.json")).write_text("precious")
    with pytest.raises(ArtefactError, match=r"the artefact would replace .*mine.* Save to a folder that is new, empty"):
        old.save(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    assert what != "file" or target.read_text() == "precious"


def test_an_empty_folder_and_a_link_to_an_artefact_are_replaced(
    old: CompiledModel, new: CompiledModel, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    old.save(tmp_path / "model")
    (tmp_path / "latest").symlink_to("model")
    new.save(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert torch.equal(qcompiler.load(tmp_path / "model")(X), new(X))


def test_a_model_that_is_loaded_keeps_its_weights_while_its_folder_is_replaced(
    old: CompiledModel, new: CompiledModel, tmp_path: Path
) -> None:
    old.save(tmp_path / "model")
    loaded = qcompiler.load(tmp_path / "model")
    new.save(tmp_path / "model")
    assert torch.equal(loaded(X), old(X))
    loaded.save(tmp_path / "model")
    assert torch.equal(qcompiler.load(tmp_path / "model")(X), old(X))
