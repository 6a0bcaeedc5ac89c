"""Atomic replacement of a file or folder: other processes see the old or the new content, never a mix.

To replace a folder `model`, a process creates these beside it:

    .model.1f….qcompiler-new   the new folder, until it is fully on disk
    .model.qcompiler-old       the old folder, from when it is moved aside until the new one is in place

A process that dies leaves one of three states: the old folder and a partial new one; the new folder and the old one
aside; or, between the two renames, the old one aside and a complete new one. The next save or load restores the old
folder, and the next save removes the leftovers. Locks on the parent folder keep two processes from doing so at once.
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

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # full disk, exceeded quota, file size limit

E = TypeVar("E", bound=QCompilerError)


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yields a temporary path beside `target`; the file replaces `target` on success and is deleted on failure.

    Raises:
        OSError: `target` is a folder, or its parent does not exist; raised before the block runs, with the user's path.
    """
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder does not exist", str(target.parent))
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing(target: Path, failed: Callable[[OSError], QCompilerError], size: int | None = None) -> Iterator[Path]:
    """Yields a new, empty folder that replaces `target` on success and is deleted on failure.

    Args:
        target: A free name, or a folder that may be replaced; the caller has already checked.
        failed: Creates the error to raise if a file or folder cannot be written or renamed; the location is added.
            `target` is then unchanged.
        size: Number of bytes to be written, if known; for the full-disk message.
    """
    target = Path(os.path.abspath(target))  # gives "." a name, and does not resolve links
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex}.qcompiler-new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as maker:
            with locked(target.parent):
                recover(target)
                _sweep(target)
                make_folder(work)
                maker.enter_context(locked(work))  # held as long as the process lives
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
    """Adds to a write error: the location, the required space if the disk is full, and that nothing changed.

    Args:
        said: The error to raise.
        error: The OS error.
        target: The file or folder to be written.
        size: Number of bytes to be written, if known.
    """
    said.where = str(target)
    if error.errno == errno.EFBIG:
        said.need = "a higher file size limit (ulimit -f)"
    elif error.errno in FULL:
        said.need = "more room" if size is None else f"room for {size:,} bytes"
        with suppress(OSError):
            folder = next(path for path in Path(os.path.abspath(target)).parents if path.is_dir())
            said.need = f"{said.need} ({shutil.disk_usage(folder).free:,} bytes are free)"
    said.fix = " ".join(filter(None, [said.fix, "Nothing was replaced."]))
    return said


def recover(target: Path) -> None:
    """Restores a folder whose replacement was interrupted between the two renames; the parent must be locked."""
    old = _aside(target)
    if old.is_dir() and not target.exists():
        rename(old, target)


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Waits for a lock on the folder; continues without one if the folder cannot be locked."""
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
    """Removes the leftovers of dead processes beside a complete folder."""
    if target.exists():
        remove_tree(_aside(target))
    for work in target.parent.glob(f".{_escaped(target.name)}.*.qcompiler-new"):
        try:
            handle = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # its process has just failed and removed it, or it is not a folder of ours
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its process is still running, or locks are not supported here
            continue
        finally:
            os.close(handle)
        remove_tree(work)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.qcompiler-old")


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "[*?" else letter for letter in name)


# Single file system steps


def make_folder(path: Path) -> None:
    """Creates a folder."""
    path.mkdir()


def rename(path: Path, target: Path) -> None:
    """Renames a folder; the new name may be an empty folder."""
    path.rename(target)


def remove_tree(path: Path) -> None:
    """Removes a folder with all its contents, as far as possible."""
    shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file or a folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Waits until a folder and all its contents are on disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)
