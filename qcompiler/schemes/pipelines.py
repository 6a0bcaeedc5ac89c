"""Builds pipelines from quantization specs.

    QuantizationSpec(FP8_ROW, FP8_ROW)    ->    canonicalize; attention; dead-code; quantize; share-quantize; …

Several specs make one pipeline, each for the layers whose weight names match its patterns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from passes.analyses.layers import EVERYTHING
from passes.attention.attention import Attention
from passes.cleanup.canonicalize import Canonicalize
from passes.cleanup.dead_code import DeadCode
from passes.cleanup.fold_constants import FoldConstants
from passes.fusing.fuse_activation_quantize import FuseActivationQuantize
from passes.fusing.fuse_epilogue import FuseEpilogue, takes_expression
from passes.fusing.fuse_norm_quantize import FuseNormQuantize
from passes.fusing.fuse_prescale import FusePrescale
from passes.fusing.gather_codes import GatherCodes
from passes.fusing.merge_linears import MergeLinears
from passes.lowering.to_kernels import ToKernels
from passes.quantizing.calibrate import Calibrate
from passes.quantizing.fp8_tile import Fp8Tile
from passes.quantizing.fuse_linear import FuseLinear
from passes.quantizing.quantize import Quantize
from passes.quantizing.scheme_options import Observer
from passes.quantizing.share_quantize import ShareQuantize
from passes.smoothing.smooth_scales import Alpha
from passes.smoothing.smoothquant import SmoothQuant
from qcompiler.calibration.statistics import FROM_HISTOGRAM
from qcompiler.ir import ALL, Format
from qcompiler.ir.formats import FP8_BLOCK, FP8_TILE
from qcompiler.pass_manager.options import convert_options
from qcompiler.pass_manager.pipeline import Pass, Pipeline

SAMPLED_ROWS = 256
"""Rows of each activation that calibration keeps to measure errors."""

MIN_GAIN = 0.02
"""Minimum relative error reduction for optional smoothing; less may be noise, not worth the extra work."""


@dataclass(frozen=True)
class QuantizationSpec:
    """How a scheme quantizes a linear.

    Attributes:
        x: The format of activations.
        w: The format of weights.
        static: Whether activation scales come from calibration; otherwise they are computed in each call.
        observer: How calibration computes a static scale.
        percentile: Used by the observer "percentile".
        smooth: Whether to fold activation channel scales into the weights first: never, always, or where measurements
            show a smaller error.
        alpha: SmoothQuant migration strength: a number, "search" or "learn".
        pow2: Whether smoothing scales are powers of two, so scaling is exact.
    """

    x: Format = FP8_TILE
    w: Format = FP8_BLOCK
    static: bool = False
    observer: Observer = "absmax"
    percentile: float = 99.99
    smooth: Literal["never", "always", "measured"] = "never"
    alpha: Alpha = 0.5
    pow2: bool = False

    def __post_init__(self) -> None:
        """Checks the fields against their type hints; raises PassError for a wrong value."""
        convert_options(self, "a quantization spec")

    @property
    def needs_calibration(self) -> bool:
        """Whether the pipeline needs calibration inputs."""
        return self.static or self.smooth != "never"

    def passes(self, layers: Sequence[str] = EVERYTHING) -> tuple[Pass | None, Quantize]:
        """The smoothing pass, if any, and the quantization pass."""
        options: dict[str, Any] = {
            "x_format": self.x, "w_format": self.w, "static": self.static, "observer": self.observer,
            "percentile": self.percentile, "layers": tuple(layers),
        }  # fmt: skip
        tiled = self.x.block[0] == 1 and self.w.block == FP8_BLOCK.block and self.w.element.is_float
        quantize: Any = Fp8Tile if tiled else Quantize
        if self.smooth == "never":
            return None, quantize(**options)
        gain = MIN_GAIN if self.smooth == "measured" else None
        return SmoothQuant(**options, alpha=self.alpha, pow2=self.pow2, min_gain=gain), quantize(**options)

    def merging(self, layers: Sequence[str] = EVERYTHING) -> list[Pass]:
        """The pass that merges linears, if a kernel supports the formats and no scale spans a whole weight."""
        if self.x.block[1] == 1 or self.w.block == (ALL, ALL) or self.w.level is not None:
            return []
        return [MergeLinears(self.w, tuple(layers), static=self.static)]


def assemble(specs: Mapping[QuantizationSpec, Sequence[str]]) -> Pipeline:
    """One pipeline for several specs, each for the layers that its patterns select."""
    pairs = [spec.passes(layers) for spec, layers in specs.items()]
    smoothing = [smooth for smooth, _ in pairs if smooth is not None]
    # after passes that treat layers separately, before quantization
    merging = [step for spec, layers in specs.items() for step in spec.merging(layers)]
    return Pipeline(
        (
            # canonicalize first, because other passes expect canonical matmuls; attention before dead-code, which
            # removes masks, and before passes that measure the model
            Canonicalize(), Attention(), DeadCode(),
            *_calibration(specs, smoothing), *merging, *(quantize for _, quantize in pairs), ShareQuantize(),
            *([FusePrescale()] if smoothing else ()), FuseLinear(), FoldConstants(), DeadCode(), ToKernels(),
            *_fusing([quantize for _, quantize in pairs]),
        )
    )  # fmt: skip


def _fusing(quantizing: Sequence[Quantize]) -> list[Pass]:
    """The passes that fuse kernels with surrounding arithmetic, for dynamic scales per row or tile.

    Grouped matmuls, before which rows are gathered, have tiles.
    """
    rows = [step for step in quantizing if step.x_format.block[0] == 1 and not step.static]
    tiles = [step for step in rows if takes_expression(step.x_format, step.w_format)]
    steps: list[Pass] = [FuseNormQuantize(), FuseActivationQuantize()] if rows else []
    return [GatherCodes(), *steps, FuseEpilogue()] if tiles else steps


def _calibration(specs: Mapping[QuantizationSpec, Sequence[str]], smoothing: Sequence[Pass]) -> list[Pass]:
    """The calibration and smoothing passes; histograms of smoothed values need a second calibration."""
    seen = {spec: layers for spec, layers in specs.items() if spec.needs_calibration}
    if not seen:
        return []
    # With several specs, observe every layer plus all named layers, since one list cannot combine their patterns.
    positive = (p for patterns in seen.values() for p in patterns if not p.startswith("!"))
    layers = tuple(next(iter(seen.values()))) if len(seen) == 1 else tuple(dict.fromkeys((*EVERYTHING, *positive)))
    sampled = any(spec.smooth == "measured" or isinstance(spec.alpha, str) for spec in seen)
    histograms = [spec for spec in seen if spec.static and spec.observer in FROM_HISTOGRAM]
    first = any(spec.smooth == "never" for spec in histograms)
    steps: list[Pass] = [Calibrate(first, SAMPLED_ROWS if sampled else 0, layers), *smoothing]
    if any(spec.smooth != "never" for spec in histograms):
        steps.append(Calibrate(histogram=True, layers=layers))
    return steps
