"""The choice of an assembler: Triton's own by default, the newest that the driver can load, or one at a path."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import triton
from triton.backends.nvidia import compiler

from codegen import assembler
from codegen.assembler import Assembler, current, newest, use_assembler
from codegen.compile_options import compile_options
from qcompiler import knobs
from qcompiler.errors import CodegenError


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's own assembler again after the test."""
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")  # Triton sets it; this restores it after the test
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    use_assembler.cache_clear()
    yield
    del triton.knobs.nvidia.ptxas
    use_assembler.cache_clear()
    compiler.get_ptxas_version.cache_clear()


def ptxas(folder: Path, says: str) -> str:
    """A program that only says its version."""
    path = folder / "ptxas"
    folder.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, {says}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Assemblers of versions 98.1 and 99.4 on this machine."""
    made = [ptxas(tmp_path / name, f"release {name}, V{name}.1") for name in ("98.1", "99.4")]
    monkeypatch.setattr(assembler, "installed", lambda: iter([*map(Path, made), tmp_path / "none"]))
    return made


def test_tritons_own_is_the_default(two: list[str]) -> None:
    before = current()
    compile_options({})
    assert current() == before and "triton" in before.path and before.version >= (12, 8)


@pytest.mark.parametrize(("driver", "version"), [(None, (99, 4)), (99040, (99, 4)), (99030, (98, 1)), (98010, (98, 1))])
def test_the_newest_that_the_driver_can_load(
    driver: int | None, version: tuple[int, int], two: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembler, "driver_version", lambda: driver)
    with knobs.scope(ptxas="auto"):
        compile_options({})
    assert current() == newest() == Assembler(version, two[version == (99, 4)])
    assert f"release {version[0]}.{version[1]}" in compiler.get_ptxas_version(90), "part of the key of kernels"


def test_an_old_driver_keeps_tritons_own(two: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = current()
    monkeypatch.setattr(assembler, "driver_version", lambda: 12040)
    assert newest() == before


def test_the_users_choice_for_triton_is_kept(two: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", two[0])
    with knobs.scope(ptxas="auto"):
        use_assembler()
    assert current().path == two[0]


def test_a_path(two: list[str]) -> None:
    with knobs.scope(ptxas=two[1]):
        use_assembler()
    assert str(current()) == f"ptxas 99.4 ({two[1]})"


def test_what_is_not_an_assembler_is_rejected(tmp_path: Path) -> None:
    old = ptxas(tmp_path / "old", "release 11.8, V11.8.1")
    for path, got in ((str(tmp_path), f"got {tmp_path}"), ("best", "got best"), (old, "got ptxas 11.8")):
        with (
            knobs.scope(ptxas=path),
            pytest.raises(CodegenError, match=rf"QCOMPILER_PTXAS does not name an assembler: {got}"),
        ):
            use_assembler()


def test_a_newer_assembler_compiles_kernels(tmp_path: Path) -> None:
    """In another process, because the choice is made once."""
    code = (
        "from hopper_kernels import compile_quantize\nfrom codegen.assembler import current\n"
        "print(compile_quantize().registers > 0, current())"
    )
    tests = Path(__file__).parents[1]
    environment = os.environ | {
        "QCOMPILER_PTXAS": "auto", "QCOMPILER_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests))),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"True {newest()}\n"
