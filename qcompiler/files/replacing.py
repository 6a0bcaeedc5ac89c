"""A file or a folder that takes another one's place whole: whoever looks sees the old or the new, never half of it.

Of a folder `model` a process makes these, beside it:

    .model.1f….qcompiler-new   the new one, until all of it is on the disk
    .model.qcompiler-old       the old one, from the moment it steps aside until the new one has its place

A process that dies leaves one of three things: the old folder and a half new one; the new folder and the old one aside;
or, between two renames, the old one aside and a whole new one. Whoever saves or loads next puts the old one back, or
removes what is left over. Locks on the parent folder keep two of them from doing so at once.
"""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from qcompiler.errors import QCompilerError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a used up quota, a limit on the size of files

E = TypeVar("E", bound=QCompilerError)


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """A path beside `target`, whose file takes its place when the block ends well, and is gone when it does not.

    Raises:
        OSError: A folder is at `target`, or none around it; before the block begins, and in the user's words for it.
    """
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(target.parent))
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing(target: Path, failed: Callable[[OSError], QCompilerError], size: int | None = None) -> Iterator[Path]:
    """A new, empty folder, which takes the place of `target` when the block ends well, and is gone when it does not.

    Args:
        target: Its name is free, or that of a folder that may be replaced; who calls this has looked.
        failed: Makes the error, to which the place is added, that is raised when a file or folder cannot be written or
            renamed, and `target` is as it was.
        size: How many bytes will be written, if that is known; for the message of a full disk.
    """
    target = Path(os.path.abspath(target))  # "." has a name then, and a link stays one
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex}.qcompiler-new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as maker:
            with locked(target.parent):
                recover(target)
                _sweep(target)
                make_folder(work)
                maker.enter_context(locked(work))  # as long as its maker lives
            try:
                yield work
                sync_tree(work)
                with locked(target.parent):
                    _take_place(work, target)
            except BaseException:
                remove_tree(work)
                raise
    except OSError as error:
        raise not_replaced(failed(error), error, target, size) from error


def not_replaced(said: E, error: OSError, target: Path, size: int | None = None) -> E:
    """Adds to an error of writing: the place, the room that is needed if the disk is full, and that nothing changed.

    Args:
        said: The error to raise.
        error: The error of the system.
        target: The file or folder that was to be written.
        size: How many bytes were to be written, if that is known.
    """
    said.where = str(target)
    if error.errno == errno.EFBIG:
        said.need = "a higher limit on the size of files (ulimit -f)"
    elif error.errno in FULL:
        said.need = "more room" if size is None else f"room for {size:,} bytes"
        with suppress(OSError):
            folder = next(path for path in Path(os.path.abspath(target)).parents if path.is_dir())
            said.need = f"{said.need} ({shutil.disk_usage(folder).free:,} bytes are free)"
    said.fix = " ".join(filter(None, [said.fix, "Nothing was replaced."]))
    return said


def recover(target: Path) -> None:
    """Puts back a folder whose replacement was interrupted between two renames; the parent is to be locked."""
    old = _aside(target)
    if old.is_dir() and not target.exists():
        rename(old, target)


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Waits until no other process has the folder locked; where it cannot be locked, goes on without."""
    with ExitStack() as stack:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


def _take_place(work: Path, target: Path) -> None:
    old = _aside(target)
    had_one = target.exists() and any(target.iterdir())
    if had_one:
        rename(target, old)
    try:
        rename(work, target)
    except OSError:
        if had_one:
            rename(old, target)
        raise
    sync(target.parent)
    if had_one:
        remove_tree(old)


def _sweep(target: Path) -> None:
    """Removes what processes that died have left over beside a folder that is whole."""
    if target.exists():
        remove_tree(_aside(target))
    for work in target.parent.glob(f".{_escaped(target.name)}.*.qcompiler-new"):
        try:
            handle = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # its maker has just failed and removed it, or it is no folder and nobody's work
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its maker is at work, or there are no locks here
            continue
        finally:
            os.close(handle)
        remove_tree(work)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.qcompiler-old")


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "[*?" else letter for letter in name)


# Single steps on the disk


def make_folder(path: Path) -> None:
    """A new folder."""
    path.mkdir()


def rename(path: Path, target: Path) -> None:
    """Gives a folder another name, which an empty folder may have."""
    path.rename(target)


def remove_tree(path: Path) -> None:
    """Removes a folder with all that is in it, as far as that can be done."""
    shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """The same for all that is in a folder, and the folder itself."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)
