"""Schemes: named quantization specs and their pipelines.

    find("fp8_tile")                                          the spec and its text
    pipeline("fp8_tile{k_block=64}")                          its passes, with an option
    pipeline("fp8_tile", {"*.down_proj": "fp8_row"}, ignore=["lm_head"])  with overrides for some layers
    list_schemes()                                            each name with one sentence

Other distributions add schemes through the entry point group `qcompiler.schemes`, with the scheme name as the entry
point name; it is loaded on first lookup.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import passes  # noqa: F401  (importing it registers the passes)
from passes.analyses.layers import EVERYTHING
from passes.quantizing.scheme_options import Observer
from passes.smoothing.smooth_scales import Alpha
from qcompiler.entry_points import load, offered, shown
from qcompiler.errors import PassError, did_you_mean
from qcompiler.ir import ALL, DType
from qcompiler.ir.formats import (
    DEFAULT_PROFILE,
    FP8_CHANNEL,
    FP8_ROW,
    FP8_TENSOR,
    INT8_CHANNEL,
    INT8_ROW,
    INT8_TENSOR,
)
from qcompiler.pass_manager.options import OptionReader
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.schemes.hints import hint, plainly
from qcompiler.schemes.pipelines import QuantizationSpec, assemble
from qcompiler.text import Source

GROUP = "qcompiler.schemes"

NAME = re.compile(r"[\w.-]+(?:\(\))?")
"""Also accepts names from other tools, such as `LLM.int8()`, so they get a hint."""

W_BLOCKS = {"block": (128, 128), "channel": (1, ALL), "tensor": (ALL, ALL)}
"""Values of the scheme option `w` -> weight block."""

K_BLOCKS = (16, 32, 64, 128, 256, 512, ALL)
"""Allowed columns of an activation tile; 16 is only simulated on the CPU (see `codegen.support`)."""


@dataclass(frozen=True)
class Options:
    """Options of schemes, written after the name.

    Attributes:
        dtype: Dtype of the codes of activations and weights.
        k_block: Columns of an activation tile; -1 for the whole row.
        w: Granularity of weight scales: a block of 128 x 128, an output channel, or the tensor.
        numerics: A profile of `qcompiler.numerics`.
        scale: "ue8m0" rounds scales up to powers of two.
        observer: How calibration computes a static scale.
        percentile: Used by the observer "percentile".
        alpha: SmoothQuant migration strength: a number, "search" or "learn".
        pow2: Whether smoothing scales are powers of two, so scaling is exact.
    """

    dtype: DType = DType.f8e4m3fn
    k_block: int = 128
    w: Literal["block", "channel", "tensor"] = "tensor"
    numerics: str = DEFAULT_PROFILE
    scale: Literal["f32", "ue8m0"] = "f32"
    observer: Observer = "absmax"
    percentile: float = 99.99
    alpha: Alpha = 0.5
    pow2: bool = False


@dataclass(frozen=True)
class Scheme:
    """A named quantization scheme.

    Attributes:
        name: The name that users write.
        doc: One sentence.
        pipeline: The passes, as text; derived from the spec if there is one.
        spec: The quantization spec; required for options and for overrides of some layers.
        options: The fields of `Options` that the scheme accepts.
    """

    name: str
    doc: str
    pipeline: str = ""
    spec: QuantizationSpec | None = None
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Derives the pipeline from the spec.

        Raises:
            PassError: The name or an option is not valid, or not exactly one of pipeline and spec is given.
        """
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            need = "letters, digits, dots, dashes and underscores"
            raise PassError("the name of a scheme is not valid", got=repr(self.name), need=need)
        known = [option.name for option in fields(Options)]
        if wrong := [name for name in self.options if name not in known]:
            fix = did_you_mean(str(wrong[0]), known)
            raise PassError(f"scheme '{self.name}' lists an unknown option", got=repr(wrong[0]), fix=fix)
        if bool(self.pipeline) == (self.spec is not None):
            raise PassError(f"scheme '{self.name}' needs either a pipeline or a spec")
        if self.spec is not None:
            object.__setattr__(self, "pipeline", str(assemble({self.spec: EVERYTHING})))


SCHEMES: dict[str, Scheme] = {}
"""Registered schemes by name, without unloaded entry points."""


def register(scheme: Scheme) -> Scheme:
    """Registers a scheme; raises PassError if the name is taken."""
    if SCHEMES.setdefault(scheme.name, scheme) != scheme:
        raise PassError("two schemes have the same name", got=repr(scheme.name), need="an unused name")
    return scheme


NUMERICS = ("numerics", "scale")
FP8 = ("dtype", *NUMERICS)
STATIC = ("observer", "percentile")
SMOOTH = ("alpha", "pow2", "w")

for _name, _doc, _spec, _options in (
    ("fp8_tile", "FP8 e4m3: activations in [1, 128] tiles, scaled in each call; weights in [128, 128] blocks, scaled "
     "once (DeepSeek-V3).", QuantizationSpec(), ("k_block", *FP8)),
    ("fp8_row", "FP8 e4m3: one scale per token, computed in each call; one scale per output channel of the weight.",
     QuantizationSpec(FP8_ROW, FP8_ROW), FP8),
    ("fp8_tensor", "FP8 e4m3: one scale for the activation, computed in each call; one for the weight.",
     QuantizationSpec(FP8_TENSOR, FP8_TENSOR), ("w", *FP8)),
    ("fp8_tensor_static", "FP8 e4m3: one scale for the activation, from calibration; one for the weight.",
     QuantizationSpec(FP8_TENSOR, FP8_TENSOR, static=True), ("w", *STATIC, *FP8)),
    ("int8_row", "INT8: one scale per token, computed in each call; one scale per output channel of the weight.",
     QuantizationSpec(INT8_ROW, INT8_ROW), ("w", *NUMERICS)),
    ("int8_tensor", "INT8: one scale for the activation, computed in each call; one for the weight.",
     QuantizationSpec(INT8_TENSOR, INT8_TENSOR), ("w", *NUMERICS)),
    ("int8_tensor_static", "INT8: one scale for the activation, from calibration; one for the weight.",
     QuantizationSpec(INT8_TENSOR, INT8_TENSOR, static=True), ("w", *STATIC, *NUMERICS)),
    ("smoothquant_o1", "INT8, smoothed: one scale per token, in each call; one for the weight (SmoothQuant-O1).",
     QuantizationSpec(INT8_ROW, INT8_TENSOR, smooth="always"), (*SMOOTH, *NUMERICS)),
    ("smoothquant_o2", "INT8, smoothed: one scale for the activation, computed in each call; one for the weight "
     "(SmoothQuant-O2).", QuantizationSpec(INT8_TENSOR, INT8_TENSOR, smooth="always"), (*SMOOTH, *NUMERICS)),
    ("smoothquant_o3", "INT8, smoothed: one scale for the activation, from calibration; one for the weight "
     "(SmoothQuant-O3).", QuantizationSpec(INT8_TENSOR, INT8_TENSOR, static=True, smooth="always"),
     (*SMOOTH, *STATIC, *NUMERICS)),
    ("smoothquant_fp8", "FP8 e4m3, smoothed: one scale for the activation, computed in each call; one for the weight.",
     QuantizationSpec(FP8_TENSOR, FP8_TENSOR, smooth="always"), (*SMOOTH, *FP8)),
    ("fp8_tile_smooth", "Like fp8_tile, with channels smoothed where measurements show a smaller error.",
     QuantizationSpec(smooth="measured", alpha="search"), ("k_block", "alpha", "pow2", *FP8)),
    ("int8_channel_reference", "INT8, one scale per activation channel; simulated only, for comparison.",
     QuantizationSpec(INT8_CHANNEL, INT8_ROW), NUMERICS),
    ("fp8_channel_reference", "FP8 e4m3, one scale per activation channel; simulated only, for comparison.",
     QuantizationSpec(FP8_CHANNEL, FP8_ROW), FP8),
):  # fmt: skip
    register(Scheme(_name, _doc, spec=_spec, options=_options))


def pipeline(scheme: str, overrides: Mapping[str, str | None] | None = None, ignore: Sequence[str] = ()) -> Pipeline:
    """The pipeline of a scheme, ready to run or edit.

    Args:
        scheme: A name, optionally with options in braces: `fp8_tile{k_block=64, numerics=deepgemm}`.
        overrides: Pattern for weight names (`passes.analyses.layers`) -> another scheme, or None to skip these layers;
            the last matching pattern wins. A layer that a pattern names is quantized even if it is a router, a
            vocabulary projection, or tiny.
        ignore: Patterns for layers to keep in float; they take precedence over overrides.

    Raises:
        PassError: The scheme or an option is unknown, or the scheme cannot be combined with another.
    """
    overrides = with_ignored(overrides, ignore)
    if overrides is None:
        found, spec = read_scheme(scheme)
        return Pipeline.parse(found.pipeline) if spec is None else assemble({spec: EVERYTHING})
    chosen = {pattern: None if target is None else spec_of(target) for pattern, target in overrides.items()}
    layers: dict[QuantizationSpec, list[str]] = {spec_of(scheme): [*EVERYTHING]}
    layers |= {spec: [] for spec in chosen.values() if spec is not None and spec not in layers}
    for pattern, target in chosen.items():
        if not isinstance(pattern, str) or not pattern or pattern.startswith("!"):
            raise PassError("a pattern in overrides is invalid", got=repr(pattern), need="a name such as '*.down_proj'")
        for spec, patterns in layers.items():
            if spec == target:
                patterns.append(pattern)
            elif patterns:
                patterns.append(f"!{pattern}")
    return assemble({spec: tuple(patterns) for spec, patterns in layers.items()})


def with_ignored(overrides: Mapping[str, str | None] | None, ignore: Sequence[str]) -> Mapping[str, str | None] | None:
    """The overrides, followed by the patterns to ignore; None if there are neither.

    Raises:
        PassError: An argument has the wrong type, or a pattern is both overridden and ignored.
    """
    if overrides is not None and not isinstance(overrides, Mapping):
        need = 'a dict such as {"*.down_proj": "fp8_row", "lm_head": None}'
        raise PassError("overrides has the wrong type", got=type(overrides).__name__, need=need)
    if not isinstance(ignore, list | tuple | set | frozenset):
        fix = "For a single pattern, write ignore=[pattern]."
        raise PassError("ignore has the wrong type", got=repr(ignore), need='a list such as ["lm_head"]', fix=fix)
    if not ignore:
        return overrides
    for pattern in ignore:
        if (overrides or {}).get(pattern) is not None:
            raise PassError("a pattern is both ignored and overridden", got=repr(pattern), need="one of them")
    kept = {pattern: scheme for pattern, scheme in (overrides or {}).items() if pattern not in ignore}
    return {**kept, **dict.fromkeys(ignore)}


def spec_of(text: str) -> QuantizationSpec:
    """The spec of `name{option=value, …}`; raises PassError if a name is unknown or the scheme has no spec."""
    scheme, spec = read_scheme(text)
    if spec is None:
        raise _no_spec(scheme)
    return spec


def read_scheme(text: str) -> tuple[Scheme, QuantizationSpec | None]:
    """Parses `name{option=value, …}`: the scheme, and its spec with these options if it has a spec.

    Raises:
        ParseError: The text is malformed.
        PassError: The scheme or an option is unknown, or an option has an invalid value.
    """
    if not isinstance(text, str):
        raise PassError("a scheme must be a string", got=repr(text), need='such as "fp8_tile"')
    reader = OptionReader(Source(text, "<scheme>"))
    name = reader.word(NAME, "the name of a scheme")
    with reader.blaming(name):
        scheme = find(name.text)
    braces = reader.now
    if scheme.spec is None:
        if reader.accept("{") and not reader.accept("}"):
            raise _no_spec(scheme)
        reader.expect_end()
        return scheme, None
    given = reader.options(Options, f"scheme '{name.text}'", scheme.options)
    reader.expect_end()
    with reader.blaming(reader.since(braces)):
        _check_format(scheme.name, scheme.spec, given)
        return scheme, changed(scheme.spec, **given)


def _no_spec(scheme: Scheme) -> PassError:
    fix = "Edit its pipeline instead."
    return PassError("a scheme without a spec has no options and applies to all layers", got=repr(scheme.name), fix=fix)


def values_of(spec: QuantizationSpec) -> Options:
    """The values that a spec has for all options."""
    x, w = spec.x, spec.w
    granularity: Any = next((name for name, block in W_BLOCKS.items() if block == w.block), "block")
    scale: Any = "ue8m0" if x.profile == "ue8m0" else "f32"
    return Options(
        x.element, x.block[1], granularity, x.profile, scale, spec.observer, spec.percentile, spec.alpha,
        spec.pow2,
    )  # fmt: skip


def changed(
    spec: QuantizationSpec,
    *,
    dtype: DType | None = None,
    k_block: int | None = None,
    w: str | None = None,
    numerics: str | None = None,
    scale: str = "f32",
    **others: Any,
) -> QuantizationSpec:
    """The spec with some `Options` replaced; raises PassError if the numerics profile does not allow the scale."""
    profile = _profile(numerics or spec.x.profile, scale)
    x, weights = (replace(format, element=dtype or format.element, profile=profile) for format in (spec.x, spec.w))
    x = replace(x, block=(1, k_block)) if k_block is not None else x
    weights = replace(weights, block=W_BLOCKS[w]) if w is not None else weights
    return replace(spec, x=x, w=weights, **others)


def _profile(numerics: str, scale: str) -> str:
    if scale == "f32":
        return numerics
    if numerics not in (DEFAULT_PROFILE, "ue8m0"):
        need = f"numerics={DEFAULT_PROFILE}, which the profile 'ue8m0' otherwise matches"
        raise PassError("this numerics profile does not support power-of-two scales", got=numerics, need=need)
    return "ue8m0"


def _check_format(name: str, spec: QuantizationSpec, given: Mapping[str, Any]) -> None:
    """Checks that the dtype matches the scheme (FP8 or INT8) and that the tile size is supported."""
    if given.get("k_block", ALL) not in K_BLOCKS:
        need = ", ".join(map(str, K_BLOCKS[:-1])) + f", or {ALL} for the whole row"
        raise PassError(f"option 'k_block' of scheme '{name}' has a wrong value", got=given["k_block"], need=need)
    dtype = given.get("dtype", spec.x.element)
    if dtype not in (DType.f8e4m3fn, DType.f8e5m2, spec.x.element):
        raise PassError(f"option 'dtype' of scheme '{name}' has a wrong value", got=dtype, need="f8e4m3fn or f8e5m2")


def find(name: str) -> Scheme:
    """The scheme called `name`, without options; raises PassError with a did-you-mean hint if there is none."""
    if name not in SCHEMES and (entry := offered(GROUP).get(name)) is not None:
        found = load(entry)
        if not isinstance(found, Scheme) or found.name != name:
            need = f"a qcompiler.Scheme called {name!r}"
            raise PassError("an entry point does not define a scheme of its name", got=shown(entry), need=need)
        register(found)
    if name not in SCHEMES:
        raise PassError("no such scheme", got=repr(name), fix=_suggestion(name, {*SCHEMES, *offered(GROUP)}))
    return SCHEMES[name]


def _suggestion(name: str, known: set[str]) -> str:
    """The hint for an unknown scheme name: the correct spelling, or the scheme for another tool's name."""
    respelled = [each for each in known if plainly(each) == plainly(name)]
    if not respelled and (sentence := hint(name)):
        return f"{sentence} Known: {', '.join(sorted(known))}."
    return did_you_mean(respelled[0] if respelled else name, known)


def list_schemes() -> dict[str, str]:
    """Scheme name -> one sentence: built-in schemes first, then schemes of other distributions.

    If a scheme of another distribution cannot be loaded, the sentence is the error.
    """
    return {name: found.doc if isinstance(found, Scheme) else str(found) for name, found in all_schemes().items()}


def all_schemes() -> Mapping[str, Scheme | PassError]:
    """All schemes, built-in ones first; the error in place of a scheme that cannot be loaded."""
    found: dict[str, Scheme | PassError] = dict(SCHEMES)
    for name in sorted({*offered(GROUP)} - {*found}):
        try:
            found[name] = find(name)
        except PassError as error:
            found[name] = error
    return found
