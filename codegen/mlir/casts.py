"""Casts to and from FP8 that come out right where a compiler's own do not.

IREE's CPU backend (3.13) makes a zero of what should be rounded up to the smallest normal number of an FP8 format, and
reads the negative NaN of e4m3 as -480. So neither is ever shown to it: such a number is rounded before the cast, NaN
has no sign, and what is read as larger than the format's largest number is NaN again. The results are those of torch's
casts, bit for bit, but for the sign of NaN.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALLEST: dict[torch.dtype, tuple[float, float]] = {
    torch.float8_e4m3fn: (2.0**-6, 2.0**-6 - 2.0**-10),
    torch.float8_e5m2: (2.0**-14, 2.0**-14 - 2.0**-17),
}
"""FP8 format -> its smallest normal number, and the least that is rounded up to it."""


def prepared(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x`, FP32, such that its cast to `dtype` needs no rounding up to the smallest normal number."""
    smallest, least = SMALLEST[dtype]
    size = x.abs()
    up = (size >= least) & (size < smallest)
    return torch.where(up, torch.where(x < 0.0, -smallest, smallest), torch.where(x == x, x, torch.nan))


def exact(cast: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What torch's cast operator is taken apart into, with casts to and from FP8 made safe.

    Args:
        cast: What it is taken apart into otherwise.
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
