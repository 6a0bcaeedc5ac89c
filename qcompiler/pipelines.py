"""From a recipe, which says what is wanted, to the passes that do it.

    Recipe(x="token", w="channel")    ->    canonicalize; dead-code; quantize; share-quantize; fuse-linear; …

Several recipes make one pipeline, each for the layers whose weights its patterns name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from passes.calibrate import Calibrate
from passes.canonicalize import Canonicalize
from passes.dead_code import DeadCode
from passes.fold_constants import FoldConstants
from passes.fp8_tile import Fp8Tile
from passes.fuse_activation_quantize import FuseActivationQuantize
from passes.fuse_epilogue import BLOCK, TILE, FuseEpilogue
from passes.fuse_linear import FuseLinear
from passes.fuse_norm_quantize import FuseNormQuantize
from passes.fuse_prescale import FusePrescale
from passes.layers import EVERYTHING
from passes.merge_linears import MergeLinears
from passes.quantize import Quantize
from passes.scheme_options import Observer
from passes.share_quantize import ShareQuantize
from passes.smooth_scales import Alpha
from passes.smoothquant import SmoothQuant
from passes.to_kernels import ToKernels
from qcompiler.errors import PassError
from qcompiler.ir import DType
from qcompiler.numerics import ALL, DEFAULT_PROFILE
from qcompiler.pass_manager import Pass, Pipeline

HISTOGRAMS = ("percentile", "mse")
"""Observers that need to know how many values there were of each size."""

SAMPLED_ROWS = 256
"""Rows of each activation that are kept to measure errors on."""

MIN_GAIN = 0.02
"""The part by which smoothing must make the error smaller where it is optional: less is chance, and costs a product."""

W_BLOCKS = {"block": (128, 128), "channel": (1, ALL), "tensor": (ALL, ALL)}


@dataclass(frozen=True)
class Recipe:
    """What a scheme does to a linear, declaratively.

    Attributes:
        dtype: The 8-bit format of activations and weights.
        x: What has one scale in an activation: a tile of a token, a token, the tensor, or a channel over all tokens.
        w: What has one scale in a weight: a block of 128 x 128, an output channel, or the tensor.
        k_block: Columns of an activation's tile; -1 for all of them.
        static: Whether an activation's scale comes from calibration; else it is computed in each call.
        observer: How calibration makes a static scale.
        percentile: For the observer of that name.
        smooth: Whether channels of activations are scaled into the weights first: never, always, or where that was
            measured to make the error smaller.
        alpha: How much of an outlier goes into the weights; a number, "search" or "learn".
        pow2: Whether smoothing scales are powers of two, so that scaling is exact.
        numerics: A profile of `qcompiler.numerics`.
        scale: "ue8m0" rounds scales up to powers of two.
    """

    dtype: DType = DType.f8e4m3fn
    x: Literal["tile", "token", "tensor", "channel"] = "tile"
    w: Literal["block", "channel", "tensor"] = "block"
    k_block: int = 128
    static: bool = False
    observer: Observer = "absmax"
    percentile: float = 99.99
    smooth: Literal["never", "always", "measured"] = "never"
    alpha: Alpha = 0.5
    pow2: bool = False
    numerics: str = DEFAULT_PROFILE
    scale: Literal["f32", "ue8m0"] = "f32"

    @property
    def needs_calibration(self) -> bool:
        """Whether real inputs must be seen first."""
        return self.static or self.smooth != "never"

    def passes(self, layers: Sequence[str] = EVERYTHING) -> tuple[Pass | None, Quantize]:
        """The pass that smooths, if any, and the one that quantizes."""
        options = self._options(tuple(layers))
        quantize = Fp8Tile if self.x == "tile" and self.w == "block" and self.dtype is not DType.i8 else Quantize
        if self.smooth == "never":
            return None, quantize(**options)
        gain = MIN_GAIN if self.smooth == "measured" else None
        return SmoothQuant(**options, alpha=self.alpha, pow2=self.pow2, min_gain=gain), quantize(**options)

    def merging(self, layers: Sequence[str] = EVERYTHING) -> list[Pass]:
        """The pass that makes one linear of several, where a kernel runs it and no scale spans all of a weight."""
        if self.x == "channel" or self.w == "tensor":
            return []
        return [MergeLinears(W_BLOCKS[self.w], tuple(layers), static=self.static)]

    def _options(self, layers: tuple[str, ...]) -> dict[str, Any]:
        x_blocks = {"tile": (1, self.k_block), "token": (1, ALL), "tensor": (ALL, ALL), "channel": (ALL, 1)}
        return {
            "x_block": x_blocks[self.x], "w_block": W_BLOCKS[self.w], "dtype": self.dtype, "profile": self._profile(),
            "static": self.static, "observer": self.observer, "percentile": self.percentile, "layers": layers,
        }  # fmt: skip

    def _profile(self) -> str:
        if self.scale == "f32":
            return self.numerics
        if self.numerics not in (DEFAULT_PROFILE, "ue8m0"):
            need = f"numerics={DEFAULT_PROFILE}, whose other rules the profile 'ue8m0' shares"
            raise PassError("no numerics profile of this kind has power-of-two scales", got=self.numerics, need=need)
        return "ue8m0"


def assemble(recipes: Mapping[Recipe, Sequence[str]]) -> Pipeline:
    """One pipeline for several recipes, each for the layers that its patterns select."""
    pairs = [recipe.passes(layers) for recipe, layers in recipes.items()]
    smoothing = [smooth for smooth, _ in pairs if smooth is not None]
    # behind what looks at layers one by one, in front of what quantizes
    merging = [step for recipe, layers in recipes.items() for step in recipe.merging(layers)]
    return Pipeline(
        (
            # canonicalize first: the others know one spelling of a matmul; dead-code: the dead is not worth the work
            Canonicalize(), DeadCode(),
            *_calibration(recipes, smoothing), *merging, *(quantize for _, quantize in pairs), ShareQuantize(),
            *([FusePrescale()] if smoothing else ()), FuseLinear(), FoldConstants(), DeadCode(), ToKernels(),
            *_fusing([quantize for _, quantize in pairs]),
        )
    )  # fmt: skip


def _fusing(quantizing: Sequence[Quantize]) -> list[Pass]:
    """What fuses the kernels with the arithmetic around them, where scales are computed in each call, row by row."""
    rows = [step for step in quantizing if step.x_block[0] == 1 and not step.static]
    tiles = [step for step in rows if (step.x_block, step.w_block, step.dtype) == (TILE, BLOCK, DType.f8e4m3fn)]
    steps: list[Pass] = [FuseNormQuantize(), FuseActivationQuantize()] if rows else []
    return [*steps, FuseEpilogue()] if tiles else steps


def _calibration(recipes: Mapping[Recipe, Sequence[str]], smoothing: Sequence[Pass]) -> list[Pass]:
    """What sees real inputs, and what smooths by that; a histogram of a smoothed value must be taken anew."""
    seen = {recipe: layers for recipe, layers in recipes.items() if recipe.needs_calibration}
    if not seen:
        return []
    # Several recipes observe every layer, since one list cannot hold their patterns, and the layers that any names.
    positive = (p for patterns in seen.values() for p in patterns if not p.startswith("!"))
    layers = tuple(next(iter(seen.values()))) if len(seen) == 1 else tuple(dict.fromkeys((*EVERYTHING, *positive)))
    sampled = any(recipe.smooth == "measured" or isinstance(recipe.alpha, str) for recipe in seen)
    histograms = [recipe for recipe in seen if recipe.static and recipe.observer in HISTOGRAMS]
    first = any(recipe.smooth == "never" for recipe in histograms)
    steps: list[Pass] = [Calibrate(first, SAMPLED_ROWS if sampled else 0, layers), *smoothing]
    if any(recipe.smooth != "never" for recipe in histograms):
        steps.append(Calibrate(histogram=True, layers=layers))
    return steps
