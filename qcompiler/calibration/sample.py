"""A sample of rows that depends only on the set of rows seen.

Each row has a key, a hash of its bits; the rows with the smallest keys are kept (bottom-k sampling). Equal data
therefore gives equal samples in any order and batching, and the samples of two parts merge into the sample of the
whole. Duplicate rows count once: padding and the first token of a text, which are equal in every batch, do not crowd
out other rows.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
"""The constants of splitmix64 (Steele, Lea and Flood, 2014), as signed numbers."""

CHUNK = 1 << 21
"""Elements hashed at a time."""


@dataclass(eq=False)
class Sample:
    """Up to `capacity` distinct rows.

    Attributes:
        capacity: Maximum number of rows.
        rows: f32[n, C], by ascending key.
        keys: i64[n].
    """

    capacity: int
    rows: Tensor
    keys: Tensor

    @classmethod
    def empty(cls, capacity: int, channels: int) -> "Sample":
        """Returns an empty sample."""
        return cls(capacity, torch.zeros(0, channels), torch.zeros(0, dtype=torch.int64))

    def update(self, x: Tensor) -> None:
        """Adds the rows of `x`, floating point `[rows, C]`, as candidates; rows with NaN or Inf are skipped."""
        for part in x.split(max(1, CHUNK // max(1, x.shape[1]))):
            rows = part.to(torch.float32)
            finite = rows.isfinite().all(1)
            rows = rows if finite.all() else rows[finite]
            keys = row_keys(rows)
            chosen = _smallest(keys, self.capacity)
            self._take(rows[chosen].cpu(), keys[chosen].cpu())

    def merge(self, other: "Sample") -> None:
        """Adds the rows of `other` as candidates; the smaller capacity of the two applies."""
        self.capacity = min(self.capacity, other.capacity)
        self._take(other.rows, other.keys)

    def _take(self, rows: Tensor, keys: Tensor) -> None:
        keys = torch.cat([self.keys, keys])
        chosen = _smallest(keys, self.capacity)
        self.rows, self.keys = torch.cat([self.rows, rows])[chosen], keys[chosen]


def row_keys(rows: Tensor) -> Tensor:
    """Returns a 64-bit hash of the bits of each row, i64[n] for f32[n, C]: a random linear function, mixed."""
    bits = rows.contiguous().view(torch.int32).to(torch.int64)
    return _mixed((bits * _multipliers(rows.shape[1]).to(rows.device)).sum(1))


@cache
def _multipliers(channels: int) -> Tensor:
    """Returns one odd number per channel, i64[C]."""
    return _mixed(torch.arange(1, channels + 1) * GOLDEN) | 1


def _mixed(x: Tensor) -> Tensor:
    """The finalizer of splitmix64; arithmetic wraps around."""
    x = (x ^ (x >> 30)) * FIRST
    x = (x ^ (x >> 27)) * SECOND
    return x ^ (x >> 31)


def _smallest(keys: Tensor, count: int) -> Tensor:
    """Returns the indices of the `count` smallest distinct keys, in ascending order."""
    ordered, places = keys.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return places[new][:count]
