"""Options shared by the passes of one scheme: what to quantize, and the formats and scales to use."""

from dataclasses import dataclass
from typing import Literal

from passes.analyses.candidates import is_stored_quantized
from passes.analyses.layers import EVERYTHING, check_patterns, naming_pattern, why_not_layer
from qcompiler.errors import PassError
from qcompiler.ir import ALL, Format, Graph, Missed, Op, Value
from qcompiler.ir.formats import FP8_ROW
from qcompiler.pass_manager.pipeline import Pass

Observer = Literal["absmax", "minmax", "moving_average", "percentile", "mse"]
"""Methods for computing a static scale from calibration statistics; see `qcompiler.calibration`."""


@dataclass(frozen=True)
class SchemeOptions(Pass):
    """The common part of passes that quantize linears or prepare for that.

    Attributes:
        x_format: The format of activations.
        w_format: The format of weights.
        static: Whether the activation has one scale from calibration instead of a scale computed in each call.
        observer: How calibration computes a static scale.
        percentile: For the observer "percentile": the percentage of magnitudes that are not clipped.
        layers: Patterns for weight names that select linears, and which of these are named (see `analyses.layers`).
    """

    x_format: Format = FP8_ROW
    w_format: Format = FP8_ROW
    static: bool = False
    observer: Observer = "absmax"
    percentile: float = 99.99
    layers: tuple[str, ...] = EVERYTHING

    def __post_init__(self) -> None:
        """Raises PassError for block sizes that no pass supports, and for contradictory options."""
        super().__post_init__()
        for block in (self.x_format.block, self.w_format.block):
            if any(size > 0 and size & (size - 1) for size in block):
                need = f"powers of two, or {ALL} for the whole axis"
                raise PassError(f"a block of pass '{self.name}' has an unsupported size", got=list(block), need=need)
        if self.static and (self.x_format.block != (ALL, ALL) or self.x_format.level):
            need = "a format with one scale for the tensor, such as #fp8_tensor"
            raise PassError("a static scale must cover the whole tensor", got=self.x_format, need=need)
        if not 0 < self.percentile <= 100:
            raise PassError("a percentile must be above 0 and at most 100", got=self.percentile)

    def check_layers(self, graph: Graph) -> None:
        """Raises PassError for a pattern of `layers` that matches nothing."""
        check_patterns(self.layers, graph)

    def why_not(self, op: Op, graph: Graph) -> Missed | None:
        """Why this scheme skips an operation that reads weights; None if it quantizes it."""
        why = why_not_layer(self.layers, op, graph)
        return why or self.why_not_stored(op["weight"]) or self.why_not_packed(op["weight"])

    def naming_pattern(self, op: Op, graph: Graph) -> str | None:
        """The pattern of `layers` that names the layer of a matmul; None if there is none."""
        return naming_pattern(self.layers, op, graph)

    def why_not_stored(self, w: Value) -> Missed | None:
        """Why a weight stored as codes and scales cannot be multiplied as it is; None for any other."""
        if not is_stored_quantized(w):
            return None
        if (stored := w.op.format()).decodes_like(self.w_format):
            return None
        return Missed(f"its weight is stored as {stored}, and this scheme has {self.w_format}", w.op["data"])

    def why_not_packed(self, w: Value) -> Missed | None:
        """Why codes of less than 8 bits cannot be packed along the columns of a weight; None if they can."""
        why = self.w_format.why_not(w.tensor.shape) or self.x_format.why_not(w.tensor.shape)
        return Missed(why, w) if why else None
