"""The assembler that turns PTX into machine code: Triton's own ptxas, or a newer one.

QCOMPILER_PTXAS=bundled    the ptxas in Triton's wheel, or the one that TRITON_PTXAS_PATH names (the default)
QCOMPILER_PTXAS=auto       the newest one on this machine whose machine code the CUDA driver can load
QCOMPILER_PTXAS=/path      this one

A newer ptxas made some GEMMs 1 to 2% faster on an H100, and a whole prefill no faster. Triton is tested with its own,
which is therefore the default.

The choice applies to everything that Triton compiles in this process. Triton's cache distinguishes kernels by the
version of the assembler.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.nvidia import compiler

from codegen.driver import driver_version
from qcompiler import knobs
from qcompiler.errors import CodegenError

BUNDLED, AUTO = "bundled", "auto"
FIRST = (12, 0)
"""The first version that knows sm_90a."""


class Assembler(NamedTuple):
    """A ptxas.

    Attributes:
        version: Of the CUDA toolkit that it belongs to.
        path: The executable.
    """

    version: tuple[int, int]
    path: str

    def __str__(self) -> str:
        return f"ptxas {self.version[0]}.{self.version[1]} ({self.path})"


@cache
def use_assembler() -> None:
    """Makes Triton use the assembler that QCOMPILER_PTXAS names; once per process, before the first compilation.

    Raises:
        CodegenError: The variable does not name an assembler for Hopper.
    """
    wanted = knobs.current().ptxas
    if wanted == BUNDLED or (wanted == AUTO and not _is_bundled(current())):
        return
    found = newest() if wanted == AUTO else assembler_at(Path(wanted).expanduser())
    if found is None or found.version < FIRST:
        raise CodegenError(
            "QCOMPILER_PTXAS does not name an assembler",
            got=found or wanted,
            need=f"{BUNDLED!r}, {AUTO!r}, or the path of a ptxas of version {FIRST[0]}.{FIRST[1]} or later",
        )
    triton.knobs.nvidia.ptxas = found.path
    compiler.get_ptxas_version.cache_clear()  # part of the key of each compiled kernel


def current() -> Assembler:
    """The assembler that Triton uses; raises CodegenError if its wheel has none."""
    try:
        tool = triton.knobs.nvidia.ptxas
    except RuntimeError as error:
        raise CodegenError("this Triton has no assembler", got=error) from error
    return Assembler(_version(tool.version), tool.path)


def newest() -> Assembler:
    """The newest assembler on this machine whose machine code the CUDA driver can load, or Triton's."""
    driver, own = driver_version(), current()
    most = None if driver is None else (driver // 1000, driver % 1000 // 10)
    others = (assembler_at(path) for path in installed())
    usable = [each for each in others if each is not None and (most is None or each.version <= most)]
    return max([own, *usable], key=lambda each: each.version)  # of equal versions, the first


def installed() -> Iterator[Path]:
    """Where CUDA toolkits, their wheels, and Triton's wheel, for later GPUs, have ptxas."""
    if (found := shutil.which("ptxas")) is not None:
        yield Path(found)
    yield from sorted(Path("/usr/local").glob("cuda*/bin/ptxas"))
    spec = find_spec("nvidia")
    for folder in () if spec is None else spec.submodule_search_locations or ():
        yield from sorted(Path(folder).glob("*/bin/ptxas"))
    yield Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"


@cache
def assembler_at(path: Path) -> Assembler | None:
    """The assembler at a path; None if there is none, or it does not say its version."""
    try:
        said = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+\.\d+)", said)
    return None if found is None else Assembler(_version(found[1]), str(path))


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _is_bundled(assembler: Assembler) -> bool:
    """Whether it belongs to Triton's wheel; if not, the user has chosen it."""
    return Path(triton.__file__).parent in Path(assembler.path).parents
