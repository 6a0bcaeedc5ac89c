"""Number formats: how a tensor is stored as codes and scales, as one value that prints and parses.

    #fp8_tile                                                        a named format
    #fp8_tile<profile = "vllm">                                      the same, made by another convention
    #format<f8e4m3fn, block = [1, 64]>                               spelled out
    #format<f4e2m1fn, block = [1, 8], scale = f8e4m3fn, tensor_scale = true>

A block is a number of rows and columns of the last two dimensions; `ALL` (-1) takes the whole axis:

    [1, 128]      a tile of an activation              [1, ALL]      a token, or an output channel of a weight
    [128, 128]    a block of a weight                  [ALL, ALL]    the tensor
    [ALL, 1]      a channel of an activation, over all tokens: no tensor core can multiply that

All formats are symmetric: a code times its scale is the number. `qcompiler.numerics` computes with them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal

from qcompiler.errors import QCompilerError, did_you_mean
from qcompiler.ir.sizes import Expr, Size, ceildiv
from qcompiler.ir.types import DType, TensorType

ALL = -1
"""The size of a block that takes the whole of its axis. As rows it takes those of all leading dimensions, too."""

Block = tuple[int, int]

ELEMENTS = {DType.f8e4m3fn: 448.0, DType.f8e5m2: 57344.0, DType.i8: 127.0, DType.f4e2m1fn: 6.0, DType.i4: 7.0}
"""What codes can be, each with its largest magnitude."""

SCALES = {DType.f32: math.inf, DType.f8e4m3fn: 448.0, DType.f8e8m0fnu: 2.0**127}
"""What scales can be, each with its largest value."""

TINY = 2.0**-100
"""The smallest scale of an element without a wide exponent: the kernels, which do without a division instruction, are
exact down to 2^-101."""

DEFAULT_PROFILE = "deepseek"


@dataclass(frozen=True)
class Profile:
    """One convention of the field for turning a block into codes and a scale.

    Attributes:
        name: How the profile is chosen and recorded.
        fp8_amax_floor: The smallest amax from which an FP8 scale is made, in units of the input.
        division: `"divide"` is x / s, `"reciprocal"` is x * (1 / s); both steps are rounded to FP32.
        scale_format: `"f32"`, or `"ue8m0"`: a power of two, never below the FP32 scale.
    """

    name: str
    fp8_amax_floor: float
    division: Literal["divide", "reciprocal"]
    scale_format: Literal["f32", "ue8m0"]

    def amax_floor(self, element: DType) -> float:
        """The smallest amax from which a scale of codes of that type is made."""
        return self.fp8_amax_floor if element.is_float and element.bits >= 8 else ELEMENTS[element] * TINY


PROFILES: dict[str, Profile] = {
    entry.name: entry
    for entry in (
        Profile("deepseek", 1e-4, "divide", "f32"),
        Profile("deepgemm", 1e-4, "reciprocal", "f32"),
        Profile("vllm", 1e-10, "divide", "f32"),
        Profile("ue8m0", 1e-4, "divide", "ue8m0"),
    )
}


def profile(name: str = DEFAULT_PROFILE) -> Profile:
    """The profile of that name; raises QCompilerError, with the nearest known name, for any other."""
    if name not in PROFILES:
        raise QCompilerError("unknown quantization profile", got=repr(name), fix=did_you_mean(str(name), PROFILES))
    return PROFILES[name]


@dataclass(frozen=True)
class Format:
    """How a tensor is stored as codes and scales.

    Attributes:
        element: Type of the codes, one of `ELEMENTS`. Those below 8 bits are packed along the last dimension, low bits
            first.
        block: Rows and columns that share a scale.
        scale: Type of the scales, one of `SCALES`. `numerics` says how a scale is rounded to it.
        profile: The convention that makes scales and codes, a key of `PROFILES`.
        tensor_scale: Whether all scales, in E4M3, have a common FP32 factor, made from the tensor's largest magnitude.
        scale_layout: Order of the scales in memory: "row_major", or "col_major", in which the scales of one column of
            blocks are adjacent, as a GEMM kernel reads them. It changes neither shapes nor values.
    """

    element: DType
    block: Block
    scale: DType = DType.f32
    profile: str = DEFAULT_PROFILE
    tensor_scale: bool = False
    scale_layout: Literal["row_major", "col_major"] = "row_major"

    def __post_init__(self) -> None:
        """Raises QCompilerError for fields that do not describe a format."""
        for name, known in (("element", ELEMENTS), ("scale", SCALES)):
            if getattr(self, name) not in known:
                need = " or ".join(map(str, known))
                raise QCompilerError(f"the {name} of a format has a wrong type", got=getattr(self, name), need=need)
        if not is_block(self.block):
            need = f"[rows, columns], where {ALL} is the whole of an axis"
            raise QCompilerError("a block is two positive sizes", got=_listed(self.block), need=need)
        profile(self.profile)
        if not isinstance(self.tensor_scale, bool) or self.scale_layout not in ("row_major", "col_major"):
            need = 'tensor_scale true or false, scale_layout "row_major" or "col_major"'
            raise QCompilerError("a format is malformed", got=f"{self.tensor_scale} and {self.scale_layout}", need=need)
        if self.tensor_scale and self.scale is not DType.f8e4m3fn:
            raise QCompilerError("a tensor scale is for scales of limited range", got=self.scale, need=DType.f8e4m3fn)
        if self.scale_layout == "col_major" and self.block[0] != 1:
            got = _listed(self.block)
            raise QCompilerError("the column-major scale layout is for blocks of 1 row", got=got, need="[1, columns]")

    @property
    def max(self) -> float:
        """The largest magnitude of a code."""
        return ELEMENTS[self.element]

    @property
    def has_nan(self) -> bool:
        """Whether a code can be NaN."""
        return self.element.is_float and self.element.bits == 8

    def scale_shape(self, shape: Sequence[Size]) -> tuple[Size, ...]:
        """`scale_shape` for the block of this format."""
        return tuple(scale_shape(shape, self.block))

    def types(self, shape: Sequence[Size]) -> tuple[TensorType, ...]:
        """The types of what a tensor of that shape is stored as: codes, scales, and the tensor scale if there is one.

        Raises:
            QCompilerError: The shape has no dimension, or its last one cannot be packed.
        """
        if not shape:
            raise QCompilerError("a tensor without dimensions has no blocks")
        if why := self.why_not(shape):
            raise QCompilerError(why)
        tensor_scale = (TensorType(DType.f32, ()),) if self.tensor_scale else ()
        return TensorType(self.element, tuple(shape)), TensorType(self.scale, self.scale_shape(shape)), *tensor_scale

    def why_not(self, shape: Sequence[Size]) -> str | None:
        """Why a tensor of that shape cannot be stored in this format, as a sentence; None if it can."""
        each = 8 // self.element.bits
        if isinstance(shape[-1], int) and shape[-1] % each:
            return f"{self.element} codes are packed {each} in a byte, which does not divide {shape[-1]} columns"
        return None

    def bytes(self, shape: Sequence[Size]) -> Size:
        """Bytes of storage of a tensor of that shape, scales included."""
        sizes = [kind.bytes for kind in self.types(shape)]
        return sum(sizes[1:], sizes[0])

    def decodes_like(self, other: "Format") -> bool:
        """Whether codes and scales of both formats mean the same numbers, however they were made."""
        return self._numbers == other._numbers

    @property
    def _numbers(self) -> tuple[DType, Block, DType, bool]:
        return self.element, self.block, self.scale, self.tensor_scale

    def __str__(self) -> str:
        """The text of the format as an attribute."""
        return _spelled(self)

    __repr__ = __str__


def is_block(block: Any) -> bool:
    """Whether `block` is rows and columns of a block."""
    return isinstance(block, tuple) and len(block) == 2 and all(type(n) is int and (n > 0 or n == ALL) for n in block)


def scale_shape(shape: Sequence[Any], block: Sequence[int]) -> list[Any]:
    """The shape of the scales of a tensor: one for each block of its last two dimensions.

    `[..., ceil(M / rows), ceil(K / columns)]`; with rows `ALL`, which takes the leading dimensions along, `[1, ...]`;
    for a vector, which counts as one row, `[ceil(K / columns)]`. Sizes may be symbolic, ours or torch's.
    """
    rows, columns = block
    across = 1 if columns == ALL else _ceil_div(shape[-1], columns)
    if len(shape) == 1:
        return [across]
    return [1, across] if rows == ALL else [*shape[:-2], _ceil_div(shape[-2], rows), across]


def _ceil_div(size: Any, by: int) -> Any:
    return ceildiv(size, by) if isinstance(size, Expr) else -(-size // by)


def _listed(block: Any) -> Any:
    return list(block) if isinstance(block, tuple) else block


FP8_TILE = Format(DType.f8e4m3fn, (1, 128))
FP8_BLOCK = Format(DType.f8e4m3fn, (128, 128))
FP8_ROW = Format(DType.f8e4m3fn, (1, ALL))
FP8_TENSOR = Format(DType.f8e4m3fn, (ALL, ALL))
FP8_CHANNEL = Format(DType.f8e4m3fn, (ALL, 1))
INT8_ROW = Format(DType.i8, (1, ALL))
INT8_TENSOR = Format(DType.i8, (ALL, ALL))
INT8_CHANNEL = Format(DType.i8, (ALL, 1))
NVFP4 = Format(DType.f4e2m1fn, (1, 16), DType.f8e4m3fn, tensor_scale=True)
MXFP4 = Format(DType.f4e2m1fn, (1, 32), DType.f8e8m0fnu)
MXFP8 = Format(DType.f8e4m3fn, (1, 32), DType.f8e8m0fnu)

FORMATS: dict[str, Format] = {}
"""The formats that have a name."""

CHANGES = ("profile", "scale_layout")
"""Fields that a named format is spelled with where they differ."""


def register_format(name: str, format: Format) -> Format:
    """Gives a format a name in texts; QCompilerError when the name is taken."""
    if name == "format" or FORMATS.setdefault(name, format) != format:
        raise QCompilerError("two formats have one name", got=repr(name), need="a name that is free")
    _spelled.cache_clear()
    return format


def read_format(name: str, given: Mapping[str, Any]) -> Format:
    """The format that `#name<given>` spells; `format` is the name of one that is spelled out.

    Raises:
        QCompilerError: There is no such name or field, or the fields do not describe a format.
    """
    known = [field.name for field in fields(Format)]
    if strange := [key for key in given if key not in known]:
        raise QCompilerError(f"a format has no '{strange[0]}'", fix=did_you_mean(strange[0], known))
    if name == "format":
        if not {"element", "block"} <= given.keys():
            raise QCompilerError(
                "a format needs an element type and a block", need="#format<f8e4m3fn, block = [1, 64]>"
            )
        return Format(**given)
    if name not in FORMATS:
        raise QCompilerError("no format has this name", got=repr(name), fix=did_you_mean(name, FORMATS))
    return replace(FORMATS[name], **given)


@cache
def _spelled(format: Format) -> str:
    values = {field.name: getattr(format, field.name) for field in fields(Format)}
    named = []
    for name, known in FORMATS.items():
        changed = {key: value for key, value in values.items() if value != getattr(known, key)}
        if changed.keys() <= {*CHANGES}:
            named.append((name, changed))
    if named:
        name, changed = min(named, key=lambda found: len(found[1]))
        inside = [f"{key} = {_value(value)}" for key, value in changed.items()]
        return f"#{name}<{', '.join(inside)}>" if inside else f"#{name}"
    defaults = {field.name: field.default for field in fields(Format)}
    inside = [f"{key} = {_value(value)}" for key, value in values.items() if value != defaults[key]]
    return f"#format<{format.element}, {', '.join(inside[1:])}>"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(_listed(value))


for _name, _format in (
    ("fp8_tile", FP8_TILE), ("fp8_block", FP8_BLOCK), ("fp8_row", FP8_ROW), ("fp8_tensor", FP8_TENSOR),
    ("fp8_channel", FP8_CHANNEL), ("int8_row", INT8_ROW), ("int8_tensor", INT8_TENSOR),
    ("int8_channel", INT8_CHANNEL), ("nvfp4", NVFP4), ("mxfp4", MXFP4), ("mxfp8", MXFP8),
):  # fmt: skip
    register_format(_name, _format)
