"""What every launch on a GPU needs: a device that can run the kernels, operands as rows, the right current device."""

import contextlib
from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from codegen.kernel_cache import use_cache_folder
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


_COMPILED: dict[Hashable, Any] = {}


def launch(
    kernel: Any, programs: int, arguments: Sequence[Any], constants: dict[str, Any], options: dict[str, int],
    pointers: Sequence[Tensor | None], what: Hashable,
) -> None:  # fmt: skip
    """Launches `kernel[(programs,)](*arguments, **constants, **options)` on the current stream, cheaply once compiled.

    Triton's own launch binds and classifies all arguments anew, which takes longer than many kernels run. Here the
    compiled kernel is remembered by what Triton compiles for: the types of the arguments, whether pointers are aligned,
    and what it looks for in integers.

    Args:
        kernel: A Triton or Gluon function whose last parameters are the constants, in their order.
        programs: Size of the grid.
        arguments: All other arguments: tensors, tensor descriptors, integers below 2^31, None.
        constants: Arguments that the compiler knows.
        options: `num_warps`, `num_stages`.
        pointers: Those tensors that are passed as pointers, and None for those that are left out.
        what: Tells apart the constants, the options, the device, the types of descriptors, and the integers that the
            kernel is specialised on.
    """
    places = [None if t is None else (t.dtype, t.data_ptr() & 15 == 0) for t in pointers]
    key = (id(kernel), what, *places)
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*arguments, *constants.values())
        return
    compiled = kernel[(programs,)](*arguments, **constants, **options)
    if compiled is not None:  # the interpreter compiles nothing
        _COMPILED[key] = compiled


_TEMPLATES: dict[Hashable, Any] = {}


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
    key = (tensor_descriptor, tensor.dtype, *shape, stride, *block)
    template = _TEMPLATES.get(key)
    if template is None:
        if len(_TEMPLATES) >= 4096:  # one for each number of rows ever met
            _TEMPLATES.clear()
        template = _TEMPLATES[key] = tensor_descriptor(tensor, shape, [stride, 1], block, *layout).__dict__ | {
            "base": None
        }
    result = tensor_descriptor.__new__(tensor_descriptor)
    result.__dict__.update(template, base=tensor)
    return result
