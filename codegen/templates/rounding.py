"""Compile-time constants of quantization arithmetic."""

from typing import Any

import torch

from qcompiler import numerics
from qcompiler.numerics.dtypes import ir_dtype


def rounding(profile: str, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of a profile and an 8-bit format, in the order of the kernel parameters.

    `TOP` is 0 if there is no format: the kernel quantizes nothing.
    """
    rule = numerics.profile(profile)
    return {
        "AMAX_FLOOR": rule.amax_floor(ir_dtype(dtype)),
        "TOP": numerics.FORMAT_MAX.get(dtype, 0.0),
        "RECIPROCAL": rule.division == "reciprocal",
        "UE8M0": rule.scale_format == "ue8m0",
    }
