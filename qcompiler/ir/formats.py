"""Number formats: how a tensor is stored as codes and scales.

    #fp8_tile                                                        a named format
    #fp8_tile<profile = "vllm">                                      the same with another quantization profile
    #format<f8e4m3fn, block = [1, 64]>                               spelled out
    #format<f4e2m1fn, block = [1, 8], scale = f8e4m3fn, tensor_scale = true>
    #format<i4, block = [1, 32], symmetric = false>                  codes with zero points

A block is a number of rows and columns of the last two dimensions; `ALL` (-1) means the whole axis:

    [1, 128]      a tile of an activation              [1, ALL]      a token, or an output channel of a weight
    [128, 128]    a block of a weight                  [ALL, ALL]    the whole tensor
    [ALL, 1]      a channel of an activation, over all tokens: tensor cores cannot multiply it

number = code * scale, or (code - zero point) * scale if the format is not symmetric. `qcompiler.numerics` implements
the arithmetic.
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
"""Block size that covers the whole axis; as a number of rows, it also covers all leading dimensions."""

Block = tuple[int, int]

ELEMENTS = {DType.f8e4m3fn: 448.0, DType.f8e5m2: 57344.0, DType.i8: 127.0, DType.f4e2m1fn: 6.0, DType.i4: 7.0}
"""Code dtypes, each with its largest magnitude in a symmetric format."""

SCALES = {DType.f32: math.inf, DType.f8e4m3fn: 448.0, DType.f8e8m0fnu: 2.0**127}
"""Scale dtypes, each with its largest value."""

TINY = 2.0**-100
"""The smallest scale for integer and 4-bit codes: the kernels avoid the division instruction and are exact down to
2^-101."""

DEFAULT_PROFILE = "deepseek"


@dataclass(frozen=True)
class Profile:
    """A published convention for quantizing a block to codes and a scale.

    Attributes:
        name: The name that selects the profile.
        fp8_amax_floor: Lower bound on the amax that an FP8 scale is computed from, in units of the input.
        division: `"divide"` is x / s, `"reciprocal"` is x * (1 / s); each step is rounded to FP32.
        scale_format: `"f32"`, or `"ue8m0"`: a power of two, at least the FP32 scale.
    """

    name: str
    fp8_amax_floor: float
    division: Literal["divide", "reciprocal"]
    scale_format: Literal["f32", "ue8m0"]

    def amax_floor(self, element: DType) -> float:
        """Lower bound on the amax that a scale is computed from, for codes of type `element`."""
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
    """The profile called `name`; raises QCompilerError with the closest known name if there is none."""
    if name not in PROFILES:
        raise QCompilerError("unknown quantization profile", got=repr(name), fix=did_you_mean(str(name), PROFILES))
    return PROFILES[name]


@dataclass(frozen=True)
class Format:
    """How a tensor is stored as codes and scales.

    Attributes:
        element: Dtype of the codes, a key of `ELEMENTS`. Codes below 8 bits are packed along the last dimension, low
            bits first.
        block: Rows and columns that share a scale.
        scale: Dtype of the scales, a key of `SCALES`. `numerics` defines how scales are rounded to it.
        profile: The convention for computing scales and codes, a key of `PROFILES`.
        tensor_scale: Whether the E4M3 scales share an FP32 factor, computed from the tensor's largest magnitude.
        scale_layout: Order of the scales in memory: "row_major", or "col_major", in which the scales of one column of
            blocks are adjacent, as a GEMM kernel reads them. It changes neither shapes nor values.
        symmetric: Whether zero has code 0. If not, each block also has a zero point in i8, the code of zero; the codes
            are integers and the scales FP32.
    """

    element: DType
    block: Block
    scale: DType = DType.f32
    profile: str = DEFAULT_PROFILE
    tensor_scale: bool = False
    scale_layout: Literal["row_major", "col_major"] = "row_major"
    symmetric: bool = True

    def __post_init__(self) -> None:
        """Raises QCompilerError for fields that do not describe a format."""
        for name, known in (("element", ELEMENTS), ("scale", SCALES)):
            if getattr(self, name) not in known:
                need = " or ".join(map(str, known))
                raise QCompilerError(
                    f"the {name} of a format has an unsupported dtype", got=getattr(self, name), need=need
                )
        if not is_block(self.block):
            need = f"[rows, columns], where {ALL} means the whole axis"
            raise QCompilerError("a block must be two positive sizes", got=_listed(self.block), need=need)
        profile(self.profile)
        if not isinstance(self.tensor_scale, bool) or self.scale_layout not in ("row_major", "col_major"):
            need = 'tensor_scale true or false, scale_layout "row_major" or "col_major"'
            raise QCompilerError("a format is malformed", got=f"{self.tensor_scale} and {self.scale_layout}", need=need)
        if self.tensor_scale and self.scale is not DType.f8e4m3fn:
            raise QCompilerError("tensor_scale requires scales of limited range", got=self.scale, need=DType.f8e4m3fn)
        if not isinstance(self.symmetric, bool):
            raise QCompilerError("a format is malformed", got=f"symmetric {self.symmetric}", need="true or false")
        plain = self.scale is DType.f32 and profile(self.profile).scale_format == "f32"
        if not self.symmetric and (self.element.is_float or not plain):
            got = f"{self.element} codes, {self.scale} scales, profile {self.profile}"
            need = "integer codes, and FP32 scales that are not rounded to powers of two"
            raise QCompilerError("a format with these codes or scales cannot have zero points", got=got, need=need)
        if self.scale_layout == "col_major" and self.block[0] != 1:
            got = _listed(self.block)
            raise QCompilerError("the column-major scale layout requires blocks of 1 row", got=got, need="[1, columns]")

    @property
    def max(self) -> float:
        """The largest magnitude of a code."""
        return ELEMENTS[self.element]

    @property
    def code_range(self) -> tuple[float, float]:
        """The smallest and the largest code."""
        return (-self.max if self.symmetric else -self.max - 1), self.max

    @property
    def level(self) -> Literal["tensor_scale", "zero_point"] | None:
        """What a tensor in this format has beside codes and scales."""
        return "tensor_scale" if self.tensor_scale else None if self.symmetric else "zero_point"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the names of codes, scales, and the level, if there is one."""
        levels = {"tensor_scale": "_t", "zero_point": "_z"}
        return ("_q", "_s") if self.level is None else ("_q", "_s", levels[self.level])

    @property
    def has_nan(self) -> bool:
        """Whether a code can be NaN."""
        return self.element.is_float and self.element.bits == 8

    def scale_shape(self, shape: Sequence[Size]) -> tuple[Size, ...]:
        """The shape of the scales of a tensor in this format."""
        return tuple(scale_shape(shape, self.block))

    def types(self, shape: Sequence[Size]) -> tuple[TensorType, ...]:
        """The types that store a tensor of this shape: codes, scales, and the tensor scale or the zero points.

        Raises:
            QCompilerError: The shape has no dimensions, or its last dimension cannot be packed.
        """
        if not shape:
            raise QCompilerError("a tensor without dimensions has no blocks")
        if why := self.why_not(shape):
            raise QCompilerError(why)
        scales = self.scale_shape(shape)
        levels = {"tensor_scale": TensorType(DType.f32, ()), "zero_point": TensorType(DType.i8, scales)}
        level = () if self.level is None else (levels[self.level],)
        return TensorType(self.element, tuple(shape)), TensorType(self.scale, scales), *level

    def why_not(self, shape: Sequence[Size]) -> str | None:
        """Why a tensor of this shape cannot be stored in this format, as a sentence; None if it can."""
        each = 8 // self.element.bits
        if isinstance(shape[-1], int) and shape[-1] % each:
            return f"{self.element} codes are packed {each} in a byte, which does not divide {shape[-1]} columns"
        return None

    def bytes(self, shape: Sequence[Size]) -> Size:
        """Storage of a tensor of this shape in bytes, including scales."""
        sizes = [kind.bytes for kind in self.types(shape)]
        return sum(sizes[1:], sizes[0])

    def with_block(self, block: Block) -> "Format":
        """The same format with another block."""
        return replace(self, block=block)

    def decodes_like(self, other: "Format") -> bool:
        """Whether both formats decode the same codes and scales to the same numbers."""
        return self._numbers == other._numbers

    @property
    def _numbers(self) -> tuple[DType, Block, DType, str | None]:
        return self.element, self.block, self.scale, self.level

    def __str__(self) -> str:
        """The text of the format as an attribute."""
        return _spelled(self)

    __repr__ = __str__


def is_block(block: Any) -> bool:
    """Whether `block` is a valid (rows, columns) pair."""
    return isinstance(block, tuple) and len(block) == 2 and all(type(n) is int and (n > 0 or n == ALL) for n in block)


def scale_shape(shape: Sequence[Any], block: Sequence[int]) -> list[Any]:
    """The shape of the scales of a tensor: one scale per block of the last two dimensions.

    `[..., ceil(M / rows), ceil(K / columns)]`; if rows is `ALL`, which includes the leading dimensions, `[1, ...]`;
    for a vector, which is one row, `[ceil(K / columns)]`. Sizes may be symbolic, of this IR or of torch.
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
"""Named formats."""

CHANGES = ("profile", "scale_layout", "symmetric")
"""Fields that may differ from the named format and are then printed after its name."""


def register_format(name: str, format: Format) -> Format:
    """Names a format for the text form; raises QCompilerError if the name is taken."""
    if name == "format" or FORMATS.setdefault(name, format) != format:
        raise QCompilerError("two formats have the same name", got=repr(name), need="an unused name")
    _spelled.cache_clear()
    return format


def unregister_format(name: str) -> None:
    """Removes the name of a format, which is spelled out from then on; KeyError if there is no such name."""
    del FORMATS[name]
    _spelled.cache_clear()


def read_format(name: str, given: Mapping[str, Any]) -> Format:
    """The format that `#name<given>` spells; the name `format` means that all fields are in `given`.

    Raises:
        QCompilerError: The name or a field is unknown, or the fields do not describe a valid format.
    """
    known = [field.name for field in fields(Format)]
    if strange := [key for key in given if key not in known]:
        raise QCompilerError(f"a format has no field '{strange[0]}'", fix=did_you_mean(strange[0], known))
    if name == "format":
        if not {"element", "block"} <= given.keys():
            raise QCompilerError(
                "a format needs an element type and a block", need="#format<f8e4m3fn, block = [1, 64]>"
            )
        return Format(**given)
    if name not in FORMATS:
        raise QCompilerError("unknown format", got=repr(name), fix=did_you_mean(name, FORMATS))
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
