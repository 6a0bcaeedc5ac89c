"""The `kernel` dialect: what code generation consumes. As `quant`, with the order of the scales in memory settled.

`scale_layout` is "row_major" (the scales of one row of blocks stand together) or "col_major" (the scales of one column
of blocks do, which is the order that a matrix kernel reads them in). It says nothing about shapes and values.
"""

from typing import Any

import torch

from qcompiler import numerics
from qcompiler.dialects.quant import (
    FORMAT,
    PROFILE,
    linear_types,
    quantize,
    quantize_static,
    quantize_static_types,
    quantize_types,
)
from qcompiler.ir import Op, Type
from qcompiler.ir.op_table import BLOCK, DTYPE, OpDef, OpError, declare, one_of

SCALE_LAYOUT = one_of("row_major", "col_major")


def scaled_linear_types(op: Op) -> tuple[Type, ...]:
    """As `quant.linear`; the producer of the activation's scales must write the layout that is read."""
    producer = op.tensor(1).op
    written, read = producer.attrs.get("scale_layout"), op.attrs["x_scale_layout"]
    if producer.name == "kernel.quantize" and written != read:
        raise OpError(f"{op.args[1]} is written {written}, but read {read}", 1)
    return linear_types(op)


def _quantize(*operands: Any, scale_layout: str, **keywords: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(*operands, **keywords)


def _scaled_linear(*operands: Any, x_scale_layout: str, **keywords: Any) -> torch.Tensor:
    return numerics.scaled_linear(*operands, **keywords)


declare(
    OpDef(
        "kernel.quantize",
        "`quant.quantize`, with the scales in a given order in memory.",
        ("x", "prescale?"),
        {"block": BLOCK, "dtype": FORMAT, "profile": PROFILE, "scale_layout": SCALE_LAYOUT},
        types=quantize_types,
        meaning=_quantize,
    )
)
declare(
    OpDef(
        "kernel.quantize_static",
        "`quant.quantize_static`.",
        ("x", "scale", "prescale?"),
        {"block": BLOCK, "dtype": FORMAT, "profile": PROFILE},
        types=quantize_static_types,
        meaning=quantize_static,
    )
)
declare(
    OpDef(
        "kernel.scaled_linear",
        "`quant.linear`, with the activation's scales in a given order in memory.",
        ("x", "x_scale", "w", "w_scale", "bias?"),
        {"out_dtype": DTYPE, "w_block": BLOCK, "x_block": BLOCK, "x_scale_layout": SCALE_LAYOUT},
        types=scaled_linear_types,
        meaning=_scaled_linear,
    )
)
