"""The files of an artefact, read by name and checked against the manifest."""

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from qcompiler.artefact.manifest import NAME, Manifest, read_manifest
from qcompiler.artefact.strict_json import AGAIN, LONGEST
from qcompiler.artefact.weight_files import hash_file
from qcompiler.errors import ArtefactError
from qcompiler.program.folder_kinds import advice


@dataclass(frozen=True)
class Folder:
    """A folder with a valid manifest; other files are checked when they are requested.

    Attributes:
        path: The path of the folder.
        manifest: The manifest of the artefact.
    """

    path: Path
    manifest: Manifest

    def text(self, name: str) -> str:
        """Reads a text. Raises ArtefactError if its size or hash differs from the manifest."""
        path = self.checked(name)
        data = read_bytes(path)
        if hashlib.sha256(data).hexdigest() != self.manifest.files[name].sha256:
            raise edited(path)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ArtefactError("a file of the artefact is not text", got=error, where=str(path), fix=AGAIN) from None

    def checked(self, name: str) -> Path:
        """The path of a listed file. Raises ArtefactError if it is missing or its size differs."""
        path = self.path / name
        size, listed = _size(path), self.manifest.files[name].size
        if size != listed:
            problem = "a file of the artefact is cut off" if size < listed else "a file of the artefact has grown"
            raise ArtefactError(problem, got=f"{size} bytes", need=listed, where=str(path), fix=AGAIN)
        return path

    def verify(self, name: str) -> None:
        """Hashes a whole file. Raises ArtefactError if it differs from the manifest."""
        path = self.checked(name)
        try:
            same = hash_file(path) == self.manifest.files[name]
        except OSError as error:
            raise ArtefactError("a file of the artefact cannot be read", got=error, where=str(path)) from error
        if not same:
            raise edited(path)


def open_folder(path: Path) -> Folder:
    """Opens the folder at `path`. Raises ArtefactError if it is missing or is not an artefact."""
    if not path.is_dir():
        need = "a folder that compiled.save wrote"
        raise ArtefactError("there is no artefact", got=path, need=need, fix=advice(path))
    file = path / NAME
    if not file.exists():
        problem = "the folder is not an artefact of qcompiler: it has no manifest"
        raise ArtefactError(problem, got=path, need=str(file), fix=advice(path))
    try:
        return Folder(path, read_manifest(read_bytes(file), file))
    except ArtefactError as error:
        error.fix = error.fix or advice(path)
        raise


def read_bytes(path: Path) -> bytes:
    """Reads a text file. Raises ArtefactError if it is too long or cannot be read."""
    if (size := _size(path)) > LONGEST:
        raise ArtefactError("a file of the artefact is too long", got=f"{size} bytes", need=LONGEST, where=str(path))
    try:
        with path.open("rb") as file:
            return file.read(LONGEST)
    except OSError as error:
        raise ArtefactError("a file of the artefact cannot be read", got=error, where=str(path)) from error


def extra_files(folder: Folder) -> list[str]:
    """Files in the folder that the manifest does not list."""
    listed = {NAME, *folder.manifest.files}
    found = (path.relative_to(folder.path).as_posix() for path in sorted(folder.path.rglob("*")) if not path.is_dir())
    return [name for name in found if name not in listed]


def check_replaceable(target: Path) -> None:
    """Raises ArtefactError unless `target` is free, an empty folder, or an artefact without other files."""
    if not target.exists() and not target.is_symlink():
        return
    fix = "Save to a folder that is new, empty, or an artefact."
    if not target.is_dir():
        raise ArtefactError("the artefact would replace a file", got=target, fix=fix)
    if not any(target.iterdir()):
        return
    try:
        folder = open_folder(target)
    except ArtefactError as error:
        raise ArtefactError(
            "the artefact would replace something else", got=error.problem, where=str(target), fix=fix
        ) from None
    if extra := extra_files(folder):
        raise ArtefactError(
            "the artefact would replace files that are not part of one",
            got=", ".join(extra[:5]),
            where=str(target),
            fix=fix,
        )


def edited(path: Path) -> ArtefactError:
    """The error for a file whose hash differs from the manifest."""
    return ArtefactError(
        "a file of the artefact was edited or damaged",
        got="another SHA-256 than in the manifest",
        where=str(path),
        fix=AGAIN,
    )


def _size(path: Path) -> int:
    try:
        found = os.stat(path)
    except OSError as error:
        raise ArtefactError(
            "a file of the artefact is missing", got=error.strerror, where=str(path), fix=AGAIN
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise ArtefactError("a file of the artefact is not a regular file", where=str(path), fix=AGAIN)
    return found.st_size
