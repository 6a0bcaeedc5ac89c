"""The tiles of the quantization kernels: how many rows and columns a program takes, and with how many warps."""

from dataclasses import dataclass

AMAX_PROGRAMS = 1024
"""Programs that share a tensor when its amax is taken, at most: about as many as an H200 runs at one time."""

LONGEST_ROW = 16384
"""Columns of a row that a program can hold in registers."""


@dataclass(frozen=True)
class QuantizeConfig:
    """The tile of a quantization kernel.

    Attributes:
        block_m: Rows, a power of two.
        block_k: Columns, a power of two.
        warps: Warps that share the tile.
    """

    block_m: int
    block_k: int
    warps: int


def quantize_config(m: int, block_k: int) -> QuantizeConfig:
    """The tile for quantizing `m` rows in blocks of `block_k`: many small ones while the device is not full."""
    elements = 4096 if m > 512 else 1024
    return QuantizeConfig(max(elements // block_k, 1), block_k, 4 if m > 512 else 1)


def token_config(m: int, k: int) -> QuantizeConfig:
    """The tile for quantizing `m` rows of `k` columns with a scale each: whole rows, 32 elements a thread or fewer.

    A row longer than `LONGEST_ROW` is walked along in steps. Few rows get more warps each, because then waiting for
    memory sets the pace.
    """
    block_k = min(1 << max((k - 1).bit_length(), 4), LONGEST_ROW) if k <= LONGEST_ROW else LONGEST_ROW // 2
    if m <= 512:
        return QuantizeConfig(1, block_k, min(max(block_k // 512, 1), 16))
    block_m = max(4096 // block_k, 1)
    return QuantizeConfig(block_m, block_k, min(max(block_m * block_k // 1024, 4), 16))


def tensor_config(m: int) -> QuantizeConfig:
    """The tile for a tensor of `m` rows with one scale."""
    return QuantizeConfig(8, 512, 4) if m > 512 else QuantizeConfig(1, 1024, 1)
