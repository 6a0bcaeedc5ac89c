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


@dataclass(frozen=True)
class FusedConfig:
    """The tile of the kernel that computes rows and quantizes them.

    Attributes:
        block_m: Rows, a power of two.
        block_k: Columns, a power of two, a multiple of `group`.
        group: Columns that share a scale; `block_k` for whole rows.
        warps: Warps that share the tile.
        vector: Columns that follow each other in a thread.
    """

    block_m: int
    block_k: int
    group: int
    warps: int
    vector: int


def fused_config(m: int, k: int, block_k: int, *, whole_rows: bool, operand_bytes: int, kept: int) -> FusedConfig:
    """The tile for `m` rows of `k` columns, quantized in blocks of `block_k` columns, or -1 for rows.

    Args:
        m: Rows.
        k: Columns.
        block_k: Columns that share a scale, or -1 for all.
        whole_rows: The body needs whole rows.
        operand_bytes: Bytes of an element of the widest operand.
        kept: How many values are stored beside the codes.
    """
    if whole_rows or block_k < 0:
        return _row_config(m, k, block_k, operand_bytes > 2 or kept > 0)
    columns = 512
    if m > 512:
        # The widest with little of it outside of the row.
        columns = next((size for size in (2048, 1024) if -k % size < k // 16), 512)
    columns = max(min(columns, 1 << max((k - 1).bit_length(), 4)), block_k)
    return FusedConfig(1, columns, block_k, max(columns // 1024, 1), 8 if kept else 16)


def _row_config(m: int, k: int, block_k: int, heavy: bool) -> FusedConfig:
    """Rows as a whole: 64 numbers a thread, or 32 where there are few rows, or much to hold of each number."""
    columns = max(1 << max((k - 1).bit_length(), 4), block_k)
    if m <= 512:
        block_m, shares = 1, columns // 1024
    else:
        block_m = max(1024 // columns, 1)
        shares = block_m * k // 1024 if heavy else block_m * columns // 2048
    warps = min(1 << max(shares.bit_length() - 1, 0), 8)
    # Loads and stores of bfloat16 are whole with 8 columns in a thread, those of codes with 16; the columns that a step
    # of all threads covers should divide the row.
    vector = 8 if heavy or k % (512 * warps) else 16
    return FusedConfig(block_m, columns, columns if block_k < 0 else block_k, warps, vector)
