"""Finds the kernels that a function would launch, without running it on data, and compiles them in parallel.

The function runs on torch's fake tensors, so only sizes are propagated and nothing is computed. Our own operators get
real memory while they choose kernels; instead of launching, they pass the kernels to Triton's asynchronous compiler.
Compiled kernels are also loaded, so the first real call or CUDA graph capture needs no compilation.
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

from codegen import assembler
from codegen.compile_options import compile_options
from codegen.kernel_cache import use_cache_folder
from codegen.launching.enqueue import is_descriptor, without_memory
from codegen.launching.launch import KernelCall, keep_compiled
from codegen.launching.replay import state
from qcompiler.errors import CodegenError

Progress = Callable[[int, int, str], None]
"""Called with the number of kernels done, their total, and the last one's name."""

UNKNOWN_SIZES = (DataDependentOutputException, DynamicOutputShapeException)
"""Errors that torch raises if control flow depends on data."""


@dataclass(frozen=True)
class Blank:
    """Describes a tensor without data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class WarmKernel:
    """One kernel that was compiled.

    Attributes:
        name: Its function, argument types, and constants, such as `quantize_tiles(bfloat16, …) BLOCK_M=32 …`.
        seconds: Compile time in its thread; near zero if it was found on disk.
    """

    name: str
    seconds: float


@dataclass(frozen=True)
class Warmup:
    """The result of a warm-up.

    Attributes:
        kernels: Kernels that were compiled or loaded from disk; excludes those already loaded.
        calls: Number of calls whose kernels were collected.
        seconds: Total time.
        note: Why there may be more to compile, or nothing at all; usually None.
        assembler: The assembler of the kernels, such as `ptxas 12.8 (/…/ptxas)`; empty if nothing was compiled.
    """

    kernels: tuple[WarmKernel, ...] = ()
    calls: int = 0
    seconds: float = 0.0
    note: str | None = None
    assembler: str = ""

    def __str__(self) -> str:
        """A summary, and a line for each kernel."""
        head = f"{len(self.kernels)} kernels for {self.calls} calls in {self.seconds:.1f} s"
        head += f", {self.assembler}" if self.assembler else ""
        lines = [f"  {each.seconds:6.2f} s  {each.name}" for each in self.kernels]
        return "\n".join([head, *([self.note] if self.note else []), *lines])


@dataclass
class _Job:
    """One kernel being compiled: its task, its compile time, and the calls that wait for it."""

    name: str
    compile: Callable[[], Any]
    seconds: list[float]
    keys: list[tuple[Hashable, list[Any], dict[str, Any]]] = field(default_factory=list)


class _Pool(ThreadPoolExecutor):
    """Times each task, and starts none before `start` is set.

    Planning and compiling both build syntax trees, and CPython 3.11 has failed when several threads do that.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.start = threading.Event()
        self.last: tuple[Callable[[], Any], list[float]] = (lambda: None, [0.0])

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As in the base class; records `last`: the task for these arguments, and a list for its seconds."""
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
    """Starts the compilation of each kernel once."""

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
    """The part of an argument that a kernel is specialized on: element type or descriptor box; empty for a number."""
    if is_descriptor(argument):
        return f"{_kind(argument.base)}{list(argument.block_shape)}"
    return str(argument.dtype).removeprefix("torch.") if isinstance(argument, Tensor) else ""


class _OwnOperators(TorchDispatchMode):
    """Runs our operators on zeros alongside torch's fake tensors, so that they request their kernels.

    Real tensors, such as weights, become fake for all other operators, because some of these write.
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
        """The fake tensor of a real one; always the same."""
        real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return self._fakes.from_tensor(value) if real else value


def _with_memory(value: Any) -> Any:
    """Real zeros with the layout of a fake tensor; anything else is returned unchanged."""
    if not isinstance(value, FakeTensor):
        return value
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    start = value.storage_offset()
    whole = torch.zeros(max(start + extent, 0), dtype=value.dtype, device=value.fake_device)
    return whole.as_strided(value.shape, value.stride(), start if value.numel() else 0)


def warm_up(
    run: Callable[..., object],
    calls: Iterable[Sequence[Any]],
    device: torch.device,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Warmup:
    """Compiles and loads the kernels that `run(*call)` would launch on a CUDA device, for each of `calls`.

    Args:
        run: Calls torch's operators and ours; it may hold real weights.
        calls: Arguments of `run`; only the descriptions of tensors and `Blank`s are used.
        device: The device to load kernels on.
        progress: Called after each kernel, in the calling thread.
        workers: Compiler threads; default: one per core of this process, at most 16.

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
    note, used = next(filter(None, notes), None), str(assembler.current()) if kernels else ""
    return Warmup(kernels, len(wanted), time.perf_counter() - start, note, used)


def products_of(
    run: Callable[..., object], calls: Iterable[Sequence[Any]], device: torch.device
) -> tuple[list[Any], str | None]:
    """The distinct `GemmProblem`s of `run(*call)`, and why there may be more; see `warm_up`."""
    found: dict[Any, None] = {}
    with torch.cuda.device(device):
        state.problems = found
        try:
            notes = [_plan(run, call, lambda *_: None) for call in calls]
        finally:
            state.problems = None
    return list(found), next(filter(None, notes), None)


def _plan(run: Callable[..., object], call: Sequence[Any], planner: Callable[..., None]) -> str | None:
    """Passes all kernels of one call to the planner; returns a sentence if control flow depends on data."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fakes, _OwnOperators(fakes):
        inputs = [_without_data(value) for value in call]
        state.planner = planner
        try:
            run(*inputs)
        except UNKNOWN_SIZES as error:
            return f"Kernels after {getattr(error, 'func', error)} depend on data and were not found: call it once."
        finally:
            state.planner = None
    return None


def _without_data(value: Any) -> Any:
    """A fake tensor for a tensor or a `Blank`; anything else is returned unchanged."""
    if isinstance(value, Blank):
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return value


def _finish(planner: _Planner, progress: Progress | None) -> tuple[WarmKernel, ...]:
    """Waits for the compiler, loads the kernels, and reports progress.

    Failed kernels are compiled again alone: threads that build syntax trees can interfere with each other.
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
    """A completed future for an existing result."""
    future: Future[Any] = Future()
    future.set_result(compiled)
    return future
