"""Warm-up without a GPU: sizes become calls, calls become kernels, and Triton compiles these for Hopper.

Triton's driver is replaced by a fake that reports a Hopper GPU and loads nothing, and our operators by one whose CPU
implementation launches a kernel as the GPU implementation does.
"""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import triton
from hopper_kernels import launch_quantize
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import qcompiler
from codegen.gemm import tuned
from codegen.kernels.quantize import quantize_tiles
from codegen.launching import launch as launching
from codegen.launching import replay, warmup
from codegen.launching.launch import KernelCall
from codegen.launching.warmup import Blank, Warmup, products_of, warm_up
from codegen.targets.hopper import HOPPER
from codegen.templates.gemm import GemmProblem
from qcompiler.capture.signature import Signature
from qcompiler.compiler.model import CompiledModel
from qcompiler.compiler.sizing import USUAL_ROWS, calls_to_plan
from qcompiler.errors import CaptureError, CodegenError, InputError

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn


class Mlp(torch.nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(256, 128), torch.nn.Linear(128, 256)

    def forward(self, x: Tensor) -> Tensor:
        """x[batch, tokens, 256]."""
        y: Tensor = self.down(torch.nn.functional.relu(self.up(x)))
        return y


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return qcompiler.compile(Mlp().eval(), example_inputs=(torch.randn(2, 8, 256),))


@pytest.fixture(scope="module")
def signature(compiled: CompiledModel) -> Signature:
    return compiled.signature


# From sizes to calls


def shapes(calls: list[list[Any]]) -> list[tuple[int, ...]]:
    return [tuple(call[0].shape[:2]) for call in calls]


@pytest.mark.parametrize(
    ("rows", "sizes", "expected"),
    [
        (None, {}, [(1, rows) for rows in USUAL_ROWS]),
        ([1, 16, 500], {}, [(1, 1), (1, 16), (1, 500)]),
        ([7, 7], {}, [(1, 7)]),
        (None, {"s0": 3}, [(3, 1)]),
        (None, {"s1": [5, 6], "s0": (1, 2)}, [(1, 5), (1, 6), (2, 5), (2, 6)]),
        ([9], {"s0": 4, "s1": range(2, 4)}, [(4, 2), (4, 3), (1, 9)]),
    ],
)
def test_sizes_become_calls(
    signature: Signature, rows: list[int] | None, sizes: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    assert shapes(calls_to_plan(signature, (), rows, sizes)) == expected


def test_real_calls_are_used_as_they_are(signature: Signature) -> None:
    x = torch.randn(3, 5, 256)
    calls = calls_to_plan(signature, (x, (x,), {"x": x}), None, {})
    assert len(calls) == 3 and all(call[0] is x for call in calls)


@pytest.mark.parametrize(
    ("rows", "sizes", "says"),
    [
        (None, {"s7": 1}, r"no such size: got s7\. Did you mean 's"),
        (None, {"s0": -1}, "s0 has a wrong value: got -1; need one size or several"),
        ([], {}, "rows has a wrong value: got none"),
        (["16"], {}, "rows has a wrong value: got 16"),
    ],
)
def test_wrong_sizes_are_refused(
    compiled: CompiledModel, rows: list[Any] | None, sizes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        compiled.warmup(rows=rows, **sizes)


class Bounded(torch.nn.Module):
    """A model whose sizes are bounded and depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Linear(128, 128)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x[n, 128], y[2 n, 128]."""
        z: Tensor = self.down(torch.cat([x, y]))
        return z


def test_bounds_and_relations_between_sizes_are_kept() -> None:
    n = torch.export.Dim("n", min=4, max=64)
    pair = torch.randn(8, 128), torch.randn(16, 128)
    model = qcompiler.compile(Bounded().eval(), example_inputs=pair, dynamic_shapes={"x": {0: n}, "y": {0: 2 * n}})
    calls = calls_to_plan(model.signature, (), None, {})
    assert [(x.shape[0], y.shape[0]) for x, y in calls] == [(4, 8), (8, 16), (16, 32), (32, 64), (64, 128)]
    assert all(blank.dtype == torch.float32 and blank.device == CPU for call in calls for blank in call)
    fixed = qcompiler.compile(Bounded().eval(), example_inputs=pair, dynamic_shapes=None)
    (call,) = calls_to_plan(fixed.signature, (), [1, 2, 3], {})
    assert [blank.shape for blank in call] == [(8, 128), (16, 128)]


def test_the_cpu_target_reports_that_it_has_no_kernels(compiled: CompiledModel) -> None:
    done = compiled.warmup(rows=[1, 2])
    assert done.kernels == () and done.calls == 2 and "no kernels" in str(done)
    assert "no kernels" in str(compiled.tune(rows=[1, 2]))


def test_a_model_that_is_not_captured_yet() -> None:
    model = qcompiler.compile(Mlp().eval())
    with pytest.raises(CaptureError, match="not captured yet"):
        model.warmup(rows=[1])
    assert model.warmup(torch.randn(2, 8, 256)).calls == 1
    assert model.graph.inputs


# From calls to kernels


class Driver:
    """Replaces Triton's driver, with a fake GPU."""

    loaded: ClassVar[list[str]] = []

    class launcher_cls:  # noqa: N801  (Triton's name)
        """Replaces Triton's launcher."""

        global_scratch_size = profile_scratch_size = 0
        launch_cooperative_grid = launch_pdl = False
        arg_annotations = kernel_signature = ()

        def __init__(self, src: Any, metadata: Any) -> None:
            self.launch: Any = [].append

    class utils:  # noqa: N801
        """Replaces the C part of Triton's driver."""

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448}

        @staticmethod
        def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
            assert kernel[:4] == b"\x7fELF", "no machine code"
            Driver.loaded.append(name)
            return 1, 2, 32, 0, 1024

        @staticmethod
        def unload_module(module: int) -> None:
            pass

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def _hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(tuned, "gpu_at", lambda device: HOPPER)
    monkeypatch.setattr(launching, "_COMPILED", {})
    Driver.loaded.clear()
    active = driver._active
    driver.set_active(Driver())
    yield
    for kernel in (quantize_tiles, broken):
        kernel.device_caches.clear()
    launching._COMPILED.clear()
    gc.collect()  # kernels must be unloaded by the driver that loaded them
    driver._active = active


@triton.jit  # type: ignore[untyped-decorator]
def broken(x, BLOCK: triton.language.constexpr):  # type: ignore[no-untyped-def]
    """A kernel that does not compile."""
    x.no_such_method(BLOCK)


@pytest.fixture(scope="module")
def _probe() -> Iterator[None]:
    """Our operators with a CPU implementation."""
    library = torch.library.Library("qcompiler", "FRAGMENT")
    library.define("probe(Tensor x, int block) -> Tensor")
    library.define("broken(Tensor x) -> Tensor")

    def probe(x: Tensor, block: int) -> Tensor:
        assert type(x) is Tensor and bool((x == 0).all())
        tuned.config_for(0, GemmProblem(x.shape[0], 128, x.shape[1]))
        q, scale = torch.empty(x.shape, dtype=E4M3), torch.empty(x.shape[0], x.shape[1] // block)
        launch_quantize(x, q, scale, (1, block))
        return q

    def fail(x: Tensor) -> Tensor:
        launching.launch(KernelCall(broken, 1, (x,), {"BLOCK": 4}, {"num_warps": 4}))
        return x

    library.impl("probe", probe, "CPU")
    library.impl("broken", fail, "CPU")
    torch.library.register_fake("qcompiler::probe", lambda x, block: torch.empty(x.shape, dtype=E4M3), lib=library)
    torch.library.register_fake("qcompiler::broken", torch.empty_like, lib=library)
    yield
    library._destroy()


def model(weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    y = torch.nn.functional.linear(x, weight)
    y.add_(1.0)
    probe = torch.ops.qcompiler.probe
    return probe(y, 64), probe(y, 64), probe(y[:, :128], 32), probe(y[:, 3:131], 32)


CALLS: list[list[Any]] = [
    [torch.randn(8, 256)],
    [Blank((16, 256), torch.float32, CPU)],
    [Blank((1600, 256), torch.float32, CPU)],
]


@pytest.mark.usefixtures("_hopper", "_probe")
def test_every_kernel_is_compiled_once_and_loaded() -> None:
    told: list[tuple[int, int, str]] = []
    run = partial(model, torch.randn(256, 256))
    done = warm_up(run, CALLS, CPU, lambda *given: told.append(given), workers=2)
    # For few rows and for many: one for 64 columns, one for 32, and one for unaligned rows.
    assert len(done.kernels) == 6 and done.calls == 3 and done.note is None
    assert Driver.loaded == ["quantize_tiles"] * 6
    assert [(count, of) for count, of, _ in told] == [(i, 6) for i in range(1, 7)]
    assert {name for *_, name in told} == {kernel.name for kernel in done.kernels}
    assert all(kernel.seconds > 0 for kernel in done.kernels)
    assert "6 kernels for 3 calls" in str(done) and "BLOCK_K=32" in str(done)
    assert replay.state.planner is None
    assert warm_up(run, CALLS, CPU).kernels == ()


@pytest.mark.usefixtures("_hopper", "_probe")
def test_a_failure_among_others_is_compiled_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    parse, alone = type(quantize_tiles).parse, threading.current_thread()

    def disturbed(kernel: Any) -> Any:
        if threading.current_thread() is not alone:
            raise SystemError("AST constructor recursion depth mismatch")
        return parse(kernel)

    monkeypatch.setattr(type(quantize_tiles), "parse", disturbed)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(Path(triton.knobs.cache.dir) / "another"))
    done = warm_up(partial(model, torch.randn(256, 256)), CALLS[:1], CPU)
    assert len(done.kernels) == 3 and Driver.loaded == ["quantize_tiles"] * 3
    assert all(isinstance(each.compiled.asm["cubin"], bytes) for each in launching._COMPILED.values())


@pytest.mark.usefixtures("_hopper", "_probe")
def test_gemms_are_found_without_a_kernel() -> None:
    found, note = products_of(partial(model, torch.randn(256, 256)), CALLS[:2], CPU)
    assert [(each.m, each.k) for each in found] == [(8, 256), (8, 128), (16, 256), (16, 128)] and note is None
    assert not Driver.loaded and replay.state.problems is None


@pytest.mark.usefixtures("_hopper", "_probe")
def test_data_dependent_calls_are_reported() -> None:
    def choosy(x: Tensor) -> Tensor:
        kept: Tensor = torch.ops.qcompiler.probe(x, 64)
        rest: Tensor = torch.ops.qcompiler.probe(x[x[:, 0] > 0], 32)
        return kept + rest

    done = warm_up(choosy, CALLS[1:2], CPU)
    assert len(done.kernels) == 1 and done.note is not None and "depend on data" in str(done)


@pytest.mark.usefixtures("_hopper", "_probe")
def test_a_kernel_that_does_not_compile_is_named() -> None:
    with pytest.raises(CodegenError, match=r"(?s)a kernel does not compile.*got broken\(float32\) BLOCK=4 num_warps=4"):
        warm_up(torch.ops.qcompiler.broken, [[torch.randn(4)]], CPU)
    assert replay.state.planner is None


def test_planning_does_not_change_model_state(compiled: CompiledModel) -> None:
    state = torch.zeros(4)

    def run(x: Tensor) -> Tensor:
        state.add_(1.0)
        return x * state

    plan: Callable[..., str | None] = warmup._plan
    assert plan(run, [torch.ones(4)], lambda *_: None) is None
    assert torch.equal(state, torch.zeros(4))


def test_the_summary() -> None:
    done = Warmup((warmup.WarmKernel("k A=1", 1.234),), 2, 3.45, "There may be more.")
    assert str(done) == "1 kernels for 2 calls in 3.5 s\nThere may be more.\n    1.23 s  k A=1"
