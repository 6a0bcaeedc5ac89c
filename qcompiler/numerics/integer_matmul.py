"""INT8 matmul with exact sums; uses the integer units of the CPU if available."""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

DEEPEST = 2**31 // 128**2 - 1
"""The largest K whose dot product of INT8 codes fits 32 bits."""

SLAB = 2**24 // 128**2
"""The largest K whose dot product of INT8 codes is exact in FP32, in any order."""


def integer_matmul(x: Tensor, w: Tensor) -> Tensor:
    """`x @ w.T` of INT8 codes `[M, K]` and `[N, K]`: exact sums, rounded once to FP32."""
    if x.device.type == "cpu" and x.shape[1] <= DEEPEST and has_integer_units():
        return torch._int_mm(x, w.t()).to(torch.float32)
    slabs = zip(x.split(SLAB, 1), w.split(SLAB, 1), strict=True)
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64, device=x.device)
    for left, right in slabs:
        total += functional.linear(left.to(torch.float32), right.to(torch.float32))
    return total.to(torch.float32)


@cache
def has_integer_units() -> bool:
    """Whether `torch._int_mm` is fast and exact on this CPU; without VNNI it may be a plain loop or saturate."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_vnni", "amx_int8"))
