"""Models compiled by IREE for the CPU, against the interpreter; the folder they are in; what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.compiler import CompiledModel
from qcompiler.errors import InputError
from qcompiler.interpreter import interpret

pytest.importorskip("torch_mlir", reason="needs the extra mlir")
pytest.importorskip("iree.compiler", reason="needs the extra iree")
pytest.importorskip("iree.runtime", reason="needs the extra iree")


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(256)
        self.up, self.down = nn.Linear(256, 384), nn.Linear(384, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def compiled_perceptron() -> tuple[Perceptron, CompiledModel]:
    torch.manual_seed(0)
    model = Perceptron().eval()
    return model, qcompiler.compile(model, scheme="fp8_tile", example_inputs=(torch.randn(7, 256),))


def interpreted(compiled: CompiledModel, model: nn.Module, stage: str | None, inputs: list[Any]) -> Any:
    graph = compiled.graph if stage is None else compiled.stages[stage]
    return interpret(graph, inputs, {**model.state_dict(), **compiled.graph.weights})


@pytest.mark.parametrize("stage", ["captured", None])
def test_a_perceptron(tmp_path: Path, stage: str | None) -> None:
    model, compiled = compiled_perceptron()
    built = compiled.to_iree(tmp_path / "model", stage)
    for rows in (1, 7, 130):
        x = torch.randn(rows, 256)
        want, = interpreted(compiled, model, stage, [x])
        assert (built(x) - want).norm() / want.norm() < 1e-4, rows
