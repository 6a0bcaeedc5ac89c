"""Modules compiled by IREE, kept on disk across test runs: see `kept_files`.

A key hashes the module's text, the CPU, the version of IREE, and the source of `codegen/mlir/iree/building.py`, which
has the compiler's options.
"""

import hashlib
import platform
from collections.abc import Callable
from pathlib import Path

import kept_files

from codegen.mlir.iree import building
from codegen.mlir.module import MlirModule

FOLDER = kept_files.FOLDER / "iree"
Compile = Callable[[MlirModule, str], bytes]


def kept(compile_module: Compile, folder: Path = FOLDER) -> Compile:
    """Wraps the function: looks in the folder first, and stores what it compiles."""

    def look_or_compile(module: MlirModule, cpu: str = "generic") -> bytes:
        path = folder / key(module, cpu)
        if (found := kept_files.read(path)) is None:
            found = compile_module(module, cpu)
            kept_files.write(path, found)
        return found

    return look_or_compile


def key(module: MlirModule, cpu: str) -> str:
    """The name of a module's entry."""
    parts = (building.compiler_version(), platform.machine(), cpu, module.text)
    return hashlib.sha256(b"\0".join([Path(building.__file__).read_bytes(), *map(str.encode, parts)])).hexdigest()
