"""Kernel calls and their launch on a GPU; also operands as rows, and the current device."""

import contextlib
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codegen.compile_options import compile_options
from codegen.launching.enqueue import Kernel, is_descriptor
from codegen.launching.recent import Recent
from codegen.launching.replay import state
from qcompiler.errors import CodegenError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Element types that the kernels read before, and write after, quantized arithmetic."""


def as_rows(x: Tensor) -> Tensor:
    """`x` as a matrix of its last dimension with contiguous rows; a view if its strides allow."""
    k = x.shape[-1]
    rows = x.reshape(x.shape[:-1].numel(), k)
    return rows if rows.stride(-1) == 1 or k <= 1 else rows.contiguous()


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switches to the device of the operands, because Triton launches on the current device."""
    return contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


_COMPILED: dict[Hashable, Kernel] = {}


class KernelCall(NamedTuple):
    """One kernel with its operands: used by launches, warm-up, measurements, and ahead-of-time compilation.

    Attributes:
        kernel: A Triton or Gluon function whose last parameters are the constants, in their order.
        programs: Size of the grid.
        arguments: All other arguments: tensors, tensor descriptors, integers below 2^31, None.
        constants: Arguments that the compiler knows.
        options: `num_warps`, `num_stages`; others as in `codegen.compile_options`.
    """

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]

    def key(self) -> Hashable:
        """Equal for calls that run the same compiled kernel: everything Triton specializes on, and the device."""
        kernel, _, arguments, constants, options = self
        found: list[Hashable] = [id(kernel), *options.values(), *constants.values()]
        tensor = None
        for value, specialized in zip(arguments, _specialized(kernel), strict=False):
            kind = value.__class__
            if kind is int:
                if specialized:
                    found.append(value)
            elif value is None:
                found.append(None)
            elif kind is Tensor or isinstance(value, Tensor):
                tensor = value
                found += value.dtype, value.data_ptr() & 15 == 0
            else:  # these two determine a descriptor's layout, too
                tensor = value.base
                found.append(tensor.dtype)
                found += value.block_shape
        found.append(-1 if tensor is None else tensor.get_device())
        return tuple(found)


_SPECIALIZED: dict[int, tuple[bool, ...]] = {}
"""Kernel id -> for each parameter, whether Triton specializes on the value of an integer."""


def _specialized(kernel: Any) -> tuple[bool, ...]:
    """As in `_SPECIALIZED`; empty under the interpreter. Hashing a kernel with Triton is slow."""
    found = _SPECIALIZED.get(id(kernel))
    if found is None:
        found = tuple(not parameter.do_not_specialize for parameter in getattr(kernel, "params", ()))
        _SPECIALIZED[id(kernel)] = found
    return found


def launch(call: KernelCall) -> None:
    """Launches a call on the current stream, cheaply once it is compiled.

    Triton's regular launch binds and classifies all arguments again, which takes longer than many kernels run. Here the
    compiled kernel is cached by everything Triton specializes on: see `KernelCall.key`. Inside
    `codegen.launching.replay.replayed` the launch is recorded as a whole.

    Raises:
        CodegenError: The kernel is not compiled yet while a CUDA graph is captured.
    """
    kernel, programs, arguments, constants, options = call
    key = call.key()
    ready = _COMPILED.get(key)
    if state.planner is not None:
        if ready is None:
            state.planner(key, call)
        return
    if ready is not None:
        ready(programs, arguments)
    else:
        _check_capture(call)
        compiled = kernel[(programs,)](*arguments, **constants, **compile_options(options))
        if compiled is None:  # the interpreter does not compile
            return
        ready = keep_compiled(key, compiled, arguments, constants)
    if state.tape is not None:
        state.tape.note(ready, programs, arguments)


def keep_compiled(key: Hashable, compiled: Any, arguments: Sequence[Any], constants: dict[str, Any]) -> Kernel:
    """Loads a compiled kernel on the current device, and caches it for launches with this key."""
    ready = _COMPILED[key] = Kernel(compiled, arguments, tuple(constants.values()))
    return ready


def _check_capture(call: KernelCall) -> None:
    """Raises CodegenError if a new kernel would have to be loaded during CUDA graph capture."""
    if not torch.cuda.is_initialized() or not torch.cuda.is_current_stream_capturing():
        return
    name = getattr(call.kernel, "__name__", str(call.kernel))
    raise CodegenError(
        "a kernel is not compiled yet, and cannot be while a CUDA graph is captured",
        got=f"{name}({', '.join(map(_brief, call.arguments))})",
        fix="Before the capture, call compiled.warmup(...) with these sizes, or run the same call once.",
    )


def _brief(argument: Any) -> str:
    """A tensor by its type and sizes; a number by its value."""
    tensor = getattr(argument, "base", argument) if is_descriptor(argument) else argument
    if not isinstance(tensor, Tensor):
        return str(argument)
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


_TEMPLATES: Recent[dict[str, Any]] = Recent(4096)
"""Validated descriptor fields without their tensor, one entry per recent number of rows."""


def descriptor(
    tensor_descriptor: Any, tensor: Tensor, shape: list[int], stride: int, block: list[int], *layout: Any
) -> Any:
    """A tensor descriptor of a matrix with rows of `stride` elements, validated by Triton once per shape.

    Args:
        tensor_descriptor: Triton's class, or Gluon's, which needs a `layout` of the block in shared memory.
        tensor: Starts at a multiple of 16 bytes.
        shape: Rows and columns, at least 1 each.
        stride: Elements from one row to the next, a multiple of 16 bytes.
        block: Rows and columns of a tile.
        layout: For Gluon only.
    """
    # The template keeps its layout alive, so no other layout can have the same id.
    key = (tensor_descriptor, tensor.dtype, *shape, stride, *block, *map(id, layout))
    template = _TEMPLATES.get(key)
    if template is None:
        checked = tensor_descriptor(tensor, shape, [stride, 1], block, *layout)
        template = vars(checked) | {"base": None}
        _TEMPLATES.put(key, template)
    result = tensor_descriptor.__new__(tensor_descriptor)
    result.__dict__.update(template, base=tensor)
    return result
