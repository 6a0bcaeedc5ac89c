"""Files that tests keep on disk across runs, shared by the workers of a run.

The folder is outside the checkout; a new machine starts with an empty one. An entry begins with the digest of its name
and content, so a damaged entry counts as missing.
"""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "qcompiler")
DAYS = 30  # entries not read for this many days are deleted


def read(path: Path) -> bytes | None:
    """The content of an entry, or None if it does not exist or is damaged."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
        if digest != _digest(path, content):
            return None
        os.utime(path)
    except OSError:
        return None
    return content


def write(path: Path, content: bytes) -> None:
    """Replaces an entry atomically; does nothing if the disk is full or read-only."""
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(_digest(path, content) + b"\n" + content)
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def delete_old(folder: Path) -> None:
    """Deletes the entries that are no longer read."""
    for path in folder.glob("*"):
        if time.time() - path.stat().st_mtime > DAYS * 86400:
            path.unlink(missing_ok=True)


def _digest(path: Path, content: bytes) -> bytes:
    # The digest covers the name, so an entry stored under another name counts as damaged.
    return hashlib.sha256(path.name.encode() + content).hexdigest().encode()
