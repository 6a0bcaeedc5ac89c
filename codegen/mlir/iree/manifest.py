"""The JSON manifest of a folder that IREE's runtime can run: its contents, and how to call its function."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError

FORMAT, VERSION = "qcompiler-iree", 1
MANIFEST, MODULE, WEIGHTS = "manifest.json", "model.vmfb", "weights.safetensors"


@dataclass(frozen=True)
class Manifest:
    """How to run a compiled module.

    Attributes:
        function: Name of the function.
        inputs: Name -> type, in graph syntax.
        stored: The names of the tensors that follow the inputs, in order.
        outputs: For each output the number of a result, or a literal.
        updates: For each result after the outputs, the name of the input or stored tensor that it updates.
        symbols: Name of a symbolic size -> its minimum and maximum.
        hashes: File -> SHA-256.
        compiled: Compilation details, for information only.
    """

    function: str
    inputs: Mapping[str, str]
    stored: tuple[str, ...]
    outputs: tuple[Mapping[str, Any], ...]
    updates: tuple[str, ...]
    symbols: Mapping[str, tuple[int, int | None]]
    hashes: Mapping[str, str]
    compiled: Mapping[str, str]

    def write(self, folder: Path) -> None:
        """Writes it to a folder."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **vars(self)}, indent=2)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def is_built(folder: Path) -> bool:
    """Whether a folder has an IREE manifest, in any version of the format."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def read(folder: Path) -> Manifest:
    """The manifest of a folder; raises InputError if there is none that this version supports."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (found.pop("format"), found.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"it is not format {FORMAT!r}, version {VERSION}")
        return Manifest(
            str(found["function"]),
            dict(found["inputs"]),
            tuple(found["stored"]),
            tuple(found["outputs"]),
            tuple(found["updates"]),
            {name: (low, high) for name, (low, high) in found["symbols"].items()},
            dict(found["hashes"]),
            dict(found["compiled"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "the folder does not hold a model that IREE can run",
            got=f"{path}: {error}",
            need="a folder written by compile --target iree-cpu or to_iree()",
        ) from error


def checked_bytes(folder: Path, name: str, manifest: Manifest) -> bytes:
    """The bytes of a file, after checking its hash; raises InputError if it has changed."""
    try:
        found = (folder / name).read_bytes()
    except OSError as error:
        raise InputError("a file of the compiled model cannot be read", got=str(error)) from error
    if (got := hashlib.sha256(found).hexdigest()) != manifest.hashes.get(name):
        raise InputError(
            "a file of the compiled model has changed since it was written",
            got=f"{name} with SHA-256 {got[:16]}…",
            need=f"{str(manifest.hashes.get(name))[:16]}…",
            where=str(folder),
            fix="Build the folder again.",
        )
    return found
