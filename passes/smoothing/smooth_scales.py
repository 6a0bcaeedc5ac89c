"""Computes the scales of SmoothQuant (by formula, search or learning), and the error that compares them.

    s = max|X|^alpha / max|W|^(1 - alpha)          for each input channel, over all weights that read the activation

Source of the formula: Xiao et al., SmoothQuant, 2023, equation 4. Search and learning minimize the error of the group's
outputs, quantized as the scheme will quantize them, on a sample of real rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from passes.quantizing.scheme_options import SchemeOptions
from qcompiler import numerics
from qcompiler.errors import PassError
from qcompiler.ir import ALL, DType, Format

Alpha = float | Literal["search", "learn"]

BOUNDS = (1e-4, 1e4)
"""Scales beyond these would leave the range of the weights' element types. They are relative: see `_bounded`."""

ALPHAS = tuple(step / 20 for step in range(21))
"""The alphas that a search tries, besides not smoothing."""

STEPS, RATE = 60, 0.05
"""Steps of gradient descent on log s, and the step size."""


@dataclass(frozen=True)
class SmoothedLinear:
    """A linear of the group that will be quantized.

    Attributes:
        weight: FP32 `[N, K]`, before smoothing.
        labels: i64 `[K]`: the group's channel of each input; -1 for inputs that are not scaled.
        rows: A sample of its input, FP32 `[rows, K]`; None if there is none.
        absmax: The largest magnitude in each channel of its input over all data seen, FP32 `[K]`: a single scale for
            the tensor must cover these.
    """

    weight: Tensor
    labels: Tensor
    rows: Tensor | None
    absmax: Tensor

    def part(self, index: int) -> "SmoothedLinear":
        """The same with every other row of the sample: the even or the odd ones."""
        rows = self.sample
        return replace(self, rows=rows[index::2] if len(rows) > 1 else rows)

    @cached_property
    def exact(self) -> Tensor:
        """The outputs without quantization, FP32 `[rows, N]`."""
        found: Tensor = self.sample @ self.weight.T
        return found

    @cached_property
    def unit(self) -> Tensor:
        """A power of two near the largest output; without it, squares of small outputs would underflow in FP32."""
        _, exponent = torch.frexp(self.exact.abs().amax())
        return torch.exp2(exponent.to(torch.float32) - 1)

    @property
    def sample(self) -> Tensor:
        """The rows; raises PassError if there are none."""
        if self.rows is None:
            fix = "Put calibrate{rows=256} before it in the pipeline."
            raise PassError("a sample of the activations is needed, and calibration has none", fix=fix)
        return self.rows


def lost_to_smoothing(weight: Tensor, factors: Tensor) -> float:
    """Returns by how many dB the rounding error of a weight grows if its columns are scaled, for one integer scale.

    The error is proportional to the largest magnitude, the signal to the root of the mean square; negative if it
    shrinks.
    """
    before, after = (float(w.abs().max() / w.square().mean().sqrt()) for w in (weight, weight * factors))
    return 20 * math.log10(after / before)


def largest(values: Sequence[Tensor], labels: Sequence[Tensor], classes: Tensor) -> Tensor:
    """The largest magnitude in each class of channels, FP32 `[channels]`: tied channels have the same one.

    Args:
        values: One FP32 vector of magnitudes per linear.
        labels: The channel that each magnitude belongs to; -1 for none.
        classes: i64 `[channels]`: channels of one class must have one scale.
    """
    found = torch.zeros(len(classes), dtype=torch.float32, device=classes.device)
    for magnitudes, channels in zip(values, labels, strict=True):
        known = channels >= 0
        found = found.scatter_reduce(0, classes[channels[known]], magnitudes.to(found)[known], "amax")
    return found[classes]


def by_formula(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """The scale of each channel; 1 where the activation or the weight is zero. FP32, finite, within `BOUNDS`."""
    known = (x_max > 0) & (w_max > 0)
    scale = torch.ones_like(x_max)
    scale[known] = _bounded(x_max[known].pow(alpha) / w_max[known].pow(1 - alpha))
    return scale


def _bounded(scale: Tensor) -> Tensor:
    """Scales within `BOUNDS`; if some exceed them, all are divided by one power of two, then clamped.

    This makes the median about 1. A factor shared by all channels does not affect quantization error; without the
    division, very small or large activations would all get a bound as their scale.
    """
    if not scale.numel() or bool(((scale >= BOUNDS[0]) & (scale <= BOUNDS[1])).all()):
        return scale
    exponent = scale.clamp(2.0**-126, 2.0**126).log2().median().round()
    return (scale / exponent.exp2()).clamp(*BOUNDS)


def to_powers_of_two(scale: Tensor) -> Tensor:
    """The nearest power of two, in logarithm."""
    return torch.exp2(scale.log2().round())


def by_search(
    x_max: Tensor, w_max: Tensor, linears: Sequence[SmoothedLinear], options: SchemeOptions, pow2: bool
) -> Tensor:
    """The scale with the smallest error: one for each of `ALPHAS`, or all ones."""
    found = [by_formula(x_max, w_max, alpha) for alpha in ALPHAS]
    candidates = [torch.ones_like(x_max), *([to_powers_of_two(scale) for scale in found] if pow2 else found)]
    return min(candidates, key=lambda scale: output_error(scale, linears, options))


def by_learning(start: Tensor, classes: Tensor, linears: Sequence[SmoothedLinear], options: SchemeOptions) -> Tensor:
    """The best scale found by gradient descent on log s from `start`, one number per class.

    Gradients pass straight through the codes; the scales of blocks are differentiated normally.
    """
    ones = torch.zeros_like(start).scatter_reduce(0, classes, torch.ones_like(start), "sum").clamp_min(1)
    log_scale = torch.zeros_like(start).scatter_reduce(0, classes, start.log(), "sum").div_(ones)
    log_scale.requires_grad_()
    optimizer = torch.optim.Adam([log_scale], RATE)
    best, least = start, output_error(start, linears, options)
    with torch.enable_grad():
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = torch.stack([_loss(log_scale[classes].exp(), linear, options) for linear in linears]).sum()
            if float(loss.detach()) < least:
                best, least = log_scale.detach()[classes].exp().clamp(*BOUNDS), float(loss.detach())
            loss.backward()
            optimizer.step()
    return best


def output_error(scale: Tensor, linears: Sequence[SmoothedLinear], options: SchemeOptions) -> float:
    """The squared error of the quantized outputs over the squared outputs, summed over the linears."""
    with torch.no_grad():
        return sum(float(_loss(scale, linear, options)) for linear in linears)


def _loss(scale: Tensor, linear: SmoothedLinear, options: SchemeOptions) -> Tensor:
    rows, weight = linear.sample, linear.weight
    own = torch.where(linear.labels < 0, 1.0, scale[linear.labels.clamp(min=0)])
    # A single scale for the tensor must cover all data seen, not just the sample.
    whole = options.x_format.block == (ALL, ALL) and options.x_format.symmetric
    top = (linear.absmax / own).amax() if whole else None
    x, w = _quantized(rows / own, options.x_format, top), _quantized(weight * own, options.w_format)
    signal = (linear.exact / linear.unit).square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return ((x @ w.T - linear.exact) / linear.unit).square().sum() / signal


def _quantized(x: Tensor, format: Format, top: Tensor | None = None) -> Tensor:
    """`x` after quantization, in FP32; by the one scale for that largest magnitude, if given."""
    level: list[Tensor] = []
    if top is None:
        codes, scale, *level = numerics.quantize(x, format)
    else:
        scale = numerics.scale_of(top, format).reshape(numerics.scale_shape(x.shape, format.block))
        codes = numerics.quantize_static(x, scale, format)
    with torch.no_grad():
        values = numerics.decode(codes, format)
    full = numerics.in_full(scale, *level) if format.symmetric else scale
    ones, plain = torch.ones_like(values, dtype=torch.int8), Format(DType.i8, format.block)
    each = numerics.dequantize(ones, full, format=plain)
    if not format.symmetric:
        values = values - numerics.dequantize(ones, level[0].to(torch.float32), format=plain)
    found: Tensor = x + each * (values - x / each).detach() if x.requires_grad else values * each
    return found
