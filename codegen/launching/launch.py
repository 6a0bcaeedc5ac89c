"""What every launch on a GPU needs: a device that can run the kernels, operands as rows, the right current device."""

import contextlib
from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from codegen.compile_options import compile_options
from codegen.kernel_cache import use_cache_folder
from codegen.launching.enqueue import Kernel, is_descriptor
from codegen.launching.recent import Recent
from codegen.launching.replay import state
from qcompiler.errors import CodegenError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels read before, and write after, quantized arithmetic."""


@cache
def check_device(device: torch.device) -> None:
    """Raises CodegenError where there is no FP8; once a device, so it also settles where its kernels are kept."""
    use_cache_folder()
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise CodegenError(
            "this GPU has no FP8", got=f"{name}, compute capability {capability[0]}.{capability[1]}",
            need="compute capability 8.9 or later", fix="Compile the model for the target 'cpu' on this machine.",
        )  # fmt: skip


def as_rows(x: Tensor) -> Tensor:
    """`x` as a matrix of its last dimension with contiguous rows; a view where its strides allow."""
    k = x.shape[-1]
    rows = x.reshape(x.shape[:-1].numel(), k)
    return rows if rows.stride(-1) == 1 or k <= 1 else rows.contiguous()


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: switch to the operands' one, if it is another."""
    return contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


@cache
def multiprocessors(device: int) -> int:
    """How many multiprocessors the CUDA device of that index has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


_COMPILED: dict[Hashable, Kernel] = {}


def launch(
    kernel: Any, programs: int, arguments: Sequence[Any], constants: dict[str, Any], options: dict[str, int],
    pointers: Sequence[Tensor | None], what: Hashable,
) -> None:  # fmt: skip
    """Launches `kernel[(programs,)](*arguments, **constants, **options)` on the current stream, cheaply once compiled.

    Triton's own launch binds and classifies all arguments anew, which takes longer than many kernels run. Here the
    compiled kernel is remembered by what Triton compiles for: the types of the arguments, whether pointers are aligned,
    and what it looks for in integers. Inside `codegen.launching.replay.replayed` the launch is remembered as a whole.

    Args:
        kernel: A Triton or Gluon function whose last parameters are the constants, in their order.
        programs: Size of the grid.
        arguments: All other arguments: tensors, tensor descriptors, integers below 2^31, None.
        constants: Arguments that the compiler knows.
        options: `num_warps`, `num_stages`; others as in `codegen.compile_options`.
        pointers: Those tensors that are passed as pointers, and None for those that are left out.
        what: Tells apart the constants, the options, the device, the types of descriptors, and the integers that the
            kernel is specialised on.

    Raises:
        CodegenError: The kernel is not compiled yet while a CUDA graph is captured.
    """
    places = [None if t is None else (t.dtype, t.data_ptr() & 15 == 0) for t in pointers]
    key = (id(kernel), what, *places)
    ready = _COMPILED.get(key)
    if state.planner is not None:
        if ready is None:
            state.planner(key, kernel, arguments, constants, options)
        return
    if ready is not None:
        ready(programs, arguments)
    else:
        _check_capture(kernel, arguments)
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


def _check_capture(kernel: Any, arguments: Sequence[Any]) -> None:
    """Raises CodegenError where a kernel that is new would be loaded into a stream under capture."""
    if not torch.cuda.is_initialized() or not torch.cuda.is_current_stream_capturing():
        return
    name = getattr(kernel, "__name__", str(kernel))
    raise CodegenError(
        "a kernel is not compiled yet, and cannot be while a CUDA graph is captured",
        got=f"{name}({', '.join(map(_brief, arguments))})",
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
