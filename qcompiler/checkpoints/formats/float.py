"""High precision, for a model without quantized weights, such as one that is only smoothed."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from qcompiler.checkpoints.format import CheckpointFormat, register
from qcompiler.checkpoints.quantized_weight import QuantizedWeight


class FloatWriter:
    """Writes no quantized weights."""

    fix = "Compile it without quantizing: pipeline=qcompiler.checkpoints.smoothing(scheme), strict=False."
    readers = ("vllm", "transformers")

    def why_not(self, weight: QuantizedWeight) -> str | None:
        """Rejects every quantized weight: it would have to be dequantized."""
        return f"it is quantized: {str(weight.codes.dtype).removeprefix('torch.')}"

    def why_unread(self, weight: QuantizedWeight) -> str | None:
        """None: there are no quantized weights."""

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Empty: there are no quantized weights."""
        return {}

    def config(self, weights: Mapping[str, QuantizedWeight], unconverted: Collection[str]) -> dict[str, Any]:
        """Empty: nothing is quantized."""
        return {}


register(CheckpointFormat("float", declared=False, writer=lambda _: FloatWriter()))
