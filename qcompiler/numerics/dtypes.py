"""Element types of the IR and of torch, and formats from the arguments of torch operators."""

from collections.abc import Sequence
from functools import cache

import torch

from qcompiler.errors import QCompilerError
from qcompiler.ir.formats import DEFAULT_PROFILE, ELEMENTS, Format
from qcompiler.ir.types import LONG_NAMES, DType

IR_DTYPES: dict[torch.dtype, DType] = {getattr(torch, name): dtype for name, dtype in LONG_NAMES.items()}
"""Our element type for each of torch's."""

TORCH_DTYPES: dict[DType, torch.dtype] = {dtype: torch.uint8 for dtype in DType if dtype.bits < 8}
TORCH_DTYPES |= {ours: dtype for dtype, ours in IR_DTYPES.items()}
"""Torch's element type for each of ours; elements below 8 bits are packed into bytes."""

FORMAT_MAX: dict[torch.dtype, float] = {
    TORCH_DTYPES[element]: largest for element, largest in ELEMENTS.items() if element.bits == 8
}
"""The largest magnitude of each 8-bit code, by torch's element type."""


def torch_dtype(dtype: DType) -> torch.dtype:
    """Torch's element type for one of ours."""
    return TORCH_DTYPES[dtype]


def ir_dtype(dtype: torch.dtype) -> DType:
    """Our element type for one of torch's; QCompilerError when the IR has none."""
    if dtype not in IR_DTYPES:
        raise QCompilerError("the graph IR has no such element type", got=dtype, need=", ".join(map(str, DType)))
    return IR_DTYPES[dtype]


def format_of(block: Sequence[int], dtype: torch.dtype = torch.float8_e4m3fn, profile: str = DEFAULT_PROFILE) -> Format:
    """The format of 8-bit codes with FP32 scales that the arguments of a torch operator describe.

    Raises:
        QCompilerError: An unknown profile, a malformed block, or a dtype that is not in `FORMAT_MAX`.
    """
    if dtype not in FORMAT_MAX:
        raise QCompilerError("not an 8-bit format", got=dtype, need=" or ".join(map(str, FORMAT_MAX)))
    return _made(IR_DTYPES[dtype], tuple(block), profile)


_made = cache(lambda element, block, profile: Format(element, block, profile=profile))
