"""Statistics of one value: per-channel ranges, and on request a histogram and a sample; updated batch by batch.

Memory grows with the number of channels, not of rows.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.calibration.histogram import CHANNEL_BITS, TENSOR_BITS, Histogram, best_clip, quantile
from qcompiler.calibration.sample import Sample
from qcompiler.errors import QCompilerError, did_you_mean
from qcompiler.ir import Format, TensorType
from qcompiler.ir.formats import INT8_TENSOR

MOMENTUM = 0.9
"""Decay of the moving average per batch."""

FROM_RANGES = ("absmax", "minmax", "moving_average")
FROM_HISTOGRAM = ("percentile", "mse")
OBSERVERS = (*FROM_RANGES, *FROM_HISTOGRAM)
"""The observers: ways to reduce statistics to one magnitude; see `Statistics.amax`."""

PER = ("tensor", "channel")
NATIVE = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes whose extremes are exact in FP32."""


@dataclass(eq=False)
class Statistics:
    """Statistics of one value whose last axis has C channels. All tensors are on the CPU.

    Attributes:
        channels: C.
        rows: Number of rows: the product of the leading sizes, summed over batches.
        batches: Number of batches, including those without rows.
        filled: Number of batches with rows.
        absmax: The largest magnitude, f32[C]; 0 where nothing was seen.
        minimum: The smallest element, f32[C]; inf where nothing was seen.
        maximum: The largest element, f32[C]; -inf where nothing was seen.
        average: The moving average of the absmax of each batch with rows, f32[C]: old · 0.9 + new · 0.1.
        first: Initial value of the moving average: absmax of the first batch with rows, f32[C].
        nan: Number of NaN seen. NaN and infinities do not count anywhere else.
        inf: Number of infinities seen.
        nonfinite_batch: The first batch with NaN or Inf, counted from 0; None if there is none.
        histogram: How often each magnitude was seen, if requested.
        sample: Some of the rows, if requested.
    """

    channels: int
    rows: int
    batches: int
    filled: int
    absmax: Tensor
    minimum: Tensor
    maximum: Tensor
    average: Tensor
    first: Tensor
    nan: int = 0
    inf: int = 0
    nonfinite_batch: int | None = None
    histogram: Histogram | None = None
    sample: Sample | None = None

    @classmethod
    def empty(cls, channels: int, *, histogram: bool = False, rows: int = 0) -> "Statistics":
        """Returns empty statistics, on request with a histogram and a sample of up to `rows` rows."""
        zeros = torch.zeros(4, channels)
        return cls(
            channels, 0, 0, 0, zeros[0].clone(), zeros[1] + torch.inf, zeros[1] - torch.inf, zeros[2].clone(),
            zeros[3].clone(), histogram=Histogram.empty(channels) if histogram else None,
            sample=Sample.empty(rows, channels) if rows else None,
        )  # fmt: skip

    @property
    def unseen(self) -> bool:
        """Whether there were no rows, or zeros only; for an expert, no token was routed to it."""
        return not bool((self.absmax > 0).any())

    def update(self, x: Tensor) -> None:
        """Adds one batch: floating point `[..., C]`; QCompilerError for any other tensor."""
        if x.dim() == 0 or not x.is_floating_point() or x.shape[-1] != self.channels:
            need = f"floating point, with {self.channels} channels on the last axis"
            raise QCompilerError("the batch does not fit the statistics", got=TensorType.of(x), need=need)
        rows = math.prod(x.shape[:-1])
        self.batches += 1
        if not rows or not self.channels:
            self.rows += rows
            return
        flat = x.detach().reshape(rows, self.channels)
        flat = flat if flat.dtype in NATIVE else flat.to(torch.float32)
        low, high = self._finite_range(flat)
        absmax = high.maximum(-low).clamp_min_(0)
        self.average = torch.lerp(absmax, self.average, MOMENTUM) if self.filled else absmax.clone()
        self.first = self.first if self.filled else absmax.clone()
        self.rows, self.filled = self.rows + rows, self.filled + 1
        self.minimum, self.maximum = self.minimum.minimum(low), self.maximum.maximum(high)
        self.absmax = self.absmax.maximum(absmax)
        if self.histogram is not None:
            self.histogram.update(flat)
        if self.sample is not None:
            self.sample.update(flat)

    def _finite_range(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the smallest and largest finite element of each channel; counts the non-finite ones."""
        low, high = flat.amin(0).float().cpu(), flat.amax(0).float().cpu()
        if low.isfinite().all() and high.isfinite().all():
            return low, high
        nan, finite = flat.isnan(), flat.isfinite()
        count = int(nan.sum())
        self.nan += count
        self.inf += int((~finite).sum()) - count
        self.nonfinite_batch = self.batches - 1 if self.nonfinite_batch is None else self.nonfinite_batch
        low = torch.where(finite, flat, torch.inf).amin(0).float().cpu()
        return low, torch.where(finite, flat, -torch.inf).amax(0).float().cpu()

    def merge(self, other: "Statistics") -> None:
        """Adds the statistics of `other` as if its batches came later; QCompilerError if the channels differ.

        A histogram is kept if both have one; a sample likewise, with the smaller capacity.
        """
        if other.channels != self.channels:
            problem = "statistics of different values cannot be merged"
            raise QCompilerError(problem, got=f"{other.channels} channels", need=self.channels)
        if not self.filled:
            self.average, self.first = other.average.clone(), other.first.clone()
        elif other.filled:
            # `other` started at its first batch; here that batch would have kept 0.9 of the previous average.
            self.average = other.average + MOMENTUM**other.filled * (self.average - other.first)
        if self.nonfinite_batch is None and other.nonfinite_batch is not None:
            self.nonfinite_batch = self.batches + other.nonfinite_batch
        self.rows, self.batches, self.filled = (
            self.rows + other.rows,
            self.batches + other.batches,
            self.filled + other.filled,
        )
        self.nan, self.inf = self.nan + other.nan, self.inf + other.inf
        self.minimum, self.maximum = self.minimum.minimum(other.minimum), self.maximum.maximum(other.maximum)
        self.absmax = self.absmax.maximum(other.absmax)
        self._merge_details(other)

    def _merge_details(self, other: "Statistics") -> None:
        if self.histogram is None or other.histogram is None:
            self.histogram = None
        else:
            self.histogram.merge(other.histogram)
        if self.sample is None or other.sample is None:
            self.sample = None
        else:
            self.sample.merge(other.sample)

    def scaled(self, factor: Tensor) -> "Statistics":
        """Returns the statistics of x · factor, for a positive `factor` [C].

        Exact, except for the histogram, which cannot be derived and is dropped.
        """
        factor = factor.detach().to("cpu", torch.float32)
        if factor.shape != (self.channels,) or not bool((factor.isfinite() & (factor > 0)).all()):
            need = f"{self.channels} positive numbers"
            raise QCompilerError("statistics cannot be scaled by this factor", got=_brief(factor), need=need)
        sample = self.sample and Sample(self.sample.capacity, self.sample.rows * factor, self.sample.keys.clone())
        return Statistics(
            self.channels, self.rows, self.batches, self.filled, self.absmax * factor, self.minimum * factor,
            self.maximum * factor, self.average * factor, self.first * factor, self.nan, self.inf,
            self.nonfinite_batch, None, sample,
        )  # fmt: skip

    def amax(
        self,
        observer: str,
        per: str,
        *,
        percentile: float = 99.99,
        format: Format = INT8_TENSOR,
    ) -> Tensor:
        """Returns the magnitude that the largest code of a quantized value represents.

        Args:
            observer: "absmax": the largest magnitude. "minmax": the larger of -minimum and maximum. "moving_average":
                of the absmax of each batch; per tensor, the largest of the channels. "percentile": the magnitude that
                this percentage of the elements do not exceed. "mse": the clip among 81 between 0.2 and 1 times absmax
                whose codes have the least squared error over the histogram.
            per: "tensor" or "channel".
            percentile: For "percentile": above 0, up to 100.
            format: For "mse": the format that derives scale and codes from a clip; its block is ignored.

        Returns:
            FP32, a scalar per tensor and [C] per channel; 0 where nothing was seen. "percentile" and "mse" never exceed
            absmax.

        Raises:
            QCompilerError: An argument is unknown, or a required histogram is missing.
        """
        for name, value, known in (("observer", observer, OBSERVERS), ("granularity", per, PER)):
            if value not in known:
                raise QCompilerError(f"unknown {name}", got=repr(value), fix=did_you_mean(str(value), known))
        if observer in FROM_RANGES:
            return self._from_ranges(observer, per)
        if not 0 < percentile <= 100:
            raise QCompilerError("the percentile is out of range", got=percentile, need="above 0, up to 100")
        found = self._from_histogram(observer, per, percentile, format)
        return found.squeeze(0) if per == "tensor" else found

    def _from_ranges(self, observer: str, per: str) -> Tensor:
        if observer == "minmax":
            found = self.maximum.maximum(-self.minimum).clamp_min(0)
        else:
            found = self.average.clone() if observer == "moving_average" else self.absmax.clone()
        return found if per == "channel" else found.amax() if self.channels else torch.zeros(())

    def _from_histogram(self, observer: str, per: str, percent: float, format: Format) -> Tensor:
        if self.histogram is None:
            fix = "Observe it with histogram=True; in a pipeline, use calibrate{histogram=true}."
            if self.rows:
                fix += " Scaling a value drops its histogram."
            raise QCompilerError(f"observer {observer!r} needs a histogram, but there is none", fix=fix)
        counts, bits = self.histogram.channel, CHANNEL_BITS
        if per == "tensor":
            counts, bits = self.histogram.tensor.unsqueeze(0), TENSOR_BITS
        absmax = self._from_ranges("absmax", per).reshape(counts.shape[0])
        if observer == "mse":
            return best_clip(counts, bits, absmax, format, self.histogram.low)
        return quantile(counts, bits, absmax, percent, self.histogram.low)


def _brief(factor: Tensor) -> str:
    """Describes a factor for a message: its type and its smallest entry."""
    smallest = f" with a smallest entry of {float(factor.min()):.6g}" if factor.numel() else ""
    return f"{TensorType.of(factor)}{smallest}"
