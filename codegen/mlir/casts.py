"""Casts to and from FP8 that are correct where a compiler's own casts are not.

IREE's CPU backend (3.13) flushes values to zero that should round up to the smallest normal number of an FP8 format,
and reads the negative NaN of e4m3 as -480. These casts avoid both: such values are rounded before the cast, NaN has no
sign, and values read as larger than the format's maximum become NaN again. The results are bit-equal to torch's casts,
except for the sign of NaN.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALLEST: dict[torch.dtype, tuple[float, float]] = {
    torch.float8_e4m3fn: (2.0**-6, 2.0**-6 - 2.0**-10),
    torch.float8_e5m2: (2.0**-14, 2.0**-14 - 2.0**-17),
}
"""FP8 format -> its smallest normal number, and the smallest value that rounds up to it."""


def prepared(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x`, FP32, adjusted so that its cast to `dtype` never rounds up to the smallest normal number."""
    smallest, least = SMALLEST[dtype]
    size = x.abs()
    up = (size >= least) & (size < smallest)
    return torch.where(up, torch.where(x < 0.0, -smallest, smallest), torch.where(x == x, x, torch.nan))


def exact(cast: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The decomposition of torch's cast operator, with safe casts to and from FP8.

    Args:
        cast: The regular decomposition.
    """

    def run(x: Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if dtype in SMALLEST and x.dtype not in SMALLEST:
            return cast(prepared(cast(x, dtype=torch.float32), dtype), dtype=dtype, **options)
        wide = cast(x, dtype=dtype, **options)
        if x.dtype is not torch.float8_e4m3fn or wide.dtype in SMALLEST:
            return wide
        return torch.where(wide.abs() <= torch.finfo(x.dtype).max, wide, torch.nan)

    return run


__all__ = ["SMALLEST", "exact", "prepared"]
