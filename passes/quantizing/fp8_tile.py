"""Inserts quantize and dequantize around each matmul with a constant weight: activations in tiles, weights in blocks.

    %y = aten.linear(%x, %w)
  ->
    %x_q, %x_s = quant.quantize(%x) {format = #fp8_tile}
    %w_q, %w_s = quant.quantize(%w) {format = #fp8_block}
    …, as `quantize` does it

Source of the method: DeepSeek-V3 Technical Report, section 3.3.2 (fine-grained quantization).
"""

from dataclasses import dataclass
from typing import ClassVar

from passes.quantizing.quantize import Quantize
from qcompiler.ir import Format
from qcompiler.ir.formats import FP8_BLOCK, FP8_TILE


@dataclass(frozen=True)
class Fp8Tile(Quantize):
    """linear(x, w)  ->  the same in FP8: x in tiles of 1 x 128, w in blocks of 128 x 128."""

    name: ClassVar[str] = "fp8-tile"

    x_format: Format = FP8_TILE
    w_format: Format = FP8_BLOCK
