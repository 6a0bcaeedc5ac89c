"""torch's own packages of a compiled model: `.pt2` by torch.export.save, and a compiled one by AOTInductor."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompiler

# What torch's own code does, not ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
]

LOAD = """
import sys, torch
kind, package, call = sys.argv[1:]

def load():
    return torch.export.load(package).module() if kind == "export" else torch._inductor.aoti_load_package(package)

try:
    load()
except Exception as error:
    print("without the operators:", type(error).__name__)
import codegen.torch_ops
model = load()
for x, y in torch.load(call):
    print(torch.equal(model(x), y))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.export.ExportedProgram, Path]:
    """A model that was compiled, saved, loaded and exported; and calls of it with their answers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pt2")
    layers = nn.Sequential(nn.Linear(200, 136), nn.ReLU(), nn.LayerNorm(136), nn.Linear(136, 64)).eval()
    qcompiler.compile(layers, example_inputs=(torch.randn(5, 200),)).save(folder / "model")
    fast = qcompiler.load(folder / "model")
    calls = [torch.randn(rows, 200) for rows in (5, 2, 130)]
    torch.save([(x, fast(x)) for x in calls], folder / "calls.pt")
    shapes = {"input": {0: torch.export.Dim("rows", min=2, max=4096)}}
    return torch.export.export(fast, (calls[0],), dynamic_shapes=shapes), folder


def loaded_elsewhere(kind: str, package: Path, folder: Path) -> list[str]:
    command = [sys.executable, "-c", LOAD, kind, str(package), str(folder / "calls.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_export_save(program: tuple[torch.export.ExportedProgram, Path]) -> None:
    exported, folder = program
    torch.export.save(exported, folder / "model.pt2")
    lines = loaded_elsewhere("export", folder / "model.pt2", folder)
    assert lines == ["without the operators: RuntimeError", "True", "True", "True"]
    weights = (folder / "model" / "weights.safetensors").stat().st_size
    assert weights < (folder / "model.pt2").stat().st_size < weights + 60_000, "each weight once"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler, and there is no g++")
@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="passes None to operators that are written in Python")
def test_aotinductor(program: tuple[torch.export.ExportedProgram, Path]) -> None:
    exported, folder = program
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # a third less time in the C++ compiler
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(folder / "aoti.pt2"), inductor_configs=quick
    )
    assert loaded_elsewhere("aoti", Path(package), folder) == [
        "without the operators: RuntimeError", "True", "True", "True"
    ]  # fmt: skip
