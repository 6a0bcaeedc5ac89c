"""The operation `kernel.gather_codes`: rows of a quantized matrix, chosen by an index.

%e_q, %e_s = kernel.gather_codes(%x_q, %x_s, %token) {format = #fp8_tile<scale_layout = "col_major">}

Quantizing a tensor and gathering rows of its codes and scales equals gathering rows and quantizing them, if no scale
covers several rows. See the pass gather-codes.
"""

import torch

from qcompiler.dialects.kernel import FORMAT
from qcompiler.dialects.quant import check_stored, stored_types
from qcompiler.ir import DType, Format, Op, Type, Value
from qcompiler.ir.op_table import OpDef, OpError, declare


def gather_codes_types(op: Op) -> tuple[Type, ...]:
    """(data codes[M, K], scale, rows i32[N] or i64[N]) -> codes[N, K], scale[N, ceil(K / columns)]"""
    check_stored(op, "data")
    data, rows, format = op["data"].tensor, op["rows"].tensor, op.format()
    if format.block[0] != 1:
        raise OpError(f"rows cannot be gathered without their neighbors: a scale of {format} covers several rows")
    if len(data.shape) != 2:
        raise OpError(f"the codes are {data}, but rows of a matrix are gathered", "data")
    if len(rows.shape) != 1 or rows.dtype not in (DType.i32, DType.i64):
        raise OpError(f"the rows are {rows}, but they must be a vector of i32 or i64", "rows")
    return stored_types(op, format, (rows.shape[0], data.shape[1]))


def gather_codes(
    data: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor, *, format: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch definition of `kernel.gather_codes`."""
    return data[rows], scale[rows]


def before_gather(codes: Value) -> Value:
    """The codes that an activation's codes are gathered from; by default, these codes."""
    return codes.op["data"] if codes.op.name == GATHER_CODES else codes


GATHER_CODES = "kernel.gather_codes"

declare(
    OpDef(
        GATHER_CODES,
        "Gathers rows of codes, and their scales in a given memory layout.",
        ("data", "scale", "rows"),
        {"format": FORMAT},
        types=gather_codes_types,
        meaning=gather_codes,
    )
)
