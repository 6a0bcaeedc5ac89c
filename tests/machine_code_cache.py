"""Compiled and disassembled kernels, kept on disk across test runs and shared by the workers of a run.

The folder is outside the checkout. A key hashes Triton's own cache key (its version, the source of a kernel and of all
functions that it calls, constants, types, options) and the source of `codegen/machine_code.py`. A new machine starts
with an empty folder. An entry begins with the digest of the rest, so a damaged entry is compiled again.
"""

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key

from codegen import machine_code
from codegen.machine_code import MachineCode

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "qcompiler", "machine-code")
DAYS = 30  # entries not read for this many days are deleted
Compile = Callable[[ASTSource, GPUTarget, dict[str, Any]], MachineCode]


def kept(compile_source: Compile, folder: Path = FOLDER) -> Compile:
    """Wraps the function: looks in the folder first, and stores what it compiles."""

    def look_or_compile(source: ASTSource, gpu: GPUTarget, options: dict[str, Any]) -> MachineCode:
        path = folder / key(source, gpu, options)
        if (found := read(path)) is None:
            found = compile_source(source, gpu, options)
            write(path, found)
        return found

    return look_or_compile


def key(source: ASTSource, gpu: GPUTarget, options: dict[str, Any]) -> str:
    """The name of a kernel's entry."""
    backend = make_backend(gpu)
    parsed = backend.parse_options({**options, **source.parse_options()})
    parts = (get_cache_key(source, backend, parsed, env_vars=get_cache_invalidating_env_vars()), str(gpu))
    return hashlib.sha256(b"\0".join([Path(machine_code.__file__).read_bytes(), *map(str.encode, parts)])).hexdigest()


def read(path: Path) -> MachineCode | None:
    """The content of an entry, or None if it does not exist or is damaged."""
    try:
        digest, _, packed = path.read_bytes().partition(b"\n")
        if digest != _digest(path, packed):
            return None
        os.utime(path)
    except OSError:
        return None
    return MachineCode(**json.loads(zlib.decompress(packed)))


def write(path: Path, code: MachineCode) -> None:
    """Replaces an entry atomically; does nothing if the disk is full or read-only."""
    packed = zlib.compress(json.dumps(asdict(code)).encode(), 1)
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(_digest(path, packed) + b"\n" + packed)
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def delete_old(folder: Path = FOLDER) -> None:
    """Deletes the entries of kernels that are no longer compiled."""
    for path in folder.glob("*"):
        if time.time() - path.stat().st_mtime > DAYS * 86400:
            path.unlink(missing_ok=True)


def _digest(path: Path, packed: bytes) -> bytes:
    # The digest covers the name, so an entry stored under another name counts as damaged.
    return hashlib.sha256(path.name.encode() + packed).hexdigest().encode()
