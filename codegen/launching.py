"""What every launch on a GPU needs: a device that can run the kernels, operands as rows, the right current device."""

import contextlib
from functools import cache

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
