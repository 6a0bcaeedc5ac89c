"""Targets are found by name and by device; one more, and one more kernel variant, need one file each."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import codegen.targets
import codegen.torch_ops
import qcompiler
from codegen.operators.operator import OPERATORS
from codegen.targets.cpu import CPU
from codegen.targets.cuda import gpu_at
from codegen.targets.hopper import HOPPER
from codegen.templates.gemm import GEMM, GemmConfig, GemmOperands, GemmProblem, Pace, by_kind
from codegen.templates.grouped import GROUPED_GEMM, GroupedProblem
from codegen.templates.narrow import NarrowGemm
from codegen.templates.quantize import QUANTIZE, QuantizeProblem
from qcompiler.cli import main
from qcompiler.entry_points import import_modules
from qcompiler.errors import CodegenError
from qcompiler.runtime import device as devices
from qcompiler.runtime.device import check_target, target_for, target_named, target_names

E4M3 = torch.float8_e4m3fn

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
    monkeypatch.setattr(devices, "_TARGETS", dict(devices.known_targets()))
    yield
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


def test_a_file_in_our_folder_is_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here.py").write_text(
        "from qcompiler.runtime.device import Target, register\nHERE = register(Target('here', 'cpu', 'a toy'))\n"
    )
    monkeypatch.setattr(codegen.targets, "__path__", [*codegen.targets.__path__, str(tmp_path)])
    monkeypatch.setattr(devices, "_TARGETS", dict(devices.known_targets()))
    import_modules.cache_clear()
    assert target_named("here").doc == "a toy"
    sys.modules.pop("codegen.targets.here")


GENERATION = """
from triton.backends.compiler import GPUTarget

from codegen.targets.cuda import CudaTarget
from codegen.templates.gemm import GEMM, GemmConfig, Pace, by_kind
from codegen.templates.limits import Limits
from codegen.templates.warp import WarpGemm

NEXT = CudaTarget(
    "next", "cuda", "a toy: the next generation", kernels="from codegen.direct import kernels", generation="Next",
    capability=(10, 0), gpu=GPUTarget("cuda", 90, 32), limits=Limits(multiprocessors=148, shared_memory=200_000),
)
SMALL, LARGE = GemmConfig(128, 64, 128, 8, 6, 16, "warp"), GemmConfig(256, 128, 128, 8, 4, 16, "warp")
PACES = {SMALL: Pace(270, 280, 1400, 3100), LARGE: Pace(1, 1, 1, 3100)}
GEMM.add(WarpGemm, by_kind({("tiles", 128): PACES}), on="next")
"""


@pytest.fixture
def _registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restores the templates of the matmul and the targets of devices."""
    GEMM.family(HOPPER)  # imports all templates
    monkeypatch.setattr(GEMM, "_entries", list(GEMM._entries))
    monkeypatch.setattr(GEMM, "_families", {})
    gpu_at.cache_clear()
    yield
    gpu_at.cache_clear()


@pytest.mark.usefixtures("toy", "_registries")
def test_a_gpu_generation_of_another_distribution_reuses_templates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_up_target.py").write_text(TOY + GENERATION)
    entries = tmp_path / "made_up_target-1.0.dist-info" / "entry_points.txt"
    entries.write_text("[qcompiler.targets]\nnext = made_up_target:NEXT\n")
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    found = gpu_at(gpu)
    assert found.name == "next" and target_for("cuda", gpu) is found and gpu_at(gpu) is found
    gemm, problem = GEMM.family(found), GemmProblem(4096, 4096, 4096, sms=found.limits.multiprocessors)
    assert str(gemm.choose(problem)) == "warp 128x64x128, 8 warps, 6 stages, groups of 16"
    refused = next(config for config in gemm.configs(problem) if config.block_m == 256)
    assert gemm.why_not(refused, problem) == ("4 stages need 235520 bytes of shared memory, a block may use 200000")
    x, w, out = (torch.empty(4096, 4096, dtype=dtype, device="meta") for dtype in (E4M3, E4M3, torch.bfloat16))
    scales = torch.empty(32, 4096, device="meta")
    (call,) = gemm.calls(gemm.choose(problem), GemmOperands(x, w, out, scales.t(), scales[:, :32]))
    assert call.programs == 148
    assert QUANTIZE.family(found).choose(QuantizeProblem(16, 4096, (1, 128))).variant == "tiles"
    with pytest.raises(CodegenError, match=r"can run this grouped GEMM: got .*The target has no template for it\."):
        GROUPED_GEMM.family(found).choose(GroupedProblem(16))
    assert GEMM.family(HOPPER).choose(problem) != gemm.choose(problem)


@pytest.mark.usefixtures("_registries")
def test_a_kernel_variant_is_its_template() -> None:
    class Quick(NarrowGemm):
        variant = "quick"

    config, problem = GemmConfig(16, 128, 128, 4, 4, 1, "quick"), GemmProblem(16, 4096, 4096)
    before = GEMM.family(HOPPER).choose(problem)
    GEMM.add(Quick, by_kind({("tiles", 128): {config: Pace(1, 1, 1, 1_000_000)}}), on="sm_90a")
    family = GEMM.family(HOPPER)
    assert before != family.choose(problem) == config and config in family.configs(problem)
    assert isinstance(family.template(config), Quick)


@pytest.mark.usefixtures("_registries")
@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_operators_run_on_gpus_without_a_target(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert gpu_at(torch.device("cuda", 0)) is HOPPER


@pytest.mark.usefixtures("_registries")
def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    with pytest.raises(CodegenError, match=r"this GPU has no FP8: got a GPU, compute capability 8\.0; need .* 8\.9"):
        gpu_at(torch.device("cuda", 0))


def test_each_operator_is_declared_once_and_registered() -> None:
    assert {"quantize", "quantize_static", "scaled_linear", "fused_quantize", "fused_linear"} <= OPERATORS.keys()
    for name in OPERATORS:
        for key in ("CPU", "CUDA", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qcompiler::{name}", key)
