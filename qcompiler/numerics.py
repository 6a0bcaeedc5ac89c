"""What quantize, dequantize and the scaled product mean, in plain torch: the truth that every kernel is held to.

A tensor is cut into blocks over its last two dimensions. Each block has one FP32 scale, so that the largest element of
the block lands on the largest value of the 8-bit format:

    amax  = max |x| over the block, in FP32
    scale = max(amax, floor) / FORMAT_MAX[dtype]          (profile "ue8m0": rounded up to a power of two)
    q     = round-to-nearest-even(clamp(x / scale))        (profile "deepgemm": x * (1 / scale))
    x'    = q * scale

A size of a block that is `ALL` takes the whole of its axis, so the granularities of the field are blocks, too:

    [1, 128]      a tile of an activation              [1, ALL]      a token, or an output channel of a weight
    [128, 128]    a block of a weight                  [ALL, ALL]    the tensor
    [ALL, 1]      a channel of an activation, over all tokens: no tensor core can multiply that

The formats are symmetric: e4m3, e5m2, and INT8 from -127 to 127. A static scale is given instead of computed. A
prescale multiplies each channel, in FP32, before anything else happens to it.

The floor keeps a block of zeros from dividing by zero: it gets zeros and the positive scale floor / FORMAT_MAX. For FP8
it is the one that the source of the profile uses. FP8 codes have an exponent, so they lose nothing until an amax is far
below the floor. INT8 codes have none and lose bits from the floor on, so the floor of INT8 is not a size of data: it is
as small as exact division allows.

A NaN or an infinity reaches everything that is computed from its row:

    a computed scale of one row               the scale of the block is NaN
    a computed scale of several rows, FP8     the code of the element is NaN; the scale is that of the finite elements
    a computed scale of several rows, INT8    the scale of the block is NaN, which poisons all of its rows
    a static scale, FP8                       the code of the element is NaN
    a static scale, INT8                      nothing can say it: NaN becomes 0, and infinities saturate

The sign and payload of a NaN are not specified. A code whose scale is NaN is NaN in FP8 and 0 in INT8. A finite number
never becomes NaN: beyond the range of a static scale it saturates.

The rounding of 1/s and of x/s differ by an ulp here and there, which flips about one code in two thousand; hence
the conventions of the field are named profiles and are never mixed. Divisions are IEEE divisions on every device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.decode import PLAIN, decode
from qcompiler.errors import QCompilerError, did_you_mean
from qcompiler.integer_matmul import integer_matmul

FORMAT_MAX: dict[torch.dtype, float] = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
"""The largest finite value of each 8-bit format."""

ALL = -1
"""The size of a block that takes the whole of its axis. As rows it takes those of all leading dimensions, too."""

MOST_AT_ONCE = 2**26
"""Elements of a stack of matrices that are quantized together; more go matrix by matrix, with less memory."""

INT8_AMAX_FLOOR = 127 * 2.0**-100
"""About 1e-28, a scale of 2^-100: the kernels, which do without a division instruction, are exact down to 2^-101."""

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

    def amax_floor(self, dtype: torch.dtype) -> float:
        """The smallest amax from which a scale of that format is made."""
        return INT8_AMAX_FLOOR if dtype is torch.int8 else self.fp8_amax_floor


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
        raise QCompilerError("unknown quantization profile", got=repr(name), fix=did_you_mean(name, PROFILES))
    return PROFILES[name]


def quantize(
    x: Tensor,
    block: Sequence[int] = (1, 128),
    dtype: torch.dtype = torch.float8_e4m3fn,
    profile: str = DEFAULT_PROFILE,
    prescale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantizes blocks of the last two dimensions with one scale each, computed from the block.

    Args:
        x: Floating point, `[..., M, K]`; leading dimensions are a batch, and a 1-D tensor counts as one row. M may be
            0, and neither M nor K need be a multiple of the block: the ragged edge counts as padded with zeros.
        block: Rows and columns of a block; each a positive number or `ALL`.
        dtype: One of `FORMAT_MAX`.
        profile: A key of `PROFILES`.
        prescale: `[K]`, floating point: what each channel is multiplied by first, in FP32.

    Returns:
        `q` of `dtype` with the shape of `x`, and the FP32 scale in the shape of `scale_shape`, both contiguous. NaN and
        infinities become NaN codes or a NaN scale, as the table at the top of this module says.

    Raises:
        QCompilerError: An unknown profile or format, a malformed block, an `x` that is a scalar or not floating, or a
            prescale that does not have one number for each channel.
    """
    _checked_block(block)
    _format_max(dtype)
    if type(x) is Tensor and x.dim() > 2 and block[0] != ALL and x.numel() > MOST_AT_ONCE:
        return _quantize_one_by_one(x, block, dtype, profile, prescale)
    blocks = _into_blocks(_prescaled(x, prescale), block)
    marked = block[0] != 1 and dtype is not torch.int8
    sizes = blocks.abs()
    if marked:
        # In place and without a mask: comparing and selecting costs ten times as much on a CPU.
        sizes = sizes.nan_to_num_(nan=0.0, posinf=0.0)
    scale = scale_of(sizes.amax((-3, -1), keepdim=True), dtype, profile)
    codes = _out_of_blocks(_encode(blocks, scale, _named(profile), dtype, marked), x)
    return codes, scale.reshape(scale_shape(x.shape, block))


def _quantize_one_by_one(
    x: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, prescale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`quantize`, matrix by matrix: in FP32 there is one of them at a time."""
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(scale_shape(x.shape, block), dtype=torch.float32, device=x.device)
    for index, matrix in enumerate(x):
        codes[index], scale[index] = quantize(matrix, block, dtype, profile, prescale)
    return codes, scale


def quantize_static(
    x: Tensor,
    scale: Tensor,
    block: Sequence[int] = (ALL, ALL),
    dtype: torch.dtype = torch.float8_e4m3fn,
    profile: str = DEFAULT_PROFILE,
    prescale: Tensor | None = None,
) -> Tensor:
    """Quantizes with scales that are known already; finite numbers beyond their range saturate.

    Args:
        x: As in `quantize`.
        scale: FP32, positive, in the shape of `scale_shape`.
        block: As in `quantize`.
        dtype: As in `quantize`.
        profile: As in `quantize`; only its division counts here.
        prescale: As in `quantize`.

    Returns:
        The codes, of `dtype` with the shape of `x`, contiguous.

    Raises:
        QCompilerError: As in `quantize`, or the scale does not have one entry for each block.
    """
    _checked_block(block)
    _format_max(dtype)
    wide = _prescaled(x, prescale)
    _check_scale(x, scale, block)
    codes = _encode(_into_blocks(wide, block), _spread(scale, x), _named(profile), dtype, dtype is not torch.int8)
    return _out_of_blocks(codes, x)


def scale_shape(shape: Sequence[int], block: Sequence[int]) -> list[int]:
    """The shape of the scales of a tensor: one for each block of its last two dimensions.

    `[..., ceil(M / rows), ceil(K / columns)]`; with rows `ALL`, which takes the leading dimensions along, `[1, ...]`;
    for a vector, which counts as one row, `[ceil(K / columns)]`.
    """
    rows, columns = block
    across = 1 if columns == ALL else _ceil_div(shape[-1], columns)
    if len(shape) == 1:
        return [across]
    return [1, across] if rows == ALL else [*shape[:-2], _ceil_div(shape[-2], rows), across]


def dequantize(
    q: Tensor, scale: Tensor, block: Sequence[int] = (1, 128), out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Multiplies each block by its scale, in FP32, and rounds once to `out_dtype`.

    Args:
        q: A format of `FORMAT_MAX`, `[..., M, K]` or `[K]`.
        scale: FP32, in the shape of `scale_shape`; any strides.
        block: Rows and columns of a block; each a positive number or `ALL`.
        out_dtype: The dtype of the result, which has the shape of `q`.

    Raises:
        QCompilerError: `q` is in no 8-bit format, or the scale does not have one entry for each block.
    """
    _format_max(q.dtype)
    _checked_block(block)
    _check_scale(q, scale, block)
    # In place: on a CPU fresh memory costs more than the arithmetic.
    return _out_of_blocks(_into_blocks(decode(q), block).mul_(_spread(scale, q)), q).to(out_dtype)


def scaled_linear(
    x_q: Tensor,
    x_s: Tensor,
    w_q: Tensor,
    w_s: Tensor,
    bias: Tensor | None = None,
    *,
    x_block: Sequence[int] = (1, 128),
    w_block: Sequence[int] = (128, 128),
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`x @ w.T + bias` of two quantized operands: dequantized to FP32, multiplied and added in FP32, rounded once.

    INT8 operands with one scale for all of K are summed exactly, as by the kernels: `sum * (x_s * w_s) + bias`.

    Args:
        x_q: `[..., K]`, any number of leading dimensions.
        x_s: The scale of `x_q` for `x_block`.
        w_q: `[N, K]`.
        w_s: The scale of `w_q` for `w_block`.
        bias: `[N]`, any floating dtype, or None.
        x_block: Rows and columns of a block of `x_q`.
        w_block: Rows and columns of a block of `w_q`.
        out_dtype: The dtype of the result, `[..., N]`.

    Raises:
        QCompilerError: `w_q` is no matrix, the depths differ, or a scale does not fit its tensor.
    """
    check_linear(x_q, w_q)
    if sums_integers(x_q, w_q, x_block, w_block):
        _check_scale(x_q, x_s, x_block)
        _check_scale(w_q, w_s, w_block)
        sums = integer_matmul(x_q.reshape(-1, x_q.shape[-1]), w_q).mul_(x_s.reshape(-1, 1) * w_s.T)
        return (sums if bias is None else sums.add_(bias)).view(*x_q.shape[:-1], w_q.shape[0]).to(out_dtype)
    x, w = dequantize(x_q, x_s, x_block), dequantize(w_q, w_s, w_block)
    return functional.linear(x, w, None if bias is None else bias.to(torch.float32)).to(out_dtype)


def sums_integers(x_q: Tensor, w_q: Tensor, x_block: Sequence[int], w_block: Sequence[int]) -> bool:
    """Whether the codes are INT8 with one scale for all of K; what is traced shows FP32 arithmetic instead."""
    one_scale = x_block[1] == w_block[1] == ALL and {x_block[0], w_block[0]} <= {1, ALL}
    return one_scale and x_q.dtype == w_q.dtype == torch.int8 and type(x_q) in PLAIN


def check_linear(x_q: Tensor, w_q: Tensor) -> None:
    """Raises QCompilerError unless `x_q` is `[..., K]` and `w_q` is `[N, K]`."""
    if w_q.dim() != 2 or x_q.dim() == 0 or x_q.shape[-1] != w_q.shape[1]:
        got = f"{_describe(x_q)} and {_describe(w_q)}"
        raise QCompilerError("the operands of a scaled linear do not fit", got=got, need="x [..., K] and w [N, K]")


def scale_of(amax: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, profile: str = DEFAULT_PROFILE) -> Tensor:
    """The FP32 scale for each largest magnitude: that of a block, or one that calibration has found.

    Args:
        amax: FP32, not negative, any shape; unchanged. The scale of an infinity or NaN is NaN.
        dtype: One of `FORMAT_MAX`.
        profile: A key of `PROFILES`.

    Raises:
        QCompilerError: An unknown profile or format.
    """
    rule = _named(profile)
    # A tensor divisor, because CUDA turns division by a Python number into a multiplication by its reciprocal.
    top = torch.full((), _format_max(dtype), dtype=torch.float32, device=amax.device)
    scale = amax.clamp_min(rule.amax_floor(dtype)) / top
    if rule.scale_format == "ue8m0":
        # ceil(log2) on the bits: any mantissa bit carries into the exponent, and is then cleared.
        scale = scale.view(torch.int32).add(0x7FFFFF).bitwise_and_(0x7F800000).view(torch.float32)
    return scale + amax * 0  # NaN where the amax is not finite


def _encode(blocks: Tensor, scale: Tensor, rule: Profile, dtype: torch.dtype, marked: bool) -> Tensor:
    """The codes of FP32 blocks, still in the shape of blocks; NaN for infinities if `marked`."""
    top = FORMAT_MAX[dtype]
    scaled = blocks * scale.reciprocal() if rule.division == "reciprocal" else blocks / scale
    if marked:
        scaled.addcmul_(blocks, scale.new_zeros(()))  # infinity times zero is NaN
    scaled.clamp_(-top, top)
    return scaled.nan_to_num_(nan=0.0).round_().to(dtype) if dtype is torch.int8 else scaled.to(dtype)


def _prescaled(x: Tensor, prescale: Tensor | None) -> Tensor:
    """`x` in FP32, each channel times its prescale; QCompilerError when that is no tensor to quantize."""
    if x.dim() == 0 or not x.is_floating_point():
        raise QCompilerError(
            "cannot quantize this tensor", got=_describe(x), need="floating point, 1 dimension or more"
        )
    wide = x.to(torch.float32)
    if prescale is None:
        return wide
    if prescale.shape != x.shape[-1:] or not prescale.is_floating_point():
        raise QCompilerError(
            f"the prescale does not have one number for each channel of {_describe(x)}",
            got=_describe(prescale), need=f"float[{x.shape[-1]}]",
        )  # fmt: skip
    return wide * prescale.to(torch.float32)


def _into_blocks(x: Tensor, block: Sequence[int]) -> Tensor:
    """`[..., M, K]` -> `[..., ceil(M / rows), rows, ceil(K / columns), columns]`; a view where nothing is ragged.

    A block has one element at least, so that there is an amax; one that is `ALL` of nothing is a zero.
    """
    rows, columns = block
    x = x.unsqueeze(0) if x.dim() == 1 else x
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if rows == ALL else x
    *lead, m, k = x.shape
    (down, rows), (across, columns) = _cut(m, rows), _cut(k, columns)
    if _is_ragged(m, block[0]) or _is_ragged(k, block[1]):
        x = functional.pad(x, (0, across * columns - k, 0, down * rows - m))
    return x.reshape(*lead, down, rows, across, columns)


def _cut(length: int, size: int) -> tuple[int, int]:
    """How many blocks of `size` cover an axis, and how long each is."""
    if size == ALL:
        return 1, 1 if isinstance(length, int) and length == 0 else length
    return _ceil_div(length, size), size


def _is_ragged(length: int, size: int) -> bool:
    """Whether an axis must be padded; a symbolic one is padded unasked, since whether it divides would be a guard."""
    if not isinstance(length, int):
        return size not in (1, ALL)
    return length == 0 if size == ALL else length % size != 0


def _out_of_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_into_blocks`, without the padding, in the shape of `like`; contiguous."""
    *lead, down, rows, across, columns = blocks.shape
    flat = blocks.reshape(*lead, down * rows, across * columns)
    if like.dim() == 1:
        return flat[0, : like.shape[0]].contiguous()
    height = like.shape[-2] if lead or like.dim() == 2 else math.prod(like.shape[:-1])
    return flat[..., :height, : like.shape[-1]].reshape(like.shape).contiguous()


def _spread(scale: Tensor, like: Tensor) -> Tensor:
    """The scales of `like` in the shape of its blocks, with ones for the rows and columns of a block."""
    return (scale.unsqueeze(0) if like.dim() == 1 else scale).unsqueeze(-2).unsqueeze(-1)


def _check_scale(q: Tensor, scale: Tensor, block: Sequence[int]) -> None:
    need = scale_shape(q.shape, block) if q.dim() else []
    if not need or list(scale.shape) != need:
        problem = f"the scale does not have one entry for each [{block[0]}, {block[1]}] block of {_describe(q)}"
        raise QCompilerError(problem, got=_describe(scale), need=need)


def _checked_block(block: Sequence[int]) -> None:
    if len(block) != 2 or any(size < 1 and size != ALL for size in block):
        need = f"[rows, columns], where {ALL} is the whole of an axis"
        raise QCompilerError("a block is two positive sizes", got=list(block), need=need)


def _format_max(dtype: torch.dtype) -> float:
    if dtype not in FORMAT_MAX:
        raise QCompilerError("not an 8-bit format", got=dtype, need=" or ".join(map(str, FORMAT_MAX)))
    return FORMAT_MAX[dtype]


def _ceil_div(size: int, by: int) -> int:
    return -(-size // by)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


_named = profile  # inside `quantize` the name belongs to an argument
