"""Shared by the templates of Gluon kernels: tensor descriptors for the copy engine of Hopper, and options."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from codegen.launching.launch import descriptor
from codegen.templates.template import ceil_div

ONE_WARPGROUP = {"num_warps": 4}
"""Options of warp-specialized kernels: warps of the first consumer; the kernel requests the others itself."""

GLUON_TYPES = {
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.int8: gl.int8,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
}


def tile(tensor: Tensor, rows: int, columns: int = 128) -> Any:
    """A descriptor of a contiguous tensor as a matrix, in boxes of that size."""
    shape = tensor.shape
    height, width = shape[:-1].numel(), shape[-1]
    layout = _swizzled(rows, columns, tensor.dtype)
    return descriptor(TensorDescriptor, tensor, [height, width], width, [rows, columns], layout)


def scale_columns(scale: Tensor, rows: int) -> Any:
    """A descriptor of the transpose of the scales `[m, blocks]`, in boxes of one column; see `has_scale_columns`."""
    m, blocks = scale.shape
    stride = scale.stride(1) if blocks > 1 else ceil_div(m, 4) * 4  # one column alone may have any stride
    return descriptor(TensorDescriptor, scale, [blocks, m], stride, [1, rows], _in_a_row())


def has_scale_columns(scale: Tensor) -> bool:
    """Whether the copy engine can read these `[m, blocks]` scales column by column, at multiples of 16 bytes."""
    (m, blocks), (stride_m, stride_k) = scale.shape, scale.stride()
    return (m == 1 or stride_m == 1) and (blocks == 1 or stride_k % 4 == 0) and scale.data_ptr() % 16 == 0


@cache
def _swizzled(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """The layout of a tile in shared memory: swizzled, as the tensor cores read it."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], GLUON_TYPES[dtype])


@cache
def _in_a_row() -> Any:
    """The layout of a box of scales in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
