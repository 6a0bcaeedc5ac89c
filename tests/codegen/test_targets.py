"""Targets are found by name and by device, including a target that another distribution adds in one file."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qcompiler
from codegen.targets import CPU, HOPPER
from qcompiler.cli import main
from qcompiler.errors import CodegenError
from qcompiler.runtime import device as devices
from qcompiler.runtime.device import check_target, target_for, target_named, target_names

TOY = '''
from types import SimpleNamespace

import torch
from qcompiler.ir import DType

from qcompiler.runtime.device import Target

CALLED = []


class Kernels:
    """Operators of a toy target: calls the CPU operators and records their names."""

    def __getattr__(self, name):
        CALLED.append(name)
        return getattr(torch.ops.qcompiler, name)


class Toy(Target):
    """Runs INT8 only."""

    def why_not(self, x, w):
        return None if x.element is DType.i8 else "the toy multiplies int8"


kernels = Kernels()
TOY = Toy("toy", "cpu", "a toy: notes of calls", kernels="from made_up_target import kernels")
WRONG = Target("another", "cpu", "another name")
'''
ENTRY_POINTS = "[qcompiler.targets]\ntoy = made_up_target:TOY\ntoy-of-another-name = made_up_target:WRONG\n"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A third-party distribution, installed."""
    (tmp_path / "made_up_target.py").write_text(TOY)
    metadata = tmp_path / "made_up_target-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up-target\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    devices._TARGETS.pop("toy", None)
    sys.modules.pop("made_up_target", None)


def mlp() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 32)).eval()


@pytest.mark.usefixtures("toy")
def test_a_target_of_another_distribution_compiles_and_runs(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(5, 64)
    fast = qcompiler.compile(model, scheme="int8_row", target="toy", example_inputs=(x,))
    called: list[str] = sys.modules["made_up_target"].CALLED
    got: Tensor = fast(x)
    assert called == ["quantize", "scaled_linear", "fused_quantize", "scaled_linear"]
    assert torch.equal(got, qcompiler.compile(model, scheme="int8_row", target="cpu", example_inputs=(x,))(x))
    assert "for toy:" in fast.source and "from made_up_target import kernels" in fast.source
    fast.save(tmp_path / "artefact")
    assert torch.equal(qcompiler.load(tmp_path / "artefact")(x), got)


@pytest.mark.usefixtures("toy")
def test_unsupported_operations_are_refused_with_the_targets_message() -> None:
    with pytest.raises(
        CodegenError,
        match=r"no kernel of the target toy supports the formats of pass '.*': got the toy multiplies int8",
    ):
        qcompiler.compile(mlp(), scheme="fp8_row", target="toy", example_inputs=(torch.randn(5, 64),))


@pytest.mark.usefixtures("toy")
def test_it_is_listed_and_named_but_ours_have_priority(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"cpu", "sm_90a", "toy", "cuda", "auto"} <= set(target_names())
    check_target("toy")
    assert target_for("auto", torch.device("cpu")) is CPU
    assert main(["completion", "bash"]) == 0
    assert "toy" in capsys.readouterr().out
    with pytest.raises(CodegenError, match=r"an entry point does not provide its target: got 'toy-of-another-name = "):
        target_named("toy-of-another-name")


def test_cuda_is_the_target_of_the_device_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, found = torch.device("cuda", 0), {"capability": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: found["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    assert target_for("cuda", gpu) is target_for("auto", gpu) is target_for("sm_90a", gpu) is HOPPER
    found["capability"] = (10, 0)
    for name in ("cuda", "auto", "sm_90a"):
        says = r"a GPU cannot run the kernels of the target sm_90a: got compute capability 10\.0; need 9\.0 \(Hopper\)"
        with pytest.raises(CodegenError, match=says):
            target_for(name, gpu)
    with pytest.raises(CodegenError, match="the target cpu runs on cpu, but the model is on another device: got cuda"):
        target_for("cpu", gpu)
    with pytest.raises(CodegenError, match="no target runs on the model's device: got meta; need cpu or cuda"):
        target_for("auto", torch.device("meta"))
