"""Runs the kernels of a test file in Triton's interpreter: in a child process, as Triton chooses it when imported."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


needs_interpreter = pytest.mark.skipif(
    _version("triton") < (3, 7) and _version("numpy") >= (2, 4),
    reason="Triton's interpreter before 3.7 does not support NumPy 2.4",
)


def run_interpreted(file: str) -> None:
    """Runs a file as a script in the interpreter; it must exit normally and print that all cases ran."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, file], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all cases ran" in done.stdout


def prepare_interpreter() -> None:
    """Makes the interpreter exact and faster. For the child process."""
    _round_fma_once()
    _patch_language_once()


def _patch_language_once() -> None:
    """Keeps the language patched: the interpreter patches it again in each call of a function, a third of its time."""
    from triton.runtime import interpreter

    patch: Any = interpreter._patch_lang
    seen: set[frozenset[int]] = set()

    def patch_once(function: Any) -> Any:
        found = (value for value in function.__globals__.values() if value is tl or value is tl.core)
        if (languages := frozenset(map(id, found))) not in seen:
            seen.add(languages)
            patch(function)
        return interpreter._LangPatchScope()  # restores nothing

    tl = interpreter.tl
    interpreter._patch_lang = patch_once


def _round_fma_once() -> None:
    """Replaces the interpreter's fused multiply-add, which also rounds the product."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(_builder: object, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        a, b, c = (each.data.astype("float64") for each in (x, y, z))
        return TensorHandle((a * b + c).astype(x.data.dtype), x.dtype.scalar)

    InterpreterBuilder.create_fma = fma
