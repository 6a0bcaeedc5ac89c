"""The operators of `codegen.torch_ops`, called without torch's dispatcher where nobody listens to it.

The dispatcher costs as much host time as a launch. It is of use to whatever traces, fakes, differentiates or profiles,
so a call goes around it only for plain tensors on a GPU while none of these is at work.

    from codegen.direct import kernels

    kernels.quantize(x, [1, 128], torch.float8_e4m3fn, "deepseek", "col_major")    # as torch.ops.qcompiler.quantize
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from codegen.torch_ops import ON_GPU

_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_profiled, _transform = torch._C._autograd._profiler_enabled, torch._C._functorch.peek_interpreter_stack


def unobserved(x: Any) -> bool:
    """Whether an operator on `x` does nothing but what its implementation for GPUs does."""
    if type(x) is not Tensor or not x.is_cuda or torch.compiler.is_compiling():
        return False
    if _dispatch_modes() or _function_modes() or _profiled() or _transform() is not None:
        return False
    return not (x.requires_grad and torch.is_grad_enabled())


def _direct(name: str, on_gpu: Callable[..., Any]) -> Callable[..., Any]:
    """An operator that is called with its arguments in order, the first of which is a tensor or a list of them."""
    operator = getattr(torch.ops.qcompiler, name)

    def call(*arguments: Any) -> Any:
        first = arguments[0]
        if unobserved(first[0] if type(first) is list else first):
            return on_gpu(*arguments)
        return operator(*arguments)

    return call


kernels = SimpleNamespace(**{name: _direct(name, on_gpu) for name, on_gpu in ON_GPU.items()})
"""What a host module for a GPU calls."""
