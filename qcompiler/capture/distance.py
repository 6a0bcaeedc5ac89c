"""The distance between two tensors, as used by the check of a captured graph."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

CHUNK = 1 << 24
"""Entries compared at a time: logits are large, and four times as large in FP64."""


@dataclass(frozen=True)
class Distance:
    """The difference between two tensors.

    Attributes:
        rms: Root mean square of the differences between finite entries.
        largest: The largest difference between finite entries.
        unlike: Number of entries without a numeric difference: unequal integers or booleans, NaN or infinity on one
            side only.
    """

    rms: float = 0.0
    largest: float = 0.0
    unlike: int = 0

    def __str__(self) -> str:
        if self.unlike:
            return f"{self.unlike} entries that differ in kind or number"
        return f"a largest difference of {self.largest:.3g}, root mean square {self.rms:.3g}"

    @classmethod
    def between(cls, left: torch.Tensor, right: torch.Tensor) -> "Distance":
        """Returns the distance between two tensors of equal shape."""
        squares, largest, unlike = 0.0, 0.0, 0
        for a, b in zip(_chunks(left), _chunks(right), strict=True):
            if not a.is_floating_point():
                unlike += int((a != b).sum())
                continue
            finite = torch.isfinite(a) & torch.isfinite(b)
            same = (a == b) | (torch.isnan(a) & torch.isnan(b))
            unlike += int((~finite & ~same).sum())
            gap = torch.where(finite, a.double() - b.double(), 0.0)
            squares += float(gap.square().sum())
            largest = max(largest, float(gap.abs().max()))
        return cls(math.sqrt(squares / max(1, left.numel())), largest, unlike)

    @classmethod
    def of_size(cls, tensor: torch.Tensor, relative: float) -> "Distance":
        """Returns `relative` times a tensor's distance from zero."""
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return cls()
        size = cls.between(tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape))
        return cls(size.rms * relative, size.largest * relative)

    def within(self, limit: "Distance") -> bool:
        """Whether no measure is above the same measure of `limit`."""
        return self.rms <= limit.rms and self.largest <= limit.largest and self.unlike <= limit.unlike

    def or_larger(self, other: "Distance") -> "Distance":
        """Returns the larger of two distances, measure by measure."""
        return Distance(max(self.rms, other.rms), max(self.largest, other.largest), max(self.unlike, other.unlike))

    def times(self, factor: int) -> "Distance":
        """Returns the distance with each measure multiplied by `factor`."""
        return Distance(self.rms * factor, self.largest * factor, self.unlike * factor)


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the entries of a tensor in chunks; complex ones as pairs."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        yield flat[start : start + CHUNK]
