"""The checkpoint formats that can be written, and their protocol."""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from torch import Tensor

from qcompiler.checkpoints.block_fp8 import BlockFp8
from qcompiler.checkpoints.compressed_tensors import CompressedTensors
from qcompiler.checkpoints.quantized_weight import QuantizedWeight
from qcompiler.errors import QCompilerError, did_you_mean


class Format(Protocol):
    """How a format stores quantized weights and describes them in the configuration."""

    @property
    def fix(self) -> str:
        """Advice for weights that the format cannot store."""

    def why_not(self, weight: QuantizedWeight) -> str | None:
        """The reason why this format cannot store a quantized weight; None if it can."""

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of a quantized weight by their names in the file."""

    def config(self, weights: Mapping[str, QuantizedWeight], unconverted: Collection[str]) -> dict[str, Any]:
        """The `quantization_config` for all quantized weights and the names of unconverted layers."""


class Float:
    """High precision, for a model without quantized weights, such as one that is only smoothed."""

    fix = "Compile it without quantizing: pipeline=qcompiler.checkpoints.smoothing(scheme), strict=False."

    def why_not(self, weight: QuantizedWeight) -> str | None:
        """Rejects every quantized weight: it would have to be dequantized."""
        return f"it is quantized: {str(weight.codes.dtype).removeprefix('torch.')}"

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Empty: there are no quantized weights."""
        return {}

    def config(self, weights: Mapping[str, QuantizedWeight], unconverted: Collection[str]) -> dict[str, Any]:
        """Empty: nothing is quantized."""
        return {}


def format_called(name: str, scale_format: str) -> Format:
    """Looks up a format by name. Raises QCompilerError, which suggests the nearest name."""
    known: dict[str, Format] = {
        "fp8": BlockFp8(scale_format),
        "compressed-tensors": CompressedTensors(),
        "float": Float(),
    }
    if name not in known:
        raise QCompilerError("no such checkpoint format", got=repr(name), fix=did_you_mean(str(name), known))
    return known[name]
