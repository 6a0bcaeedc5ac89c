"""The dialects, one module each; importing this package fills the operation table."""

from qcompiler.dialects import (
    aten,
    attention,
    coll,
    coll_tokens,
    core,
    entries,
    fused_append,
    fused_attend,
    fx,
    gather,
    grouped,
    kernel,
    pointwise,
    quant,
    state,
)

__all__ = [
    "aten",
    "attention",
    "coll",
    "coll_tokens",
    "core",
    "entries",
    "fused_append",
    "fused_attend",
    "fx",
    "gather",
    "grouped",
    "kernel",
    "pointwise",
    "quant",
    "state",
]
