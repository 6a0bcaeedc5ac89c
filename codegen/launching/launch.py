"""A kernel call and its launch on a GPU; operands as rows, and the right current device."""

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
"""What the kernels read before, and write after, quantized arithmetic."""


def as_rows(x: Tensor) -> Tensor:
    """`x` as a matrix of its last dimension with contiguous rows; a view where its strides allow."""
    k = x.shape[-1]
    rows = x.reshape(x.shape[:-1].numel(), k)
    return rows if rows.stride(-1) == 1 or k <= 1 else rows.contiguous()


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: switch to the operands' one, if it is another."""
    return contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


_COMPILED: dict[Hashable, Kernel] = {}


class KernelCall(NamedTuple):
    """One kernel on some operands: what a launch, a warm-up, a measurement, and ahead-of-time compilation consume.

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
        """Equal for calls that run the same compiled kernel: all that Triton compiles for, and the device."""
        kernel, _, arguments, constants, options = self
        found: list[Hashable] = [id(kernel), *options.values(), *constants.values()]
        tensor = None
        for value, specialized in zip(arguments, _specialized(kernel), strict=False):
            if value is None:
                found.append(None)
            elif value.__class__ is int:
                if specialized:
                    found.append(value)
            elif isinstance(value, Tensor):
                tensor = value
                found += value.dtype, value.data_ptr() & 15 == 0
            else:  # these two decide a descriptor's layout, too
                tensor = value.base
                found.append(tensor.dtype)
                found += value.block_shape
        found.append(-1 if tensor is None else tensor.get_device())
        return tuple(found)


_SPECIALIZED: dict[int, tuple[bool, ...]] = {}
"""The id of a kernel -> for each parameter whether Triton may compile anew for another integer."""


def _specialized(kernel: Any) -> tuple[bool, ...]:
    """As in `_SPECIALIZED`; nothing under the interpreter. Triton's own hash of a kernel takes long."""
    found = _SPECIALIZED.get(id(kernel))
    if found is None:
        found = tuple(not parameter.do_not_specialize for parameter in getattr(kernel, "params", ()))
        _SPECIALIZED[id(kernel)] = found
    return found


def launch(call: KernelCall) -> None:
    """Launches a call on the current stream, cheaply once it is compiled.

    Triton's own launch binds and classifies all arguments anew, which takes longer than many kernels run. Here the
    compiled kernel is remembered by what Triton compiles for: see `KernelCall.key`. Inside
    `codegen.launching.replay.replayed` the launch is remembered as a whole.

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
        if compiled is None:  # the interpreter compiles nothing
            return
        ready = keep_compiled(key, compiled, arguments, constants)
    if state.tape is not None:
        state.tape.note(ready, programs, arguments)


def keep_compiled(key: Hashable, compiled: Any, arguments: Sequence[Any], constants: dict[str, Any]) -> Kernel:
    """Loads a compiled kernel on the current device, and keeps it for launches of this key."""
    ready = _COMPILED[key] = Kernel(compiled, arguments, tuple(constants.values()))
    return ready


def _check_capture(call: KernelCall) -> None:
    """Raises CodegenError where a kernel that is new would be loaded into a stream under capture."""
    if not torch.cuda.is_initialized() or not torch.cuda.is_current_stream_capturing():
        return
    name = getattr(call.kernel, "__name__", str(call.kernel))
    raise CodegenError(
        "a kernel is not compiled yet, and cannot be while a CUDA graph is captured",
        got=f"{name}({', '.join(map(_brief, call.arguments))})",
        fix="Before the capture call compiled.warmup(...) with these sizes, or run the same call once.",
    )


def _brief(argument: Any) -> str:
    """A tensor by its type and sizes, a number by itself."""
    tensor = getattr(argument, "base", argument) if is_descriptor(argument) else argument
    if not isinstance(tensor, Tensor):
        return str(argument)
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


_TEMPLATES: Recent[dict[str, Any]] = Recent(4096)
"""Fields of descriptors that were checked, one for each number of rows lately met, without their tensor."""


def descriptor(
    tensor_descriptor: Any, tensor: Tensor, shape: list[int], stride: int, block: list[int], *layout: Any
) -> Any:  # fmt: skip
    """A tensor descriptor of a matrix with rows of `stride` elements, checked by Triton once for all of its shape.

    Args:
        tensor_descriptor: Triton's class, or Gluon's, which wants a `layout` of the block in shared memory.
        tensor: Starts at a multiple of 16 bytes.
        shape: Rows and columns, 1 or more of each.
        stride: Elements from one row to the next, a multiple of 16 bytes.
        block: Rows and columns of a tile.
        layout: For Gluon.
    """
    # A template holds on to its layout, so that no other layout can have the same id.
    key = (tensor_descriptor, tensor.dtype, *shape, stride, *block, *map(id, layout))
    template = _TEMPLATES.get(key)
    if template is None:
        checked = tensor_descriptor(tensor, shape, [stride, 1], block, *layout)
        template = vars(checked) | {"base": None}
        _TEMPLATES.put(key, template)
    result = tensor_descriptor.__new__(tensor_descriptor)
    result.__dict__.update(template, base=tensor)
    return result
