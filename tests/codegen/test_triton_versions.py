"""One configuration of every kernel, compiled with the oldest and the newest supported Triton.

`make test` installs these versions next to the environment (as `.venv/triton-3.6` and so on) without matching torch
versions: a child process that finds one of them before the installed Triton compiles for Hopper with it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
VERSIONS = ("3.6", "3.9")

# Compiles the first entry of KERNELS for each kernel, and stops the others before compilation.
CHILD = """
import json, sys
import triton
import machine_code_cache, test_interfaces, test_kernel_budgets
from codegen import machine_code
from codegen.targets import cuda
from triton.runtime.jit import JITFunction

modules = [module for name, module in sys.modules.items() if name.startswith("codegen.templates.")]
kernels = {each.__name__ for module in modules for each in vars(module).values() if isinstance(each, JITFunction)}
done, rows = set(), []

class Again(Exception):
    pass

def compile_first(call, *rest, real=cuda.compile_call):
    if call.kernel.__name__ in done:
        raise Again
    done.add(call.kernel.__name__)
    return real(call, *rest)

cuda.compile_call = compile_first
machine_code.compile_source = machine_code_cache.kept(machine_code.compile_source)
for name, build in test_kernel_budgets.KERNELS.items():
    try:
        code = build()
    except Again:
        continue
    rows.append((name, *test_kernel_budgets.numbers(code)))
missed = sorted(kernels - done)
print(json.dumps(dict(version=triton.__version__, rows=rows, missed=missed, gone=test_interfaces.gone(["triton"]))))
"""


def compiled_with(folder: Path) -> dict[str, Any]:
    """The results of the child process with the Triton in this folder."""
    path = os.pathsep.join(map(str, (folder, ROOT, TESTS, TESTS / "codegen")))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_kernel_compiles_without_spills(version: str, record_property: Callable[[str, object], None]) -> None:
    folder = Path(sys.prefix, f"triton-{version}")
    if not folder.exists():
        pytest.skip(
            f"Triton {version} is not installed next to this venv: pip could not fetch it when `make test` started"
        )
    found = compiled_with(folder)
    assert found["version"].startswith(f"{version}.")
    assert not found["gone"], "names of Triton that the packages use and this version lacks"
    assert not found["missed"], "kernels that no entry of KERNELS in test_kernel_budgets.py compiles"
    assert len(found["rows"]) >= 15
    for name, *numbers in found["rows"]:
        assert numbers[-1] == 0, f"{name} spills registers"
        record_property("budget", [f"Triton {version}: {name}", *numbers])
