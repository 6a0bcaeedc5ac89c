"""The options that the passes of one scheme share: what is quantized, how finely, in which format, by which scales."""

from dataclasses import dataclass
from typing import Literal

from passes.candidates import is_stored_quantized, why_not_quantized
from passes.layers import EVERYTHING, check_patterns, naming_pattern, why_not_selected
from qcompiler import numerics
from qcompiler.dialects.quant import EIGHT_BITS, block_of
from qcompiler.errors import PassError
from qcompiler.ir import DType, Graph, Missed, Op, Value
from qcompiler.numerics import ALL
from qcompiler.pass_manager import Pass

Observer = Literal["absmax", "minmax", "moving_average", "percentile", "mse"]
"""How a static scale is made from what calibration has seen; see `qcompiler.calibration`."""


@dataclass(frozen=True)
class SchemeOptions(Pass):
    """The common part of passes that quantize linears, or prepare that.

    Attributes:
        x_block: Rows and columns of an activation's block, -1 for the whole axis; one scale each.
        w_block: The same for a weight.
        dtype: The 8-bit format of both.
        profile: The numerics profile: how a scale is made from a block (see `qcompiler.numerics`).
        static: Whether the activation has one scale, which calibration has found, in place of one in each call.
        observer: How calibration makes a static scale.
        percentile: For the observer of that name: how many percent of the magnitudes are not clipped.
        layers: Patterns for names of weights: which linears it is about, and which are named (see `passes.layers`).
    """

    x_block: tuple[int, int] = (1, ALL)
    w_block: tuple[int, int] = (1, ALL)
    dtype: DType = DType.f8e4m3fn
    profile: str = numerics.DEFAULT_PROFILE
    static: bool = False
    observer: Observer = "absmax"
    percentile: float = 99.99
    layers: tuple[str, ...] = EVERYTHING

    def __post_init__(self) -> None:
        """PassError for a block, format or profile that does not exist."""
        super().__post_init__()
        numerics.profile(self.profile)
        if self.dtype not in EIGHT_BITS:
            need = " or ".join(map(str, EIGHT_BITS))
            raise PassError(f"pass '{self.name}' quantizes to 8-bit formats", got=self.dtype, need=need)
        for block in (self.x_block, self.w_block):
            if any(size < 1 and size != ALL for size in block):
                need = f"two positive sizes, or {ALL} for the whole axis"
                raise PassError(f"a block of pass '{self.name}' is empty", got=list(block), need=need)
            if any(size > 0 and size & (size - 1) for size in block):
                need = f"powers of two, or {ALL} for the whole axis"
                raise PassError(f"a block of pass '{self.name}' has an unsupported size", got=list(block), need=need)
        if self.static and self.x_block != (ALL, ALL):
            need = f"x_block=[{ALL}, {ALL}], the granularity of a tensor"
            raise PassError("only a scale for the whole tensor can be static", got=list(self.x_block), need=need)
        if not 0 < self.percentile <= 100:
            raise PassError("a percentile lies above 0 and up to 100", got=self.percentile)

    def check_layers(self, graph: Graph) -> None:
        """PassError for a pattern of `layers` that matches nothing."""
        check_patterns(self.layers, graph)

    def why_not(self, op: Op, graph: Graph) -> Missed | None:
        """Why this scheme leaves a reader of weights alone; None when it quantizes it."""
        why = why_not_quantized(op, graph)
        if why is None:
            why = why_not_selected(self.layers, op, graph)
        elif self.naming_pattern(op, graph) is not None:
            why = why_not_quantized(op, graph, named=True)
        return why or self.why_not_stored(op["weight"])

    def naming_pattern(self, op: Op, graph: Graph) -> str | None:
        """The pattern of `layers` that names the layer of a matmul; None if there is none."""
        return naming_pattern(self.layers, op, graph)

    def why_not_stored(self, w: Value) -> Missed | None:
        """Why a weight that is there as codes and scales cannot be multiplied as they are; None for any other."""
        if not is_stored_quantized(w):
            return None
        codes, block = w.op["data"], block_of(w.op, "block")
        if codes.tensor.dtype is self.dtype and block == self.w_block:
            return None
        wanted = f"this scheme has {self.dtype} and {list(self.w_block)}"
        return Missed(
            f"its weight is stored as {codes.tensor.dtype} with a scale for each {list(block)}, {wanted}", codes
        )
