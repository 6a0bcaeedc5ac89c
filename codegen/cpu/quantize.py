"""Quantizes and dequantizes rows with few torch calls, bit-equal to `qcompiler.numerics`.

A decode step quantizes a few hundred numbers at a time, so it costs what its torch calls cost. Formats with blocks of
one row, 8-bit codes and FP32 scales need no padding to whole blocks of rows, and no general shapes.
"""

import weakref
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.numerics import ALL
from qcompiler.numerics.codes import PLAIN
from qcompiler.numerics.dtypes import IR_DTYPES

ZERO = torch.zeros(())

FEW, MANY = 2**10, 2**20
"""Numbers of FP8 codes up to which torch's cast, and above which arithmetic on the bits of all cores, is fastest."""

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
"""The value of each FP8 code."""


class _Rule(NamedTuple):
    """The constants of a format."""

    floor: float
    top: float
    reciprocal: bool
    powers_of_two: bool
    has_nan: bool


@cache
def _rule(dtype: torch.dtype, profile: str) -> _Rule:
    found, format = numerics.profile(profile), numerics.format_of((1, ALL), dtype, profile)
    floor = found.amax_floor(IR_DTYPES[dtype])
    halves = found.division == "reciprocal", found.scale_format == "ue8m0"
    return _Rule(floor, format.max, *halves, format.has_nan)


def quantize(
    x: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, prescale: Tensor | None = None,
    scale: Tensor | None = None, *, for_matmul: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`numerics.quantize` for 8-bit codes with FP32 scales; the same errors.

    Args:
        x: As in `numerics.quantize`.
        block: Rows and columns of a block.
        dtype: The dtype of the codes.
        profile: The profile of the format.
        prescale: As in `numerics.quantize`.
        scale: Where to write the scales; by default, new contiguous memory.
        for_matmul: Whether `dequantize_rows` will soon be called with the results.
    """
    few = type(x) in PLAIN and 0 < x.numel() <= numerics.MOST_AT_ONCE
    if not few or block[0] != 1 or x.dim() == 0 or not x.is_floating_point() or not _fits(prescale, x):
        codes, found = numerics.quantize(x, numerics.format_of(block, dtype, profile), prescale)
        return codes, found if scale is None else scale.copy_(found)
    rule, columns = _rule(dtype, profile), x.shape[-1]
    wide = x.to(torch.float32) if prescale is None else x.to(torch.float32) * prescale.to(torch.float32)
    size = columns if block[1] == ALL else block[1]
    if spare := -columns % size:
        wide = torch.constant_pad_nd(wide, (0, spare))
    blocks = wide.reshape(*x.shape[:-1], -1, size)
    scales = _scales(blocks.abs().amax(-1, keepdim=True), rule)
    scaled = (blocks * scales.reciprocal() if rule.reciprocal else blocks / scales).clamp_(-rule.top, rule.top)
    if not rule.has_nan:
        scaled.nan_to_num_(nan=0.0).round_()
    encoded = scaled.to(dtype)
    codes, found = _rows(encoded, columns, spare), scales.squeeze(-1)
    found = found if scale is None else scale.copy_(found)
    if for_matmul and rule.has_nan and x.numel() <= MOST_REMEMBERED:
        _remember(codes, found, _rows(encoded.to(torch.float32).mul_(scales), columns, spare))
    return codes, found


def _scales(amax: Tensor, rule: _Rule) -> Tensor:
    """As `numerics.scale_of`."""
    scale = amax.clamp_min(rule.floor).div_(rule.top)
    if rule.powers_of_two:
        scale.view(torch.int32).add_(0x7FFFFF).bitwise_and_(0x7F800000)
    return scale.addcmul_(amax, ZERO)  # NaN if amax is not finite


def _rows(blocks: Tensor, columns: int, spare: int) -> Tensor:
    """The rows of a contiguous tensor of blocks, without the columns that were added."""
    rows = blocks.view(*blocks.shape[:-2], columns + spare)
    return rows[..., :columns].contiguous() if spare else rows


def _fits(prescale: Tensor | None, x: Tensor) -> bool:
    return prescale is None or (prescale.shape == x.shape[-1:] and prescale.is_floating_point())


class _Remembered(NamedTuple):
    """The dequantized form of the latest codes, valid as long as they and their scales are unchanged."""

    codes: "weakref.ref[Tensor]"
    scale: "weakref.ref[Tensor]"
    versions: tuple[int, int]
    values: Tensor


_latest: list[_Remembered] = []
"""At most one: operators usually read what the last one quantized. Another thread only makes a call slower."""

MOST_REMEMBERED = 2**16
"""The largest number of codes whose dequantized form is kept; with more, arithmetic costs more than calls."""


def _remember(codes: Tensor, scale: Tensor, values: Tensor) -> None:
    if not codes.is_inference():
        _latest[:] = [_Remembered(weakref.ref(codes), weakref.ref(scale), (codes._version, scale._version), values)]


def _remembered(codes: Tensor, scale: Tensor) -> Tensor | None:
    for made in _latest:
        if made.codes() is codes and made.scale() is scale and made.versions == (codes._version, scale._version):
            return made.values
    return None


def dequantize_rows(codes: Tensor, scale: Tensor, size: int) -> Tensor:
    """`numerics.dequantize` to FP32 of codes whose blocks have one row and `size` columns, or ALL; the same errors.

    The result may be shared with other calls, so it must not be changed.
    """
    if (found := _remembered(codes, scale)) is not None:
        return found
    columns = codes.shape[-1] if codes.dim() else 0
    count = 1 if size == ALL else -(-columns // size)
    if type(codes) not in PLAIN or not codes.numel() or scale.shape != (*codes.shape[:-1], count):
        return numerics.dequantize(codes, scale, format=numerics.format_of((1, size), codes.dtype))
    values = decoded(codes)
    if count == 1:
        return values.mul_(scale)
    if columns == count * size:
        values.view(*scale.shape, size).mul_(scale.unsqueeze(-1))
        return values
    spread = scale.unsqueeze(-1).expand(*scale.shape, size).reshape(*scale.shape[:-1], -1)
    return values.mul_(spread[..., :columns])


def decoded(codes: Tensor) -> Tensor:
    """The FP32 values of 8-bit codes, as `numerics.decode`, in new memory."""
    count = codes.numel()
    if codes.dtype is not torch.float8_e4m3fn or count <= FEW:
        return codes.to(torch.float32)
    if count > MANY:
        return numerics.decode(codes, numerics.format_of((1, ALL), codes.dtype))
    return CODES.index_select(0, codes.view(torch.uint8).reshape(-1).to(torch.int32)).view(codes.shape)
