"""Counter-based random numbers: the noise of a row depends on its seed and position, never on other rows.

    gumbel(seeds [B], positions [B], V) -> f32[B, V]

Each number is a hash of (seed, position, column) in integer arithmetic, so every device computes the same bits up to
its logarithm.
"""

import torch
from torch import Tensor

# SplitMix64 (Steele et al., 2014), in two's complement because torch's int64 is signed.
STEP = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)

BITS = 40
"""Bits of a uniform number: small probabilities of large vocabularies need more than the 24 of an FP32 fraction."""

BELOW_ONE = 1 - 2.0**-24


def gumbel(seeds: Tensor, positions: Tensor, size: int, first: int = 0) -> Tensor:
    """Returns standard Gumbel noise, f32[B, size], for seeds i64[B] and positions i64[B].

    `first` is the number of the first column, if these are the columns of one rank.

    The argmax of logits + Gumbel noise is a sample of softmax(logits) (the Gumbel-max trick).
    """
    rows = hashed(hashed(seeds) + positions * STEP)
    columns = torch.arange(first, first + size, device=seeds.device) * STEP
    bits = (hashed(rows[:, None] + columns) >> (64 - BITS)) & ((1 << BITS) - 1)
    uniform = ((bits.float() + 0.5) * 2.0**-BITS).clamp(max=BELOW_ONE)
    return -torch.log(-torch.log1p(-uniform))


def hashed(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64, elementwise on i64; arithmetic wraps around."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Logical shift to the right; torch's shift of a signed integer keeps the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
