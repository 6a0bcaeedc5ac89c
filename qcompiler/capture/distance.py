"""How far two tensors are apart, as the check of a captured graph measures it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

CHUNK = 1 << 24
"""Entries that are compared at a time: a tensor of logits is large, and four times as large in FP64."""


@dataclass(frozen=True)
class Distance:
    """The difference of two tensors.

    Attributes:
        rms: Root mean square of the differences between finite entries.
        largest: The largest of them.
        unlike: The number of entries that have no difference: other integers, other booleans, NaN or an infinity on
            one side only.
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
        """The distance of two tensors of one shape."""
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
        """`relative` times a tensor's own distance from zero."""
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return cls()
        size = cls.between(tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape))
        return cls(size.rms * relative, size.largest * relative)

    def within(self, limit: "Distance") -> bool:
        """Whether no measure is beyond that of `limit`."""
        return self.rms <= limit.rms and self.largest <= limit.largest and self.unlike <= limit.unlike

    def or_larger(self, other: "Distance") -> "Distance":
        """The larger of two distances, measure by measure."""
        return Distance(max(self.rms, other.rms), max(self.largest, other.largest), max(self.unlike, other.unlike))

    def times(self, factor: int) -> "Distance":
        """Each measure times `factor`."""
        return Distance(self.rms * factor, self.largest * factor, self.unlike * factor)


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The entries of a tensor, a part at a time; complex ones as pairs."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        yield flat[start : start + CHUNK]
