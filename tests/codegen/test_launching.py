"""Launches without a GPU: arguments of Triton's C function, calls that are recorded, and calls that must not be."""

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from codegen.launching import enqueue, replay
from codegen.launching import launch as launching
from codegen.launching.launch import KernelCall, descriptor, launch
from codegen.launching.replay import empty, replayed
from qcompiler.errors import CodegenError

CPU = torch.device("cpu")
STREAM = 7

# Programs, stream and kernel arguments passed to the C function, and to Triton's own launcher.
Call = tuple[int, int, list[Any]]
DIRECT: list[Call] = []
PLAIN: list[Call] = []
ENCODED: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
HEAD = 13
"""Arguments of Triton 3.6's C function that precede the kernel's arguments."""
PACKED = (4, 1, 0)
"""Warps, blocks of a cluster, shared memory."""


def make_tensordesc_arg(given: Any, metadata: dict[str, Any]) -> list[Any]:
    """Encodes descriptors for `Launcher`, in its module, as in Triton."""
    ENCODED.append((given.base.data_ptr(), tuple(given.shape), tuple(given.strides)))
    return [("map", metadata["block"], *ENCODED[-1]), *given.shape, *given.strides]


def flat(*given: Any) -> None:
    """The C function of Triton 3.6."""
    if given[4] != "function" or given[9] != PACKED:
        raise TypeError("not the arguments of a launch")
    DIRECT.append((given[0], given[3], list(given[HEAD:])))


def listed(*given: Any) -> None:
    """The C function of Triton 3.7 to 3.9."""
    *_, annotations, _signature, arguments = given
    if annotations != "annotations" or given[7] != PACKED:
        raise TypeError("not the arguments of a launch")
    DIRECT.append((given[0], given[3], arguments))


@dataclass
class Launcher:
    """The `CudaLauncher` of Triton 3.6."""

    launch: Callable[..., None] = flat
    global_scratch_size: int = 0
    profile_scratch_size: int = 0
    launch_cooperative_grid: bool = False
    launch_pdl: bool = False


@dataclass
class ListedLauncher(Launcher):
    """The `CudaLauncher` of Triton 3.7 to 3.9."""

    launch: Callable[..., None] = listed
    arg_annotations: str = "annotations"
    kernel_signature: bytes = b""


@dataclass
class Compiled:
    """Like Triton's `CompiledKernel`."""

    run: Launcher = field(default_factory=Launcher)
    metadata: Any = None
    function: str = "function"
    packed_metadata: tuple[int, ...] = PACKED

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: PLAIN.append((grid[0], STREAM, list(arguments)))


@dataclass(eq=False)
class Jit:
    """Like Triton's `JITFunction`: launching compiles."""

    make: Callable[[], Compiled] = Compiled
    block: int = 16
    compiled: int = 0

    def __post_init__(self) -> None:
        self.__name__ = "kernel"
        self.params = [SimpleNamespace(do_not_specialize=place < 3) for place in range(8)]

    def __getitem__(self, grid: tuple[int]) -> Callable[..., Any]:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.compiled += 1
            PLAIN.append((grid[0], STREAM, [*arguments, *list(constants.values())[:1]]))
            made, descriptors = self.make(), sum(map(enqueue.is_descriptor, arguments))
            made.metadata = SimpleNamespace(tensordesc_meta=[{"block": self.block}] * descriptors)
            return made

        return run


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enqueue, "_builtin", lambda function: function)
    for module in (enqueue, replay):
        monkeypatch.setattr(module, "current_device", lambda: -1)  # the device of CPU tensors
        monkeypatch.setattr(module, "current_stream", lambda _: STREAM)
    monkeypatch.setattr(launching, "_COMPILED", {})
    enqueue.MAPS.clear()
    replay.forget()
    for calls in (DIRECT, PLAIN, ENCODED):
        calls.clear()


def start(kernel: Jit, *tensors: Tensor | None, programs: int = 3, numbers: Sequence[int] = ()) -> None:
    launch(KernelCall(kernel, programs, (*tensors, *numbers), {"BLOCK": 16}, {"num_warps": 4}))


def launched() -> list[Call]:
    """The C function's arguments, without the trial launches with an empty grid."""
    return [call for call in DIRECT if call[0] != 0]


def tile(tensor: Tensor, block: int = 16) -> Any:
    return descriptor(TensorDescriptor, tensor, list(tensor.shape), tensor.stride(0), [block, block])


# One launch


@pytest.mark.parametrize(
    ("launcher", "path"),
    [(Launcher(), "direct"), (ListedLauncher(), "direct"), (Launcher(listed), "plain"),
     (ListedLauncher(flat), "plain")],
    ids=["flat", "listed", "flat, another function", "listed, another function"],
)  # fmt: skip
def test_the_c_function_is_called_with_the_signature_of_its_version(launcher: Launcher, path: str) -> None:
    kernel, x, y = Jit(lambda: Compiled(launcher)), torch.ones(4), torch.ones(4)
    start(kernel, x, None, numbers=[5])
    (remembered,) = launching._COMPILED.values()
    assert remembered.path == path and kernel.compiled == 1
    start(kernel, y, None, numbers=[6])
    assert kernel.compiled == 1
    if path == "direct":
        assert launched() == [(3, STREAM, [y.data_ptr(), None, 6, 16])]
    else:
        assert not launched() and PLAIN[-1] == (3, STREAM, [y, None, 6, 16])


@pytest.mark.parametrize("name", ["global_scratch_size", "profile_scratch_size", "gsan_enabled"])
def test_launches_that_need_more_are_left_to_triton(name: str) -> None:
    launcher = Launcher()
    setattr(launcher, name, 128)
    assert enqueue.Kernel(Compiled(launcher), (), ()).path == "plain"


def test_another_type_or_alignment_compiles_again() -> None:
    kernel, x = Jit(), torch.ones(64)
    for operand, count in ((x, 1), (x[4:], 1), (x[1:], 2), (x[2:], 2), (x.bfloat16(), 3), (None, 4), (x, 4)):
        start(kernel, operand)
        assert kernel.compiled == count


def test_hooked_launches_are_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = Jit(), torch.ones(4)
    for _ in range(2):
        start(kernel, x)
    assert len(launched()) == 1
    for hook in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(triton.knobs.runtime, hook, SimpleNamespace(calls=[print]))
            before = len(PLAIN)
            start(kernel, x)
            assert len(PLAIN) == before + 1 and len(launched()) == 1
            patch.setattr(triton.knobs.runtime, hook, None)
            assert not enqueue.hooked()
    start(kernel, x)
    assert len(launched()) == 2


def test_a_cold_kernel_under_capture_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = Jit(), torch.ones(4, 32)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        says = r"got kernel\(float32\[4, 32\], float32\[4, 32\], None, 9\)\. Before the capture, call compiled\.warmup"
        with pytest.raises(CodegenError, match=says):
            launch(KernelCall(kernel, 1, (x, tile(x), None, 9), {}, {}))
        assert not kernel.compiled
    start(kernel, x)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        start(kernel, x)
    assert len(launched()) == 1


# Descriptors


def through(kernel: Jit, *tensors: Tensor, block: int = 16) -> list[Any]:
    """The encoded descriptors that a launch passes on."""
    launch(KernelCall(kernel, 1, tuple(tile(tensor, block) for tensor in tensors), {}, {}))
    return [value for value in DIRECT[-1][2] if isinstance(value, tuple)]


def test_a_descriptor_is_encoded_once_and_never_confused_with_another() -> None:
    kernel = Jit()
    store = torch.zeros(4096)
    x, y = store[:1024].view(32, 32), store[2048:3072].view(32, 32)
    through(kernel, x, y)
    before = len(ENCODED)
    for _ in range(3):
        assert through(kernel, x, y) == [("map", 16, t.data_ptr(), (32, 32), (32, 1)) for t in (x, y)]
    assert len(ENCODED) == before
    views = (store[:512].view(16, 32), store[:1024].view(16, 64), torch.as_strided(store, (32, 32), (64, 1)))
    for view in views:
        assert through(kernel, view, x)[0] == ("map", 16, x.data_ptr(), tuple(view.shape), view.stride())
    assert len(ENCODED) == before + len(views)


def test_kernels_that_encode_differently_share_nothing() -> None:
    x = torch.zeros(32, 32)
    kernels = [Jit(block=16), Jit(block=32)]
    for _ in range(3):
        found = [through(kernel, x) for kernel in kernels]
    assert [encoded[0][1] for encoded in found] == [16, 32]


def test_cached_objects_do_not_hold_tensors() -> None:
    x = torch.zeros(32, 32)
    kernel, gone = Jit(), weakref.ref(x)
    for _ in range(3):
        through(kernel, x, x)
        replayed(scale, "scale", (x, None), kernel, x, None)
    PLAIN.clear()
    del x
    gc.collect()
    assert gone() is None


# Recorded calls


def scale(kernel: Jit, x: Tensor, factor: Tensor | None) -> Tensor:
    """An operator with two launches, partial sums between them, and descriptors and pointers."""
    sums = empty((2, *x.shape), torch.float32, x.device)
    out = empty(x.shape, x.dtype, x.device)
    launch(KernelCall(kernel, 2, (tile(x), sums, factor, x.shape[0]), {"A": 1}, {}))
    launch(KernelCall(kernel, 3, (tile(out), sums[1], x), {"A": 1}, {}))
    return out


def test_a_call_is_replayed_with_its_own_addresses() -> None:
    kernel = Jit()
    factor = torch.ones(32)
    inputs = [torch.ones(32, 32) for _ in range(4)]
    outputs = [twice(scale, "scale", (x, factor), kernel, x, factor) for x in inputs[:1]]
    DIRECT.clear()
    PLAIN.clear()
    for x in inputs[1:]:
        outputs.append(replayed(fail, "scale", (x, factor), kernel, x, factor))
        first, second = launched()[-2:]
        sums = first[2][5]
        assert first == (2, STREAM, [("map", 16, x.data_ptr(), (32, 32), (32, 1)), 32, 32, 32, 1, sums,
                                     factor.data_ptr(), 32, 1])  # fmt: skip
        out = ("map", 16, outputs[-1].data_ptr(), (32, 32), (32, 1))
        assert second == (3, STREAM, [out, 32, 32, 32, 1, sums + 4096, x.data_ptr(), 1])
    assert not PLAIN
    assert len({out.data_ptr() for out in outputs}) == len(outputs)
    assert outputs[-1].shape == (32, 32) and outputs[-1].stride() == (32, 1) and outputs[-1].dtype == torch.float32


def twice(run: Callable[..., Tensor], what: str, operands: tuple[Tensor | None, ...], *arguments: Any) -> Tensor:
    """Calls an operator until it may be recorded; returns the last result."""
    replayed(run, what, operands, *arguments)
    return replayed(run, what, operands, *arguments)


def fail(*_: Any) -> Tensor:
    """An operator that must not run again."""
    raise AssertionError("the call was not remembered")


def test_a_call_that_occurs_once_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = Jit(), torch.ones(32, 32)
    taken: list[bool] = []

    def make() -> Compiled:
        taken.append(replay.state.tape is not None)
        return Compiled()

    monkeypatch.setattr(kernel, "make", make)
    replayed(scale, "scale", (x, None), kernel, x, None)
    with pytest.raises(AssertionError, match="not remembered"):
        replayed(fail, "scale", (x, None))
    launching._COMPILED.clear()
    replayed(scale, "scale", (x, None), kernel, x, None)
    assert taken == [False, False, True, True]
    replayed(fail, "scale", (x + 1, None))


@pytest.mark.parametrize("guards", [True, False])
def test_different_operands_are_a_different_call(guards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not guards:
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    kernel, store = Jit(), torch.zeros(8192)
    x = store[:1024].view(32, 32)
    twice(scale, "scale", (x, None), kernel, x, None)
    replayed(fail, "scale", (x + 1, None), kernel, x, None)
    others = [
        ("scale", (store[:512].view(16, 32), None)),
        ("scale", (store.as_strided((32, 32), (64, 1)), None)),
        ("scale", (x.bfloat16(), None)),
        ("scale", (store[1:1025].view(32, 32), None)),
        ("scale", (x, torch.ones(32))),
        ("other", (x, None)),
    ]
    for what, operands in others:
        with pytest.raises(AssertionError, match="not remembered"):
            replayed(fail, what, operands)


def test_a_bounded_number_of_calls_per_shape_is_recorded() -> None:
    kernel, store = Jit(), torch.zeros(1 << 16)
    views = [store.as_strided((32, 32), (32 + 4 * i, 1)) for i in range(replay.MOST_VARIANTS + 2)]
    for x in views:
        twice(scale, "scale", (x, None), kernel, x, None)
    for x in views[2:]:
        replayed(fail, "scale", (x, None), kernel, x, None)
    with pytest.raises(AssertionError, match="not remembered"):
        replayed(fail, "scale", (views[0], None))


@pytest.mark.parametrize("kind", ["copy", "foreign result", "plain", "nested"])
def test_unsupported_calls_are_not_recorded(kind: str) -> None:
    kernel = Jit(lambda: Compiled(Launcher(global_scratch_size=64))) if kind == "plain" else Jit()
    x = torch.zeros(32, 32)

    def odd(*_: Any) -> Tensor:
        read = x.clone() if kind == "copy" else x
        out = empty((4,), torch.float32, CPU)
        start(kernel, read, out)
        if kind == "nested":
            replayed(scale, "scale", (x, None), kernel, x, None)
        return torch.empty(4) if kind == "foreign result" else out

    twice(odd, "odd", (x, None))
    with pytest.raises(AssertionError, match="not remembered"):
        replayed(fail, "odd", (x, None))


def test_operands_that_share_memory_are_recorded_with_their_distance() -> None:
    kernel = Jit()

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        out = empty((4, 64), torch.float32, CPU)
        start(kernel, gate, up, out)
        return out

    halves = torch.zeros(4, 128).chunk(2, 1)
    twice(gated, "gated", halves, *halves)
    gate, up = torch.ones(4, 128).chunk(2, 1)
    out = replayed(fail, "gated", (gate, up))
    assert launched()[-1][2] == [gate.data_ptr(), up.data_ptr(), out.data_ptr(), 16]
    apart = torch.ones(4, 128).chunk(2, 1)[0]
    for operands in ((up, gate), (gate, gate), (gate, apart)):
        with pytest.raises(AssertionError, match="not remembered"):
            replayed(fail, "gated", operands)


def test_nothing_is_recorded_or_replayed_during_planning_or_with_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = Jit(), torch.zeros(32, 32)
    asked: list[Any] = []
    monkeypatch.setattr(replay.state, "planner", lambda *given: asked.append(given))
    replayed(scale, "scale", (x, None), kernel, x, None)
    assert len(asked) == 2 and asked[0][1].kernel is kernel and asked[0][1][3:] == ({"A": 1}, {})
    assert not PLAIN and not DIRECT and not kernel.compiled
    monkeypatch.setattr(replay.state, "planner", None)
    twice(scale, "scale", (x, None), kernel, x, None)
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", SimpleNamespace(calls=[print]))
    with pytest.raises(AssertionError, match="not remembered"):
        replayed(fail, "scale", (x, None))
