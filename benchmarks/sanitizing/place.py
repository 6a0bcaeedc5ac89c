"""Where a family of kernels runs: on a GPU, or in a rehearsal without one.

A family is a generator over a place. It makes operands on the CPU, lets the place run an operator or a configuration of
a kernel on copies of them, and yields a name after each check:

    def selections(place):
        place.compare("gather_codes", data, scale, rows, [1, 128], "col_major")    # against the operator on the CPU
        yield "gather_codes"

A rehearsal runs the host code of the GPU's operators on CPU tensors, up to the launch: checks, the choice of a
configuration, the arguments of each kernel. It records the kernels, and returns the results of the CPU.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.launching.launch import KernelCall
from codegen.launching.replay import state
from codegen.operators.operator import OPERATORS
from codegen.targets.cuda import gpu_at
from codegen.templates.template import Family

TOLERANCE = 4e-3
"""Of relative errors: one rounding to bf16, and FP8 sums in a different order."""

Operands = TypeVar("Operands", bound=tuple[Any, ...])


class Place(ABC):
    """Runs kernels on copies of CPU operands, which keep their strides and what they share; no allocation is larger."""

    def compare(self, name: str, *arguments: Any, tolerance: float = TOLERANCE) -> None:
        """Runs an operator here and on the CPU; compares results, and operands afterwards."""
        operator = OPERATORS[name]
        self.compare_calls(operator.on_gpu, operator.on_cpu, *arguments, tolerance=tolerance)

    def compare_calls(
        self, on_gpu: Callable[..., Any], on_cpu: Callable[..., Any], *arguments: Any, tolerance: float = TOLERANCE
    ) -> None:
        """Likewise for any two functions."""
        mine = copy.deepcopy(arguments)
        want = on_cpu(*mine), mine
        for got, one in zip(_tensors(self.call(on_gpu, on_cpu, *arguments)), _tensors(want), strict=True):
            self.close(got, one, tolerance)

    def run(self, name: str, *arguments: Any) -> Any:
        """The results of an operator, on the CPU."""
        operator = OPERATORS[name]
        return self.call(operator.on_gpu, operator.on_cpu, *arguments)[0]

    @abstractmethod
    def call(self, on_gpu: Callable[..., Any], on_cpu: Callable[..., Any], *arguments: Any) -> Any:
        """The results of a function, and its arguments afterwards, on the CPU."""

    @abstractmethod
    def launch(self, family: Family[Any, Any, Operands], config: Any, operands: Operands) -> Operands:
        """The operands on the CPU after the launches of a configuration."""

    @abstractmethod
    def close(self, got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
        """Raises RuntimeError if a result and the reference differ by more than rounding."""


class OnGpu(Place):
    """The current CUDA device."""

    def call(self, on_gpu: Callable[..., Any], on_cpu: Callable[..., Any], *arguments: Any) -> Any:
        """See `Place`."""
        given = moved(arguments, "cuda")
        return moved((on_gpu(*given), given), "cpu")

    def launch(self, family: Family[Any, Any, Operands], config: Any, operands: Operands) -> Operands:
        """See `Place`."""
        given = moved(operands, "cuda")
        family.launch(config, given)
        torch.cuda.synchronize()
        back: Operands = moved(given, "cpu")
        return back

    def close(self, got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
        """See `Place`."""
        _check_shapes(got, want)
        if got.dtype in (torch.int32, torch.int64):
            error = 0.0 if torch.equal(got, want) else float("inf")
        else:
            a, b = got.double(), want.double()
            if not torch.equal(a.isnan(), b.isnan()):
                raise RuntimeError(f"{int((a.isnan() != b.isnan()).sum())} elements are NaN in one of the results only")
            a, b = a.nan_to_num(), b.nan_to_num()
            error = float((a - b).norm() / b.norm().clamp(min=1e-30))
        if not error <= tolerance:
            raise RuntimeError(f"relative error {error:.2e}")


class Rehearsal(Place):
    """Launches nothing.

    Attributes:
        kernels: The Triton functions that would run, and those among their constants.
        calls: What would be launched, once for each compiled kernel.
    """

    def __init__(self) -> None:
        self.kernels: set[Any] = set()
        self.calls: dict[Hashable, KernelCall] = {}

    def call(self, on_gpu: Callable[..., Any], on_cpu: Callable[..., Any], *arguments: Any) -> Any:
        """See `Place`."""
        with self._planned():
            on_gpu(*copy.deepcopy(arguments))
        return on_cpu(*arguments), arguments

    def launch(self, family: Family[Any, Any, Operands], config: Any, operands: Operands) -> Operands:
        """See `Place`; the operands are unchanged."""
        with self._planned():
            family.launch(config, operands)
        return operands

    def close(self, got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
        """Compares shapes and element types only."""
        _check_shapes(got, want)

    @contextmanager
    def _planned(self) -> Iterator[None]:
        """Records launches; the current device is the CPU, and looks like a Hopper GPU."""
        with (
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
            mock.patch.object(torch.cuda, "current_device", return_value=None),
            mock.patch.object(state, "planner", self._note),
        ):
            try:
                yield
            finally:
                gpu_at.cache_clear()

    def _note(self, key: Hashable, call: KernelCall) -> None:
        self.calls[key] = call
        self.kernels |= {call.kernel, *(each for each in call.constants.values() if hasattr(each, "fn"))}


def moved(tree: Any, device: str) -> Any:
    """A copy of all tensors in a tree on a device; those that share memory still do."""
    storages: dict[int, Any] = {}

    def move(x: Tensor) -> Tensor:
        source = x.untyped_storage()
        if source.data_ptr() not in storages:
            everything = torch.empty(0, dtype=torch.uint8, device=x.device).set_(source)
            storages[source.data_ptr()] = everything.to(device, copy=True).untyped_storage()
        made = torch.empty(0, dtype=x.dtype, device=device)
        return made.set_(storages[source.data_ptr()], x.storage_offset(), x.shape, x.stride())

    return pytree.tree_map_only(Tensor, move, tree)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random rows of different sizes."""
    generator = torch.Generator().manual_seed(seed + shape[0])
    rows = torch.randn(shape, generator=generator).mul(torch.rand(*shape[:-1], 1, generator=generator) + 0.1)
    return rows.to(dtype)


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(tree) if isinstance(each, Tensor)]


def _check_shapes(got: Tensor, want: Tensor) -> None:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise RuntimeError(f"{got.dtype}{list(got.shape)} instead of {want.dtype}{list(want.shape)}")
