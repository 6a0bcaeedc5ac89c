"""Calls the operators of `codegen.torch_ops` without torch's dispatcher where it is not needed.

The dispatcher costs as much host time as a launch. Only tracing, fake tensors, autograd and profiling need it, so a
call bypasses it for plain tensors while none of these is active.

    from codegen.direct import kernels

    kernels.quantize(x, [1, 128], torch.float8_e4m3fn, "deepseek", "col_major")    # as torch.ops.qcompiler.quantize
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.operators.operator import OPERATORS, Operator

_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_profiled, _transform = torch._C._autograd._profiler_enabled, torch._C._functorch.peek_interpreter_stack


def unobserved(x: Any) -> bool:
    """Whether an operator call on `x` would only run the implementation for its device."""
    if type(x) is not Tensor or not (x.is_cuda or x.is_cpu) or torch.compiler.is_compiling():
        return False
    if _dispatch_modes() or _function_modes() or _profiled() or _transform() is not None:
        return False
    return not (x.requires_grad and torch.is_grad_enabled())


def _direct(name: str, operator: Operator) -> Callable[..., Any]:
    """An operator called with positional arguments, the first of which is a tensor or a list of tensors."""
    dispatched, on_gpu, on_cpu = getattr(torch.ops.qcompiler, name), operator.on_gpu, operator.on_cpu

    def call(*arguments: Any) -> Any:
        first = arguments[0]
        tensor = first[0] if type(first) is list else first
        if unobserved(tensor):
            return on_gpu(*arguments) if tensor.is_cuda else on_cpu(*arguments)
        return dispatched(*arguments)

    return call


class _Kernels(SimpleNamespace):
    """The operators by name; those that only torch knows, such as another distribution's, go through the dispatcher."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.qcompiler, name)


kernels = _Kernels(**{name: _direct(name, operator) for name, operator in OPERATORS.items()})
"""The operators that host modules call."""
