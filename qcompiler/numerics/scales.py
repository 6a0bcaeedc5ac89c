"""Computes scales from the largest magnitudes of blocks."""

import math

import torch
from torch import Tensor

from qcompiler.ir.formats import FP8_TENSOR, SCALES, Format, profile
from qcompiler.ir.types import DType
from qcompiler.numerics.dtypes import torch_dtype

SMALLEST_E8M0 = 2.0**-127


def scale_of(amax: Tensor, format: Format = FP8_TENSOR, tensor_scale: Tensor | None = None) -> Tensor:
    """The scale for each largest magnitude, either of a block or from calibration.

    Args:
        amax: FP32, not negative, any shape; not modified. The scale of an infinity or NaN is NaN.
        format: Defines the rounding and the dtype of the scale.
        tensor_scale: FP32, one element, if the format has a tensor scale.
    """
    rule = profile(format.profile)
    if format.scale is DType.f8e8m0fnu and rule.scale_format == "f32":
        exponent = math.frexp(format.max)[1] - 1
        floor_of_amax = amax.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
        scale = (floor_of_amax * 2.0**-exponent).clamp_min(SMALLEST_E8M0)
    else:
        # A tensor divisor, because CUDA computes division by a Python number as multiplication by its reciprocal.
        top = torch.full((), format.max, dtype=torch.float32, device=amax.device)
        floored = amax if tensor_scale is not None else amax.clamp_min(rule.amax_floor(format.element))
        scale = floored / top
        if tensor_scale is not None:
            scale = scale / tensor_scale
        if rule.scale_format == "ue8m0":
            # ceil(log2) on the bits: a nonzero mantissa carries into the exponent and is then cleared.
            scale = scale.view(torch.int32).add(0x7FFFFF).bitwise_and_(0x7F800000).view(torch.float32)
    scale = scale + amax * 0  # NaN where amax is not finite
    if format.scale is DType.f32:
        return scale
    return scale.clamp_max(SCALES[format.scale]).to(torch_dtype(format.scale))


def tensor_scale_of(amax: Tensor, format: Format) -> Tensor:
    """The FP32 tensor scale, computed from the largest finite magnitude."""
    top = torch.full((), format.max * SCALES[format.scale], dtype=torch.float32, device=amax.device)
    return amax.clamp_min(profile(format.profile).amax_floor(format.element)) / top


def asymmetric_scale_of(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """The scale and the zero point, in FP32, for the smallest and the largest number of each block.

    The range always contains zero, which is a code, so padding and sparse activations stay exact.

    Args:
        low: FP32, at most 0, any shape. The scale of a NaN or an infinity is NaN, and its zero point 0.
        high: FP32, at least 0, the same shape.
        format: Defines the codes and the smallest range.
    """
    least, most = format.code_range
    steps = torch.full((), most - least, dtype=torch.float32, device=low.device)
    floor = profile(format.profile).amax_floor(format.element) / most
    # Each end is divided before the subtraction, which could overflow otherwise.
    scale = (high / steps - low / steps).clamp_min(floor) + (low + high) * 0
    return scale, (least - low / scale).round_().clamp_(least, most).nan_to_num_(nan=0.0)


def in_full(scale: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
    """The full FP32 scale of the codes: scale * tensor_scale."""
    wide = scale.to(torch.float32)
    return wide if tensor_scale is None else wide * tensor_scale
