"""Decompositions of torch operators: torch-mlir's table, except where it lowers an operator directly or wrongly."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codegen.mlir.casts import exact
from codegen.mlir.extras import load

aten = torch.ops.aten

WHOLE = (aten.nan_to_num.default, aten.full.default)
"""Operators that torch-mlir lowers directly, so no decomposition is needed."""


def clamp(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    """`aten.clamp` between numbers. NaN stays NaN; torch-mlir's lowering turns it into the lower limit."""
    if min is not None:
        x = torch.where(x < min, min, x)
    return x if max is None else torch.where(x > max, max, x)


def clamp_min(x: Tensor, min: float) -> Tensor:
    """`aten.clamp_min` with a number."""
    return clamp(x, min)


def clamp_max(x: Tensor, max: float) -> Tensor:
    """`aten.clamp_max` with a number."""
    return clamp(x, max=max)


def table(safe_casts: bool) -> dict[Any, Callable[..., Any]]:
    """Operator -> its decomposition; `safe_casts` includes the FP8 decompositions of `casts`."""
    found = dict(load("torch_mlir.extras.fx_decomp_util", "mlir").get_decomposition_table())
    for operator in WHOLE:
        found.pop(operator, None)
    found |= {aten.clamp.default: clamp, aten.clamp_min.default: clamp_min, aten.clamp_max.default: clamp_max}
    if safe_casts:
        found[aten._to_copy.default] = exact(found[aten._to_copy.default])
    return found
