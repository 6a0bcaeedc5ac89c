"""Compiled and disassembled kernels, kept on disk across test runs: see `kept_files`.

A key hashes Triton's own cache key (its version, the source of a kernel and of all functions that it calls, constants,
types, options) and the source of `codegen/machine_code.py`.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kept_files
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key

from codegen import machine_code
from codegen.machine_code import MachineCode

FOLDER = kept_files.FOLDER / "machine-code"
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
    packed = kept_files.read(path)
    return None if packed is None else MachineCode(**json.loads(zlib.decompress(packed)))


def write(path: Path, code: MachineCode) -> None:
    """Replaces an entry; does nothing if the disk is full or read-only."""
    kept_files.write(path, zlib.compress(json.dumps(asdict(code)).encode(), 1))
