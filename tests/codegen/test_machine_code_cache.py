"""The next test run finds compiled kernels; damaged entries are compiled again."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hopper_kernels import compile_quantize
from kept_files import DAYS, delete_old
from machine_code_cache import kept, read, write

from codegen import machine_code
from codegen.machine_code import MachineCode

CODE = MachineCode(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, "  /*0000*/  QGMMA ;")


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[MachineCode]:
    """Kernels compiled because a new folder did not contain them; compilation is faked."""
    done: list[MachineCode] = []

    def compile_source(*arguments: object) -> MachineCode:
        done.append(replace(CODE, registers=len(done)))
        return done[-1]

    monkeypatch.setattr(machine_code, "compile_source", kept(compile_source, tmp_path / "kept"))
    return done


def test_a_kernel_is_compiled_once_for_each_set_of_options(compiled: list[MachineCode]) -> None:
    assert compile_quantize() == compile_quantize() == compiled[0]
    assert compile_quantize(scale_layout="col_major") == compiled[1]
    assert compile_quantize(profile="ue8m0") == compiled[2]
    assert compile_quantize() == compiled[0] and len(compiled) == 3


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "another entry"])
def test_a_damaged_entry_is_compiled_again(damage: str, compiled: list[MachineCode], tmp_path: Path) -> None:
    compile_quantize()
    (path,) = (tmp_path / "kept").iterdir()
    data = path.read_bytes()
    if damage == "another entry":
        compile_quantize(profile="ue8m0")
        data = next(other for other in path.parent.iterdir() if other != path).read_bytes()
    damaged = {"truncated": data[:-1], "changed": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}
    path.write_bytes(damaged.get(damage, data))
    assert read(path) is None
    assert compile_quantize() == compiled[-1] == read(path)


def test_a_read_only_folder_is_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    write(tmp_path / "file" / "entry", CODE)
    assert read(tmp_path / "file" / "entry") is None


def test_old_entries_are_deleted(tmp_path: Path) -> None:
    for name, days in (("old", DAYS + 1), ("young", DAYS - 1)):
        write(tmp_path / name, CODE)
        os.utime(tmp_path / name, (time.time() - days * 86400,) * 2)
    delete_old(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["young"]
