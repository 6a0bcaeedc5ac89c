"""Another process finds compiled kernels on disk, in the requested folder."""

import os
import subprocess
import sys
from pathlib import Path

COMPILE = """
from hopper_kernels import compile_quantize
print(compile_quantize().registers)
"""


def compiled_in(folder: Path) -> tuple[str, dict[str, int]]:
    """The output of a fresh process, and the modification times of machine code in the folder afterwards."""
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (tests.parent, tests)))
    environment = {**os.environ, "QCOMPILER_CACHE_DIR": str(folder), "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    return done.stdout, {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.cubin")}


def test_a_second_process_loads_the_kernel_from_the_folder(tmp_path: Path) -> None:
    first, built = compiled_in(tmp_path / "kernels")
    second, found = compiled_in(tmp_path / "kernels")
    assert len(built) == 1
    assert (second, found) == (first, built)
