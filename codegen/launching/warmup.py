"""Which kernels a function would launch, without running it on data; and their compilation, all at one time.

The function runs on tensors without data (torch's fake ones), so sizes flow through it and nothing is computed. Only
our own operators get memory, for as long as each takes to choose its kernels, and instead of launching these they hand
them to Triton's asynchronous compiler. What is compiled is loaded, too: the first real call, or the capture of a CUDA
graph, finds everything in place.
"""

import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from codegen.compile_options import compile_options
from codegen.kernel_cache import use_cache_folder
from codegen.launching.enqueue import is_descriptor, without_memory
from codegen.launching.launch import KernelCall, keep_compiled
from codegen.launching.replay import state
from qcompiler.errors import CodegenError

Progress = Callable[[int, int, str], None]
"""Is told how many kernels are done, how many there are, and what the last one was."""

UNKNOWN_SIZES = (DataDependentOutputException, DynamicOutputShapeException)
"""What torch raises where only data decide how to go on."""


@dataclass(frozen=True)
class Blank:
    """A tensor of which only the description matters."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class WarmKernel:
    """One kernel that was compiled.

    Attributes:
        name: Its function, what it takes, and its constants, such as `quantize_tiles(bfloat16, …) BLOCK_M=32 …`.
        seconds: How long it took in its thread; next to nothing where it was found on disk.
    """

    name: str
    seconds: float


@dataclass(frozen=True)
class Warmup:
    """What a warm-up did.

    Attributes:
        kernels: Those that were compiled or loaded from disk; what was warm before is not among them.
        calls: For how many calls the kernels were looked up.
        seconds: How long all of it took.
        note: Why there may be more to compile, or nothing at all; None as a rule.
    """

    kernels: tuple[WarmKernel, ...] = ()
    calls: int = 0
    seconds: float = 0.0
    note: str | None = None

    def __str__(self) -> str:
        """A summary, and a line for each kernel."""
        head = f"{len(self.kernels)} kernels for {self.calls} calls in {self.seconds:.1f} s"
        lines = [f"  {each.seconds:6.2f} s  {each.name}" for each in self.kernels]
        return "\n".join([head, *([self.note] if self.note else []), *lines])


@dataclass
class _Job:
    """One kernel on its way: what compiles it, how long that took, and what is waiting for it."""

    name: str
    compile: Callable[[], Any]
    seconds: list[float]
    keys: list[tuple[Hashable, list[Any], dict[str, Any]]] = field(default_factory=list)


class _Pool(ThreadPoolExecutor):
    """Takes the time of each task, and starts none before `start` is set.

    Planning and compiling both make syntax trees, and CPython 3.11 was seen to fail at that in several threads.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.start = threading.Event()
        self.last: tuple[Callable[[], Any], list[float]] = (lambda: None, [0.0])

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As its base; `last` is the task that is called with these arguments, and a list for its seconds."""
        compile_now, taken = self.last = partial(task, *args, **kwargs), [0.0]

        def timed() -> Any:
            self.start.wait()
            start = time.perf_counter()
            try:
                return compile_now()
            finally:
                taken[0] = time.perf_counter() - start

        return super().submit(timed)


class _Planner:
    """Starts the compilation of each kernel that it is given, once."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self.jobs: dict[int, tuple[Any, _Job]] = {}
        self._seen: set[Hashable] = set()

    def __call__(self, key: Hashable, call: KernelCall) -> None:
        """One kernel that is not compiled yet; see `codegen.launching.launch.launch`."""
        if key in self._seen:
            return
        kernel, _, arguments, constants, options = call
        self._seen.add(key)
        self._pool.last = (lambda: None, [0.0])
        compiled = kernel.warmup(*arguments, grid=(1,), **constants, **compile_options(options))
        values = {**constants, **options}.items()
        known = [f"{name}={getattr(value, '__name__', value)}" for name, value in values]
        name = f"{kernel.__name__}({', '.join(filter(None, map(_kind, arguments)))}) {' '.join(known)}"
        _, job = self.jobs.setdefault(id(compiled), (compiled, _Job(name, *self._pool.last)))
        job.keys.append((key, without_memory(arguments), constants))


def _kind(argument: Any) -> str:
    """What a kernel is compiled for, of an argument: an element type, the box of a descriptor; nothing of a number."""
    if is_descriptor(argument):
        return f"{_kind(argument.base)}{list(argument.block_shape)}"
    return str(argument.dtype).removeprefix("torch.") if isinstance(argument, Tensor) else ""


class _OwnOperators(TorchDispatchMode):
    """Runs our operators on memory full of zeros beside torch's fake tensors, so that they ask for their kernels.

    Real tensors, such as weights, become fake ones for all other operators: some of these write.
    """

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fakes = fakes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "qcompiler":
            with unset_fake_temporarily():
                func(*pytree.tree_map(_with_memory, args), **pytree.tree_map(_with_memory, kwargs))
        return func(*pytree.tree_map(self._fake, args), **pytree.tree_map(self._fake, kwargs))

    def _fake(self, value: Any) -> Any:
        """A fake tensor, always the same one, for a real one."""
        real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return self._fakes.from_tensor(value) if real else value


def _with_memory(value: Any) -> Any:
    """A fake tensor as a real one of zeros that lies as the fake one does; everything else as it is."""
    if not isinstance(value, FakeTensor):
        return value
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    start = value.storage_offset()
    whole = torch.zeros(max(start + extent, 0), dtype=value.dtype, device=value.fake_device)
    return whole.as_strided(value.shape, value.stride(), start if value.numel() else 0)


def warm_up(
    run: Callable[..., object], calls: Iterable[Sequence[Any]], device: torch.device, progress: Progress | None = None,
    workers: int | None = None,
) -> Warmup:  # fmt: skip
    """Compiles and loads the kernels that `run(*call)` would launch on a CUDA device, for each of `calls`.

    Args:
        run: Calls torch's operators and ours; it may hold real weights.
        calls: Arguments of `run`; tensors among them, and `Blank`s, give no more than their description.
        device: Where kernels are loaded.
        progress: Called after each kernel, in the calling thread.
        workers: Threads that compile; left out, one for each core of this process, 16 at most.

    Raises:
        CodegenError: A kernel does not compile.
    """
    start = time.perf_counter()
    use_cache_folder()
    workers = workers or min(len(os.sched_getaffinity(0)), 16)
    wanted = list(calls)
    with torch.cuda.device(device), _Pool(workers) as pool:
        planner = _Planner(pool)
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            try:
                notes = [_plan(run, call, planner) for call in wanted]
            finally:
                pool.start.set()
            kernels = _finish(planner, progress)
    return Warmup(kernels, len(wanted), time.perf_counter() - start, next(filter(None, notes), None))


def products_of(
    run: Callable[..., object], calls: Iterable[Sequence[Any]], device: torch.device
) -> tuple[list[Any], str | None]:
    """The `GemmProblem`s that `run(*call)` would meet, each once, and why there may be more; see `warm_up`."""
    found: dict[Any, None] = {}
    with torch.cuda.device(device):
        state.problems = found
        try:
            notes = [_plan(run, call, lambda *_: None) for call in calls]
        finally:
            state.problems = None
    return list(found), next(filter(None, notes), None)


def _plan(run: Callable[..., object], call: Sequence[Any], planner: Callable[..., None]) -> str | None:
    """Gives the planner all kernels of one call; a sentence where data would have to say how it goes on."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fakes, _OwnOperators(fakes):
        inputs = [_without_data(value) for value in call]
        state.planner = planner
        try:
            run(*inputs)
        except UNKNOWN_SIZES as error:
            return f"What follows {getattr(error, 'func', error)} depends on data and was not looked at: call it once."
        finally:
            state.planner = None
    return None


def _without_data(value: Any) -> Any:
    """A fake tensor for a tensor or a `Blank`; everything else as it is."""
    if isinstance(value, Blank):
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return value


def _finish(planner: _Planner, progress: Progress | None) -> tuple[WarmKernel, ...]:
    """Waits for the compiler, loads what it made, and tells of it.

    What failed is compiled again when nothing else is: threads that make syntax trees can disturb each other.
    """
    futures = {getattr(handle, "future", None) or _done(handle): key for key, (handle, _) in planner.jobs.items()}
    done: list[WarmKernel] = []
    failed: list[tuple[Any, _Job]] = []

    def keep(compiled: Any, job: _Job) -> None:
        for key, arguments, constants in job.keys:
            keep_compiled(key, compiled, arguments, constants)
        done.append(WarmKernel(job.name, job.seconds[0]))
        if progress is not None:
            progress(len(done), len(futures), job.name)

    for future in as_completed(futures):
        handle, job = planner.jobs[futures[future]]
        if future.exception() is not None:
            failed.append((handle, job))
        else:
            keep(handle.result() if hasattr(handle, "finalize_compile") else handle, job)
    for handle, job in failed:
        try:
            compiled = job.compile()
        except Exception as error:
            raise CodegenError(f"a kernel does not compile: {error}", got=job.name) from error
        handle.finalize_compile(compiled)
        keep(compiled, job)
    return tuple(done)


def _done(compiled: object) -> Future[Any]:
    """A future for what is there already."""
    future: Future[Any] = Future()
    future.set_result(compiled)
    return future
