"""Histograms of magnitudes with bins fixed in advance: a bin index is taken from the bits of the FP32 magnitude.

    bin = exponent and top mantissa bits         bin 0 counts zeros; exponents are clipped to [low, low + 48)

A bin is therefore 2^-5 (per tensor) or 2^-3 (per channel) of its power of two wide. All batches use the same bins, and
histograms of parts add up to the histogram of the whole, in any order.

`low` is -24 unless the largest magnitude is below 2^-8 or at least 2^24; then it follows that magnitude, so that very
small or large values are resolved too. When a larger magnitude arrives, bins below the new `low` are added to the
lowest bin.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.ir import ALL, Format

LOWEST, EXPONENTS = -24, 48
"""The lowest exponent with its own bins by default, and the number of such exponents; smaller and larger values fall
into the first or last bin."""

BELOW = 16
"""Minimum number of exponents below the largest magnitude's that have their own bins."""

TENSOR_BITS, CHANNEL_BITS = 5, 3
"""Mantissa bits of a bin."""

MANTISSA, BIAS = 23, 127
"""Of FP32."""

POINTS = 4
"""Sample points per bin for the error sum: a bin may be wider than a step of an 8-bit format, so its center alone is
not representative."""

RATIOS = tuple(1 - step / 100 for step in range(81))
"""Candidate clips, as fractions of the largest magnitude: 1, 0.99, … 0.2."""

CHUNK = 1 << 21
"""Elements processed at a time."""


@dataclass(eq=False)
class Histogram:
    """How often each magnitude was seen.

    Attributes:
        tensor: i64[bins], all channels together.
        channel: i32[C, bins], by channel; holds for up to 2^31 rows.
        low: The lowest exponent with its own bins; None until a nonzero number was seen.
    """

    tensor: Tensor
    channel: Tensor
    low: int | None = None

    @classmethod
    def empty(cls, channels: int) -> "Histogram":
        """Returns an empty histogram."""
        tensor = torch.zeros(bin_count(TENSOR_BITS), dtype=torch.int64)
        return cls(tensor, torch.zeros(channels, bin_count(CHANNEL_BITS), dtype=torch.int32))

    def update(self, x: Tensor) -> None:
        """Counts the finite elements of `x`, floating point `[rows, C]`."""
        channels, bins = self.channel.shape
        first = torch.arange(channels, device=x.device) * bins
        for part in x.split(max(1, CHUNK // max(1, channels))):
            magnitude = part.to(torch.float32).abs()
            keep = magnitude.isfinite()
            self._raise_to(low_for(float(magnitude[keep].amax() if keep.any() else 0)))
            fine = bin_of(magnitude, TENSOR_BITS, self.low)
            coarse = (fine + 3 >> TENSOR_BITS - CHANNEL_BITS) + first  # four fine bins are one coarse bin
            if not keep.all():
                fine, coarse = fine[keep], coarse[keep]
            self.tensor += torch.bincount(fine.flatten(), minlength=self.tensor.numel()).cpu()
            counts = torch.bincount(coarse.flatten(), minlength=self.channel.numel())
            self.channel += counts.to(torch.int32).cpu().view(channels, bins)

    def merge(self, other: "Histogram") -> None:
        """Adds the counts of `other`."""
        self._raise_to(other.low)
        other = Histogram(other.tensor.clone(), other.channel.clone(), other.low)
        other._raise_to(self.low)
        self.tensor += other.tensor
        self.channel += other.channel

    def _raise_to(self, low: int | None) -> None:
        """Raises the lowest exponent to `low`, if `low` is higher."""
        if low is None or (self.low is not None and low <= self.low):
            return
        if self.low is not None:
            self.tensor = _moved_down(self.tensor, low - self.low << TENSOR_BITS)
            self.channel = _moved_down(self.channel, low - self.low << CHANNEL_BITS)
        self.low = low


def low_for(largest: float) -> int | None:
    """Returns the lowest exponent with its own bins for a largest magnitude; None for zero."""
    if not largest:
        return None
    exponent = math.frexp(largest)[1]  # the magnitude is below 2 to this power
    return max(min(LOWEST, exponent - BELOW), exponent - EXPONENTS, 1 - BIAS)


def _moved_down(counts: Tensor, by: int) -> Tensor:
    """Moves counts `[..., bins]` down by `by` bins; bins that would fall below the lowest are added to it."""
    zeros, others = counts[..., :1], counts[..., 1:]
    by = min(by, others.shape[-1] - 1)
    lowest = others[..., : by + 1].sum(-1, keepdim=True, dtype=counts.dtype)
    return torch.cat([zeros, lowest, others[..., by + 1 :], torch.zeros_like(others[..., :by])], -1)


def bin_count(bits: int) -> int:
    """Returns the number of bins with `bits` mantissa bits, the zero bin included."""
    return 1 + (EXPONENTS << bits)


def bin_of(magnitude: Tensor, bits: int, low: int | None = None) -> Tensor:
    """Returns the bin of each FP32 magnitude, i64 in the shape of `magnitude`; undefined for non-finite magnitudes.

    Args:
        magnitude: FP32, not negative.
        bits: Mantissa bits of a bin.
        low: The lowest exponent with its own bins; None for `LOWEST`.
    """
    first = (LOWEST if low is None else low) + BIAS << bits
    code = (magnitude.contiguous().view(torch.int32) >> MANTISSA - bits) - first
    return torch.where(magnitude == 0, 0, code.clamp_(0, bin_count(bits) - 2) + 1).to(torch.int64)


def edges(bits: int, low: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns the lower and upper edges of the bins, f64[bins]; the last is open above. Arguments as in `bin_of`."""
    first = (LOWEST if low is None else low) + BIAS << bits
    codes = torch.arange(bin_count(bits), dtype=torch.int32) + first
    upper = (codes << MANTISSA - bits).view(torch.float32).to(torch.float64)
    lower = upper.roll(1)
    lower[:2] = 0  # the first bin after the zeros also counts all smaller magnitudes
    upper[0], upper[-1] = 0, torch.inf
    return lower, upper


def quantile(counts: Tensor, bits: int, absmax: Tensor, percent: float, low: int | None = None) -> Tensor:
    """Returns the magnitude that `percent` of the elements do not exceed.

    Ranks follow `torch.quantile`, linear between elements; elements are assumed evenly spaced in their bin.

    Args:
        counts: i64 or i32 `[C, bins]`.
        bits: Mantissa bits of a bin.
        absmax: The largest magnitude, f32[C]; the result never exceeds it, and equals it at 100.
        percent: Above 0, up to 100.
        low: As in `bin_of`.

    Returns:
        f32[C]; 0 where nothing was counted.
    """
    below = counts.to(torch.int64).cumsum(1)
    last = (below[:, -1:] - 1).clamp_min(0)
    rank = last.to(torch.float64) * (percent / 100)
    limits = edges(bits, low)
    under, over = (
        _at_rank(counts, below, limits, absmax, k.to(torch.int64), last) for k in (rank.floor(), rank.ceil())
    )
    return torch.lerp(under, over, rank - rank.floor()).to(torch.float32).squeeze(1).minimum(absmax)


def _at_rank(
    counts: Tensor, below: Tensor, limits: tuple[Tensor, Tensor], absmax: Tensor, rank: Tensor, last: Tensor
) -> Tensor:
    """Returns the magnitude of the element of that rank, f64[C, 1]; exact for the last rank."""
    lower, upper = limits
    top = absmax.to(torch.float64).unsqueeze(1)
    at = torch.searchsorted(below, rank + 1).clamp_max_(counts.shape[1] - 1)
    count = counts.gather(1, at)
    place = (rank - (below.gather(1, at) - count) + 0.5) / count.clamp_min(1)
    low, high = lower[at].minimum(top), upper[at].minimum(top)
    return torch.where(rank == last, top, low + place * (high - low))


def best_clip(counts: Tensor, bits: int, absmax: Tensor, format: Format, low: int | None = None) -> Tensor:
    """Returns the clip among `RATIOS` of absmax with the least squared quantization error; ties go to the largest.

    The error follows `qcompiler.numerics` with the scale of the clip, at absmax itself and at `POINTS` magnitudes per
    bin, weighted by the bin counts.

    Args:
        counts: i64 or i32 `[C, bins]`.
        bits: Mantissa bits of a bin.
        absmax: The largest magnitude, f32[C].
        format: The format that derives scale and codes from a clip; its block is ignored.
        low: As in `bin_of`.

    Returns:
        f32[C].
    """
    counts = counts.to(torch.float64)
    counts.scatter_add_(1, bin_of(absmax, bits, low).unsqueeze(1), counts.new_full((len(absmax), 1), -1))
    used = counts.any(0).nonzero().squeeze(1)
    used = used[used > 0]  # zero is quantized to zero with any scale
    weights = counts[:, used].repeat_interleave(POINTS, 1) / POINTS
    lower, upper = (edge[used].unsqueeze(1) for edge in edges(bits, low))
    place = (torch.arange(POINTS) + 0.5) / POINTS
    size = max(1, CHUNK // max(1, used.numel() * POINTS))
    clips = []
    for weight, top in zip(weights.split(size), absmax.split(size), strict=True):
        high = upper.minimum(top.to(torch.float64).view(-1, 1, 1))
        points = lower.minimum(high) + place * (high - lower).clamp_min(0)
        clips.append(_best(points.flatten(1).to(torch.float32), weight, top, format))
    return torch.cat(clips)


def _best(points: Tensor, weights: Tensor, absmax: Tensor, format: Format) -> Tensor:
    """`best_clip` of some channels: magnitudes and their weights, [C, n]; absmax itself counts once more."""
    rows, top = replace(format, block=(1, ALL)), absmax.unsqueeze(1)
    points, weights = torch.cat([points, top], 1), torch.cat([weights, weights.new_ones(len(weights), 1)], 1)
    unit = top.clamp_min(torch.finfo(torch.float32).tiny)
    errors = []
    for ratio in RATIOS:
        scale = numerics.scale_of(top * ratio, rows)
        codes = numerics.quantize_static(points, scale, rows)
        # In units of absmax, because the squares of very small numbers would underflow.
        error = ((numerics.dequantize(codes, scale, format=rows) - points) / unit).square()
        errors.append((error * weights).sum(1))
    return absmax * torch.tensor(RATIOS)[torch.stack(errors).argmin(0)]
