"""Quantization on a GPU: which kernel runs a granularity, and its launch.

    [1, b]   b in 32 … 512    quantize_tiles                                       quantize_known
    [1, -1]                   quantize_tokens                                      quantize_known
    [-1, -1]                  partial_amax, scale_of_tensor, quantize_known        quantize_known
                              ^ scales computed from the tensor                    ^ scales given

Everything else, such as the blocks of a weight, is quantized once, so torch's own operators do it there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codegen.gemm.tiling import ceil_div
from codegen.kernels.quantize import quantize_tiles, quantize_tokens
from codegen.kernels.quantize_known import partial_amax, quantize_known, scale_of_tensor
from codegen.launching.launch import FLOATS, as_rows, check_device, launch, on
from codegen.launching.replay import empty, replayed
from codegen.quantize.tiling import AMAX_PROGRAMS, LONGEST_ROW, quantize_config, tensor_config, token_config
from codegen.support import TILE_COLUMNS, WHOLE_ROWS
from qcompiler import numerics
from qcompiler.errors import CodegenError, did_you_mean
from qcompiler.numerics import ALL

SCALE_LAYOUTS = ("row_major", "col_major")
"""How the scales of 1-row blocks lie in memory: contiguous, or with strides (1, M rounded up to a multiple of 4)."""


def scale_like(x: Tensor, block_k: int, layout: str) -> Tensor:
    """An empty FP32 scale `[..., ceil(K / block_k)]` for 1-row blocks of `x` in the given layout.

    The column-major layout is the one that the copy engine and DeepGEMM read: for each block of K the scales of all
    rows follow each other, and each such run starts at a multiple of 16 bytes. Leading dimensions count as rows.
    """
    shape, strides = scale_sizes(x.shape, block_k, layout)
    if strides is None:
        return x.new_empty(shape, dtype=torch.float32)
    return x.new_empty_strided(shape, strides, dtype=torch.float32)


def scale_sizes(shape: Sequence[int], block_k: int, layout: str) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The sizes of the scale of a tensor of that shape, and its strides where it is not contiguous."""
    *leading, columns = shape
    sizes = (*leading, 1 if block_k == ALL else ceil_div(columns, block_k))
    if layout == "row_major":
        return sizes, None
    strides: list[int] = []
    rows = 1
    for size in reversed(leading):
        strides.insert(0, rows)
        rows = rows * size
    return sizes, (*strides, (rows + 3) // 4 * 4)


def check_layout(block: Sequence[int], layout: str) -> None:
    """Raises CodegenError for a layout that there is not, or not for these blocks."""
    if layout not in SCALE_LAYOUTS:
        raise CodegenError("unknown scale layout", got=repr(layout), fix=did_you_mean(layout, SCALE_LAYOUTS))
    if layout == "col_major" and block[0] != 1:
        raise CodegenError("the column-major scale layout is for blocks of 1 row", got=list(block), need="[1, columns]")


def quantize_on_gpu(
    x: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, scale_layout: str, prescale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`numerics.quantize` on a CUDA device, with the scales in the given layout; the same errors."""
    what = ("quantize", *block, dtype, profile, scale_layout)
    return replayed(_quantize, what, (x, prescale), x, block, dtype, profile, scale_layout, prescale)


def quantize_static_on_gpu(
    x: Tensor, scale: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, prescale: Tensor | None = None
) -> Tensor:
    """`numerics.quantize_static` on a CUDA device; the same errors. The host does not wait for the scale."""
    what = ("quantize_static", *block, dtype, profile)
    return replayed(_quantize_static, what, (x, scale, prescale), x, scale, block, dtype, profile, prescale)


def _quantize(
    x: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, scale_layout: str, prescale: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_layout(block, scale_layout)
    if not _has_kernel(x, block, dtype, prescale):
        q, scale = numerics.quantize(x, block, dtype, profile, prescale)
        return q, scale if scale_layout == "row_major" else scale_like(x, block[1], scale_layout).copy_(scale)
    rule = numerics.profile(profile)
    q = empty(x.shape, dtype, x.device)
    if block[0] == ALL:
        scale = empty(numerics.scale_shape(x.shape, block), torch.float32, x.device)
    else:
        shape, strides = scale_sizes(x.shape, block[1], scale_layout)
        scale = empty(shape, torch.float32, x.device, strides)
    rows = as_rows(x)
    factors = None if prescale is None else prescale.contiguous()
    with on(x.device):
        if block[0] == ALL:
            _quantize_tensor(rows, q, scale, factors, rule)
        elif block[1] == ALL:
            _quantize_tokens(rows, q, scale, factors, rule)
        else:
            _quantize_tiles(rows, q, scale, factors, rule, block[1])
    return q, scale


def _quantize_static(
    x: Tensor, scale: Tensor, block: Sequence[int], dtype: torch.dtype, profile: str, prescale: Tensor | None
) -> Tensor:
    has_kernel = _has_kernel(x, block, dtype, prescale) and scale.dtype == torch.float32 and scale.device == x.device
    if not has_kernel or list(scale.shape) != numerics.scale_shape(x.shape, block):
        return numerics.quantize_static(x, scale, block, dtype, profile, prescale)
    rule = numerics.profile(profile)
    q = empty(x.shape, dtype, x.device)
    factors = None if prescale is None else prescale.contiguous()
    with on(x.device):
        _quantize_known(as_rows(x), q, scale, factors, rule, block)
    return q


def _has_kernel(x: Tensor, block: Sequence[int], dtype: torch.dtype, prescale: Tensor | None) -> bool:
    """Whether a kernel runs it; without one, torch runs it, or says what is wrong."""
    check_device(x.device)
    known = tuple(block) in WHOLE_ROWS or (block[0] == 1 and block[1] in TILE_COLUMNS)
    fits = prescale is None or (
        prescale.shape == x.shape[-1:] and prescale.is_floating_point() and prescale.device == x.device
    )
    return known and fits and x.dim() > 0 and x.dtype in FLOATS and dtype in numerics.FORMAT_MAX


def _quantize_tiles(
    rows: Tensor, q: Tensor, scale: Tensor, prescale: Tensor | None, rule: numerics.Profile, block_k: int
) -> None:
    m, k = rows.shape
    if q.numel() == 0:
        return
    tile, strides = quantize_config(m, block_k), _strides(scale)
    constants = _rule(rule, q) | {"BLOCK_M": tile.block_m, "BLOCK_K": block_k}
    programs = ceil_div(m, tile.block_m) * ceil_div(k, block_k)
    sizes = (m, k, rows.stride(0), *strides)
    _launch(quantize_tiles, programs, (rows, q, scale, prescale), sizes, constants, tile.warps, strides[0])


def _quantize_tokens(rows: Tensor, q: Tensor, scale: Tensor, prescale: Tensor | None, rule: numerics.Profile) -> None:
    m, k = rows.shape
    if m == 0:
        return
    tile, stride = token_config(m, k), _strides(scale)[0]
    tiles = {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "ONE_STEP": k <= LONGEST_ROW}
    constants, sizes = _rule(rule, q) | tiles, (m, k, rows.stride(0), stride)
    programs = ceil_div(m, tile.block_m)
    _launch(quantize_tokens, programs, (rows, q, scale, prescale), sizes, constants, tile.warps, stride)


def _quantize_tensor(rows: Tensor, q: Tensor, scale: Tensor, prescale: Tensor | None, rule: numerics.Profile) -> None:
    """Three launches; a tensor without elements still has a scale, which the second one makes."""
    m, k = rows.shape
    tile = tensor_config(m)
    programs = max(min(ceil_div(m, tile.block_m) * ceil_div(k, tile.block_k), AMAX_PROGRAMS), 1)
    partial = empty((programs,), torch.float32, rows.device)
    constants: dict[str, Any] = {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "FINITE": q.dtype != torch.int8}
    _launch(partial_amax, programs, (rows, partial, prescale), (m, k, rows.stride(0)), constants, tile.warps)
    constants = _rule(rule, q)
    del constants["RECIPROCAL"]
    what = (rows.device.index, *constants.values())
    arguments = (partial, scale, programs)
    launch(
        scale_of_tensor, 1, arguments, constants | {"BLOCK": AMAX_PROGRAMS}, {"num_warps": 4}, (partial, scale), what
    )  # fmt: skip
    _quantize_known(rows, q, scale, prescale, rule, (ALL, ALL))


def _quantize_known(
    rows: Tensor, q: Tensor, scale: Tensor, prescale: Tensor | None, rule: numerics.Profile, block: Sequence[int]
) -> None:
    m, k = rows.shape
    if q.numel() == 0:
        return
    tile = tensor_config(m) if block[1] == ALL else quantize_config(m, block[1])
    # The scales of leading dimensions that do not follow each other evenly are copied; there are few of them.
    scales = scale.reshape(m if block[0] == 1 else 1, scale.shape[-1])
    stride_m, stride_k = scales.stride()
    constants = _rule(rule, q) | {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "ONE_SCALE": block[0] == ALL}
    del constants["AMAX_FLOOR"], constants["UE8M0"]
    programs = ceil_div(m, tile.block_m) * ceil_div(k, tile.block_k)
    sizes = (m, k, rows.stride(0), stride_m, 0 if block[1] == ALL else stride_k)
    _launch(quantize_known, programs, (rows, q, scales, prescale), sizes, constants, tile.warps, stride_m)


def _rule(rule: numerics.Profile, q: Tensor) -> dict[str, Any]:
    """What the compiler knows of the arithmetic, in the order in which kernels take it."""
    return {
        "AMAX_FLOOR": rule.amax_floor(q.dtype), "TOP": numerics.FORMAT_MAX[q.dtype],
        "RECIPROCAL": rule.division == "reciprocal", "UE8M0": rule.scale_format == "ue8m0",
    }  # fmt: skip


def _launch(
    kernel: Any, programs: int, tensors: Sequence[Tensor | None], sizes: tuple[int, ...], constants: dict[str, Any],
    warps: int, *strides: int,
) -> None:  # fmt: skip
    """Launches a kernel on the rows `tensors[0]`; it is specialised on its depth, its stride, and `strides`."""
    rows = tensors[0]
    what = (rows.device.index, warps, *sizes[1:3], *strides, *constants.values())  # type: ignore[union-attr]
    launch(kernel, programs, (*tensors, *sizes), constants, {"num_warps": warps}, tensors, what)


def _strides(scale: Tensor) -> tuple[int, int]:
    """Elements between the scales of two rows, and of two blocks of a row; a vector is one row."""
    return scale.stride(-2) if scale.dim() > 1 else 1, scale.stride(-1)
