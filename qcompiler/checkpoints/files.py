"""The tensors of a checkpoint folder: file, type and shape of each; data is read on demand.

    model.safetensors                      or    model.safetensors.index.json and the files that it lists

Nothing is trusted: a path that leads out of the folder, a truncated file, or an index that lists a missing tensor is an
error that names the file and the tensor.
"""

import errno
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qcompiler.checkpoints.folders import CONFIG, INDEX, SINGLE
from qcompiler.errors import QCompilerError
from qcompiler.program.folder_kinds import advice

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""Names of element types in safetensors."""


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a folder, each read only when requested.

    Args:
        folder: The folder of a checkpoint.

    Raises:
        QCompilerError: A file is missing or broken, or the index does not match the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._types: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._files: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        self._outlined: Collection[str] = ()
        files = _listed(folder)
        listed = {name for expected in files.values() for name in expected or ()}
        for file, expected in files.items():
            self._open(file, expected, listed)
        if (folder / SINGLE).exists() and SINGLE not in files:
            got = f"{SINGLE} and {INDEX}, which does not list it"
            fix = "Remove the wrong one: other readers load either."
            raise QCompilerError("the folder holds two checkpoints", got=got, where=str(folder), fix=fix)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._outlined:
            return torch.empty(self.shape(name), dtype=self.dtype(name), device="meta")
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise QCompilerError("a tensor cannot be read", got=error, where=f"{self.folder}: {name}") from error
        return tensor

    def part(self, name: str, ranges: Sequence[slice]) -> Tensor:
        """Reads a part of a tensor, one range of each axis, without the rest of the file.

        The file is opened for this read: with the result, the memory that maps the file is released.
        """
        try:
            opened: Any = safe_open(self._paths[name], "pt")
            tensor: Tensor = opened.get_slice(name)[tuple(ranges)]
        except (SafetensorError, OSError) as error:
            raise QCompilerError("a tensor cannot be read", got=error, where=f"{self.folder}: {name}") from error
        return tensor

    def without_data(self, names: Collection[str]) -> "TensorFiles":
        """The same tensors, but the named ones are on the meta device."""
        twin = copy(self)
        twin._outlined = names
        return twin

    def __contains__(self, name: object) -> bool:
        return name in self._types  # the inherited method would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._types)

    def __len__(self) -> int:
        return len(self._types)

    def dtype(self, name: str) -> torch.dtype:
        """The element type of a tensor, without reading it."""
        return self._types[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._types[name][1]

    def place(self, name: str) -> str:
        """The file and the name of a tensor, for messages."""
        return f"{self._paths[name]}: {name}"

    def _open(self, file: str, expected: set[str] | None, listed: set[str]) -> None:
        """Records the tensors of one file: those that the index lists there, or all if there is no index.

        A tensor that the index does not list is an error.
        """
        path = self.folder / file
        try:
            if not path.is_file():
                raise QCompilerError(
                    "a file of the checkpoint is missing", got=str(path), need="each file of the index"
                )
            if not os.access(path, os.R_OK):
                got = os.strerror(errno.EACCES)
                raise QCompilerError("a file of the checkpoint cannot be read", got=got, where=str(path))
            opened: Any = safe_open(path, "pt")
            found = {*opened.keys()}
            if lost := sorted((expected or set()) - found):
                raise QCompilerError("the index expects a tensor that is not in its file", got=lost[0], where=str(path))
            if unlisted := sorted(found - listed if listed else ()):
                fix = "Other readers load it. Remove it from the file, or list it."
                raise QCompilerError(
                    "a file has a tensor that the index does not list", got=unlisted[0], where=str(path), fix=fix
                )
            for name in sorted(found if expected is None else expected):
                part = opened.get_slice(name)
                self._types[name] = (_dtype(part.get_dtype(), path, name), tuple(part.get_shape()))
                self._files[name], self._paths[name] = opened, path
        except (SafetensorError, OSError) as error:
            fix = "It may be cut off: copy it again."
            raise QCompilerError("a file is not in safetensors format", got=error, where=str(path), fix=fix) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises QCompilerError for anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise QCompilerError("a file cannot be read as JSON", got=error, where=str(path)) from error
    if not isinstance(document, dict):
        raise QCompilerError("a file does not hold a JSON object", got=type(document).__name__, where=str(path))
    return document


def _listed(folder: Path) -> dict[str, set[str] | None]:
    """The files of a folder -> the tensors that the index lists in each, or None without an index."""
    if not folder.is_dir():
        problem = "a checkpoint is a folder, but this is a file" if folder.exists() else "there is no such folder"
        raise QCompilerError(problem, got=str(folder), fix=advice(folder))
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            got, need = f"{folder}, which has neither", f"{SINGLE} or {INDEX}, and {CONFIG}"
            raise QCompilerError("the folder holds no checkpoint", got=got, need=need, fix=advice(folder))
        return {SINGLE: None}
    path = folder / INDEX
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict):
        raise QCompilerError(
            "the index has no map of tensors", got=type(places).__name__, need="weight_map", where=str(path)
        )
    files: dict[str, set[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or not _is_plain(file):
            got = f"{file!r} for {name!r}"
            raise QCompilerError("the index leads out of the folder", got=got, need="file names", where=str(path))
        files.setdefault(file, set()).add(name)
    return {**files}


def _is_plain(file: str) -> bool:
    """Whether a name is a plain file name, without a folder, on any system."""
    plain = PurePosixPath(file).name == file == PureWindowsPath(file).name
    return plain and file not in ("", ".", "..") and "\0" not in file


def _dtype(name: str, path: Path, tensor: str) -> torch.dtype:
    if name not in DTYPES:
        need = ", ".join(DTYPES)
        raise QCompilerError("a tensor has an unknown element type", got=name, need=need, where=f"{path}: {tensor}")
    return DTYPES[name]
