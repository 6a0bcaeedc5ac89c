"""Maps IR dtypes to torch dtypes, and torch operator arguments to formats."""

from collections.abc import Sequence
from functools import cache

import torch

from qcompiler.errors import QCompilerError
from qcompiler.ir.formats import DEFAULT_PROFILE, ELEMENTS, Format
from qcompiler.ir.types import LONG_NAMES, DType

IR_DTYPES: dict[torch.dtype, DType] = {getattr(torch, name): dtype for name, dtype in LONG_NAMES.items()}
"""Torch dtype -> IR dtype."""

TORCH_DTYPES: dict[DType, torch.dtype] = {dtype: torch.uint8 for dtype in DType if dtype.bits < 8}
TORCH_DTYPES |= {ours: dtype for dtype, ours in IR_DTYPES.items()}
"""IR dtype -> torch dtype; elements below 8 bits are packed into bytes."""

FORMAT_MAX: dict[torch.dtype, float] = {
    TORCH_DTYPES[element]: largest for element, largest in ELEMENTS.items() if element.bits == 8
}
"""Torch dtype of an 8-bit code -> its largest magnitude."""


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of an IR dtype."""
    return TORCH_DTYPES[dtype]


def ir_dtype(dtype: torch.dtype) -> DType:
    """The IR dtype of a torch dtype; raises QCompilerError if there is none."""
    if dtype not in IR_DTYPES:
        raise QCompilerError("the graph IR does not have this dtype", got=dtype, need=", ".join(map(str, DType)))
    return IR_DTYPES[dtype]


def format_of(block: Sequence[int], dtype: torch.dtype = torch.float8_e4m3fn, profile: str = DEFAULT_PROFILE) -> Format:
    """The format, with 8-bit codes and FP32 scales, that the arguments of a torch operator describe.

    Raises:
        QCompilerError: The profile is unknown, the block is malformed, or the dtype is not in `FORMAT_MAX`.
    """
    if dtype not in FORMAT_MAX:
        raise QCompilerError("the dtype is not an 8-bit code type", got=dtype, need=" or ".join(map(str, FORMAT_MAX)))
    return _made(IR_DTYPES[dtype], tuple(block), profile)


_made = cache(lambda element, block, profile: Format(element, block, profile=profile))
