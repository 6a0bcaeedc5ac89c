"""The next test run finds the modules that IREE compiled; damaged entries are compiled again."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch_mlir", reason="needs the extra mlir")
pytest.importorskip("iree.compiler", reason="needs the extra iree")

from iree_cache import kept

from codegen.mlir import to_mlir
from codegen.mlir.module import MlirModule
from qcompiler.ir import Graph

TEXT = """func @twice(%x: f32[s0, 4]) -> (f32[s0, 4]) where s0 in 2.. {
  %y = aten.mul.Tensor(%x, 2.0) : f32[s0, 4]
  return %y
}"""


def test_a_module_is_compiled_once_for_each_text_and_cpu(tmp_path: Path) -> None:
    done: list[bytes] = []

    def compile_module(module: MlirModule, cpu: str) -> bytes:
        done.append(f"{cpu} {len(done)}".encode())
        return done[-1]

    compiled = kept(compile_module, tmp_path)
    module = to_mlir(Graph.parse(TEXT), "linalg", "arguments")
    other = replace(module, text=f"{module.text}\n")
    assert compiled(module, "generic") == compiled(module, "generic") == b"generic 0"
    assert [compiled(other, "generic"), compiled(module, "host")] == [b"generic 1", b"host 2"]
    path = next(path for path in tmp_path.iterdir() if path.read_bytes().endswith(b"generic 0"))
    path.write_bytes(path.read_bytes()[:-1])
    assert compiled(module, "generic") == done[-1] and len(done) == 4
