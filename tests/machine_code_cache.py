"""Compiled and disassembled kernels, kept on disk between test runs and shared by the workers of one run.

The folder is outside the checkout and is addressed by content: Triton's own cache key (its version, the source of a
kernel and of all that it calls, constants, types, options) and the source of `codegen/machine_code.py`. A fresh machine
fills the folder. An entry begins with the digest of the rest, so a damaged entry is compiled again.
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
DAYS = 30  # an entry that no run has read for as long is deleted
Compile = Callable[[ASTSource, GPUTarget, dict[str, Any]], MachineCode]


def kept(compile_source: Compile, folder: Path = FOLDER) -> Compile:
    """The function, which now looks into the folder first and writes to it what it has compiled."""

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
    """What an entry holds, or None if there is none or it is damaged."""
    try:
        digest, _, packed = path.read_bytes().partition(b"\n")
        if digest != _digest(path, packed):
            return None
        os.utime(path)
    except OSError:
        return None
    return MachineCode(**json.loads(zlib.decompress(packed)))


def write(path: Path, code: MachineCode) -> None:
    """Replaces an entry at once, so that no worker reads half of it; does nothing if the disk is full or read-only."""
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
    # With the name, so that an entry under another entry's name is damaged, too.
    return hashlib.sha256(path.name.encode() + packed).hexdigest().encode()
