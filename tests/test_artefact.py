"""`compiled.save` and `qcompiler.load`: what comes back is what was saved, in every bit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler.artefact.checking import check


class Mlp(nn.Module):
    """Sizes that 128 does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(200, 136), nn.Linear(136, 64)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        """What the model does."""
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y if scale is None else y * scale


@pytest.fixture(scope="module")
def fast() -> qcompiler.CompiledModel:
    torch.manual_seed(0)
    return qcompiler.compile(Mlp().eval(), example_inputs=(torch.randn(4, 200),))


X = torch.randn(5, 200, generator=torch.Generator().manual_seed(1))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_loaded_model_gives_equal_bits(fast: qcompiler.CompiledModel, tmp_path: Path) -> None:
    fast.save(tmp_path / "model")
    loaded = qcompiler.load(tmp_path / "model")
    assert torch.equal(loaded(X), fast(X))
    assert check(tmp_path / "model").ok


def test_it_shows_all_that_the_compiled_model_shows(fast: qcompiler.CompiledModel, tmp_path: Path) -> None:
    fast.save(tmp_path / "model")
    loaded = qcompiler.load(tmp_path / "model")
    assert str(loaded.graph) == str(fast.graph)
    assert {name: str(graph) for name, graph in loaded.stages.items()} == {
        name: str(graph) for name, graph in fast.stages.items()
    }
    assert (loaded.steps, loaded.report, loaded.source) == (fast.steps, fast.report, fast.source)
    assert (loaded.pipeline, loaded.calibration) == (fast.pipeline, None)
    assert loaded.settings.scheme == "fp8_tile"


def test_saving_a_loaded_model_gives_identical_files(fast: qcompiler.CompiledModel, tmp_path: Path) -> None:
    fast.save(tmp_path / "first")
    qcompiler.load(tmp_path / "first").save(tmp_path / "second")
    assert files(tmp_path / "first") == files(tmp_path / "second")
