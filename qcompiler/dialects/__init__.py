"""The dialects, one module each; importing this package fills the operation table."""

from qcompiler.dialects import (
    aten,
    attention,
    core,
    fused_append,
    fused_attend,
    grouped,
    kernel,
    pointwise,
    quant,
    state,
)

__all__ = [
    "aten",
    "attention",
    "core",
    "fused_append",
    "fused_attend",
    "grouped",
    "kernel",
    "pointwise",
    "quant",
    "state",
]
