"""What a checkpoint format is, and which there are."""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from torch import Tensor

from qcompiler.checkpoints.block_fp8 import BlockFp8
from qcompiler.checkpoints.compressed_tensors import CompressedTensors
from qcompiler.checkpoints.quantized_weight import QuantizedWeight
from qcompiler.errors import QCompilerError, did_you_mean


class Format(Protocol):
    """How quantized weights are stored, and what the configuration says of them."""

    @property
    def fix(self) -> str:
        """What to do about weights that it cannot hold."""

    def why_not(self, weight: QuantizedWeight) -> str | None:
        """Why it cannot hold a quantized weight; None when it can."""

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """A quantized weight as tensors, by their names in the file."""

    def config(self, weights: Mapping[str, QuantizedWeight], unconverted: Collection[str]) -> dict[str, Any]:
        """The `quantization_config`, for all quantized weights and the names of the other linears."""


class Float:
    """High precision: for a model in which nothing is quantized, such as one that is only smoothed."""

    fix = "Compile it without quantizing: pipeline=qcompiler.checkpoints.smoothing(scheme), strict=False."

    def why_not(self, weight: QuantizedWeight) -> str | None:
        """Always: it would have to be dequantized."""
        return f"it is quantized: {str(weight.codes.dtype).removeprefix('torch.')}"

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Nothing, since no weight comes here."""
        return {}

    def config(self, weights: Mapping[str, QuantizedWeight], unconverted: Collection[str]) -> dict[str, Any]:
        """Nothing."""
        return {}


def format_called(name: str, scale_format: str) -> Format:
    """The format of that name; QCompilerError with the nearest one when there is none."""
    known: dict[str, Format] = {
        "fp8": BlockFp8(scale_format),
        "compressed-tensors": CompressedTensors(),
        "float": Float(),
    }
    if name not in known:
        raise QCompilerError("no such checkpoint format", got=repr(name), fix=did_you_mean(str(name), known))
    return known[name]
