"""Folders that come from elsewhere, one file of which is mutated: the artefacts of `compiled.save`.

An input is the name of a file, a newline, and what the file holds instead. An artefact lists the hash of each of its
files, so a change is found out at once; `artefact-sealed` corrects the hashes, so that the readers behind them are
reached, as somebody would who means harm.
"""

import hashlib
import json
from functools import cache
from pathlib import Path

import torch
from targets import Target, folder, in_order
from torch import nn

import qcompiler
from qcompiler.artefact.manifest import NAME, sealed
from qcompiler.artefact.strict_json import render
from qcompiler.errors import ArtefactError

ARTEFACT_WORDS = (
    b'"stages/00_captured.qir"', b'"host.py"', b'"../host.py"', b'"format"', b'"files"', b'"leaf"', b'"tuple"', b"null",
    b'{"float": "nan"}', b'{"dtype": "bf16"}', b'"cpu"', b'"cuda:7"', b"%x", b"aten.", b"true", b"-1", b"1e999",
    b'"F8_E4M3"',
)  # fmt: skip


PASSES = (
    "calibrate; quantize{x_block=[-1, -1], w_block=[-1, -1], dtype=i8, static=true}; fuse-linear; fold-constants; "
    "dead-code; to-kernels"
)


@cache
def _artefact() -> Path:
    """A small artefact that has every kind of file."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU()).eval()
    compiled = qcompiler.compile(model, pipeline=PASSES, calibration=[torch.randn(4, 16)])
    path = folder() / "artefact"
    compiled.save(path)
    return path


@cache
def _files(path: Path) -> dict[str, bytes]:
    found = {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    return {name: data for name, data in found.items() if data}


def _changed(given: bytes, files: dict[str, bytes], otherwise: str) -> tuple[str, bytes]:
    """The file that an input is about, and what it holds now."""
    name, _, data = given.partition(b"\n")
    known = name.decode("utf-8", "replace")
    return (known, data) if known in files else (otherwise, given)


def _load(changes: dict[str, bytes]) -> None:
    """Loads the artefact with other files in it, and looks at all that is read when it is asked for."""
    path = _artefact()
    for name, data in changes.items():
        (path / name).write_bytes(data)
    try:
        loaded = qcompiler.load(path, verify=True)
        if any(name.startswith("stages/") for name in changes):
            [str(loaded.stages[stage]) for stage in loaded.stages]
        str(loaded.calibration), str(loaded.report), loaded.source
        for name in loaded.graph.weights:
            loaded.graph.weights[name].sum()
    except ArtefactError as error:
        if error.problem == "the artefact cannot be loaded" and error.__cause__ is not None:
            raise error.__cause__ from None  # it asks to be reported
        raise
    finally:
        for name in changes:
            (path / name).write_bytes(_files(path)[name])


def read_artefact(given: bytes) -> None:
    """An artefact with a file that is not what the manifest lists."""
    name, data = _changed(given, _files(_artefact()), NAME)
    _load({name: data})


def read_sealed_artefact(given: bytes) -> None:
    """An artefact with a changed file and a manifest that agrees."""
    files = _files(_artefact())
    name, data = _changed(given, files, NAME)
    if name != NAME:
        manifest = json.loads(files[NAME])
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _load({name: data, NAME: render(sealed(manifest)).encode()})
        return
    try:
        manifest = render(sealed(json.loads(data))).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        manifest = data
    _load({NAME: manifest})


@cache
def _seeds(path: Path) -> tuple[bytes, ...]:
    return in_order(name.encode() + b"\n" + data for name, data in _files(path).items())


FOLDER_TARGETS = {
    "artefact": Target(read_artefact, _seeds(_artefact()), ARTEFACT_WORDS),
    "artefact-sealed": Target(read_sealed_artefact, _seeds(_artefact()), ARTEFACT_WORDS),
}
