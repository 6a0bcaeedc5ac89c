"""Compile-time constants of quantization arithmetic."""

from typing import Any

import torch

from qcompiler import numerics
from qcompiler.numerics.dtypes import ir_dtype

Scales = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""The tensors of a key-value cache: key, value, and the scales of both."""


def cache_rounding(cache: Scales) -> dict[str, Any]:
    """The constants of the kernels that append to a cache."""
    scale = cache[2]
    dtype = torch.float8_e4m3fn if scale is None else cache[0].dtype
    return rounding(numerics.DEFAULT_PROFILE, dtype, static=scale is not None and scale.dim() == 1)


def rounding(profile: str, dtype: torch.dtype, *, static: bool = False) -> dict[str, Any]:
    """The constants of a profile and an 8-bit format, in the order of the kernel parameters.

    `TOP` is 0 if there is no format: the kernel quantizes nothing. `AMAX_FLOOR` is None if the scale is `static`.
    """
    rule = numerics.profile(profile)
    return {
        "AMAX_FLOOR": None if static else rule.amax_floor(ir_dtype(dtype)),
        "TOP": numerics.FORMAT_MAX.get(dtype, 0.0),
        "RECIPROCAL": rule.division == "reciprocal",
        "UE8M0": rule.scale_format == "ue8m0",
    }
