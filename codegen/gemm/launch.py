"""Launches one configuration of the GEMM kernels: operands as the variant takes them, constants, grid."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia import hopper
from triton.tools.tensor_descriptor import TensorDescriptor

from codegen.gemm.config import WARP, GemmConfig
from codegen.gemm.tiling import ceil_div, split_depth, tiles_of
from codegen.kernels.narrow_gemm import SCALE_BOX, narrow_gemm, sum_splits
from codegen.kernels.narrow_row_gemm import narrow_row_gemm, sum_row_splits
from codegen.kernels.row_gemm import row_gemm_pointers
from codegen.kernels.scaled_gemm import scaled_gemm_pointers, scaled_gemm_tma
from codegen.kernels.warp_gemm import warp_gemm
from codegen.kernels.warp_row_gemm import warp_row_gemm
from codegen.launching.launch import descriptor, launch, multiprocessors
from codegen.launching.replay import empty
from qcompiler.numerics import ALL

WHOLE_SPAN = 1 << 30
"""Blocks of K that share a scale where all do."""

SUM_BLOCK = 512
"""Elements of the output of a program that adds splits."""

_GLUON_TYPES = {
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.int8: gl.int8,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
}


def launch_gemm(
    config: GemmConfig, x: Tensor, w: Tensor, out: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None,
    x_block: int = 128,
) -> None:  # fmt: skip
    """Launches one configuration of the kernels with scales inside the sum, on the current CUDA stream, unchecked.

    Args:
        config: One that `codegen.gemm.config.refusal` does not refuse for these operands.
        x: float8_e4m3fn `[m, k]`, contiguous, m and k at least 1.
        w: float8_e4m3fn `[n, k]`, contiguous.
        out: bfloat16, float16 or float32 `[m, n]`, contiguous; overwritten.
        x_scale: FP32 `[m, ceil(k / x_block)]`, any strides; for the Gluon kernels see `has_scale_columns`.
        w_scale: FP32 `[ceil(n / 128), ceil(k / 128)]`, any strides.
        bias: `[n]`, contiguous, or None.
        x_block: Columns of x that share a scale, or `ALL`.
    """
    if config.variant in WARP:
        _launch_warp(config, x, w, out, x_scale, w_scale, bias, x_block)
    elif config.variant == "narrow":
        _launch_narrow(config, x, w, out, x_scale, w_scale, bias, x_block)
    else:
        (m, k), n = x.shape, w.shape[0]
        kernel = scaled_gemm_tma if config.variant == "tma" else scaled_gemm_pointers
        strides = (*x_scale.stride(), *w_scale.stride())
        arguments = (*_tiles(config, x, w, out), x_scale, w_scale, bias, m, n, k, *strides)
        constants = _constants(config, X_BLOCK=x_block)
        what = _what(config, x, out, x_block, n, k, strides[0], *strides[2:])
        programs, pointers = tiles_of(config, m, n), (x, w, out, x_scale, w_scale, bias)
        launch(kernel, programs, arguments, constants, _options(config), pointers, what)


def launch_row_gemm(
    config: GemmConfig, x: Tensor, w: Tensor, out: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None,
    promote: bool | None = None,
) -> None:  # fmt: skip
    """Launches one configuration of the kernels with scales at the end of the sum, as `launch_gemm` does.

    Args:
        config: One that `codegen.gemm.config.refusal` does not refuse for these operands.
        x: float8_e4m3fn or int8 `[m, k]`, contiguous, m and k at least 1.
        w: The same dtype, `[n, k]`, contiguous.
        out: bfloat16, float16 or float32 `[m, n]`, contiguous; overwritten.
        x_scale: FP32, `[m, 1]`, or one number for the tensor.
        w_scale: FP32, `[n, 1]`, or one number for the tensor.
        bias: `[n]`, contiguous, or None.
        promote: Whether each step is added in FP32 registers; left out, it is for FP8.
    """
    strides = [0 if scale.numel() == 1 else scale.stride(0) for scale in (x_scale, w_scale)]
    promoted = x.dtype != torch.int8 if promote is None else promote
    if config.variant == "warp":
        _launch_warp_rows(config, x, w, out, (x_scale, w_scale, bias), strides, promoted)
    elif config.variant == "narrow":
        _launch_narrow_rows(config, x, w, out, (x_scale, w_scale, bias), strides, promoted)
    else:
        (m, k), n = x.shape, w.shape[0]
        arguments = (x, w, out, x_scale, w_scale, bias, m, n, k, *strides)
        constants, what = _constants(config, PROMOTE=promoted), _what(config, x, out, promoted, n, k)
        programs, pointers = tiles_of(config, m, n), (x, w, out, x_scale, w_scale, bias)
        launch(row_gemm_pointers, programs, arguments, constants, _options(config), pointers, what)


def has_scale_columns(x_scale: Tensor) -> bool:
    """Whether the Gluon kernels can read these `[m, blocks]` scales: column after column, at multiples of 16 bytes."""
    (m, blocks), (stride_m, stride_k) = x_scale.shape, x_scale.stride()
    return (m == 1 or stride_m == 1) and (blocks == 1 or stride_k % 4 == 0) and x_scale.data_ptr() % 16 == 0


def _launch_warp(
    config: GemmConfig, x: Tensor, w: Tensor, out: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None,
    x_block: int,
) -> None:  # fmt: skip
    (m, k), n = x.shape, w.shape[0]
    sms = multiprocessors(x.device.index)
    depth = split_depth(config, m, n, k, sms)
    splits = ceil_div(ceil_div(k, 128), depth)
    rows = ceil_div(m, config.block_m) * config.block_m  # of a split: the copy engine would write beyond m
    sums = out if splits == 1 else empty((splits * rows, n), torch.float32, x.device)
    strides, added = w_scale.stride(), bias if splits == 1 else None
    arguments = (
        *_gluon_tiles(config, x, w, sums), _gluon_scales(x_scale, config.box), w_scale, added, m, n, k, *strides,
        None if config.variant == "warp" else depth,
    )  # fmt: skip
    what = _what(config, x, sums, x_block, n, k, *strides)
    constants = gluon_constants(config, x_block, sums.element_size())
    programs = min(sms, tiles_of(config, m, n) * splits)
    launch(warp_gemm, programs, arguments, constants, {"num_warps": 4}, (w_scale, added), what)
    if splits > 1:
        _add_splits(sums, out, bias, rows, splits)


def _launch_narrow(
    config: GemmConfig, x: Tensor, w: Tensor, out: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None,
    x_block: int,
) -> None:  # fmt: skip
    (m, k), n = x.shape, w.shape[0]
    depth = split_depth(config, m, n, k, multiprocessors(x.device.index))
    splits = ceil_div(ceil_div(k, 128), depth)
    sums = out if splits == 1 else empty((splits, m, n), torch.float32, x.device)
    strides, added = w_scale.stride(), bias if splits == 1 else None
    arguments = (
        _gluon_tile(x, config.box, 128), _gluon_tile(w, 128, 128), sums,
        _gluon_scales(x_scale, max(config.box, SCALE_BOX)), w_scale, added, m, n, k, *strides, depth,
    )  # fmt: skip
    constants, options = gluon_constants(config, x_block, sums.element_size()), {"num_warps": config.warps}
    what = _what(config, x, sums, x_block, n, k, *strides)
    launch(
        narrow_gemm, tiles_of(config, m, n) * splits, arguments, constants, options, (sums, w_scale, added), what
    )  # fmt: skip
    if splits > 1:
        _add_splits(sums, out, bias, m, splits)


def _add_splits(sums: Tensor, out: Tensor, bias: Tensor | None, rows: int, splits: int) -> None:
    """Adds the sums of the splits of K, each of which has `rows` rows."""
    m, n = out.shape
    constants = {"SPLITS": 1 << (splits - 1).bit_length(), "BLOCK": SUM_BLOCK}
    programs, arguments = ceil_div(m * n, SUM_BLOCK), (sums, out, bias, m, rows, n, splits)
    what = (out.device.index, constants["SPLITS"], n)
    launch(sum_splits, programs, arguments, constants, {"num_warps": 4}, (sums, out, bias), what)


def _launch_warp_rows(
    config: GemmConfig, x: Tensor, w: Tensor, out: Tensor, last: tuple[Tensor, Tensor, Tensor | None],
    strides: list[int], promote: bool,
) -> None:  # fmt: skip
    (m, k), n = x.shape, w.shape[0]
    arguments = (*_gluon_tiles(config, x, w, out), *last, m, n, k, *strides)
    programs = min(multiprocessors(x.device.index), tiles_of(config, m, n))
    what = _what(config, x, out, promote, n, k, strides[1])
    constants = row_constants(config, promote, out.element_size())
    launch(warp_row_gemm, programs, arguments, constants, {"num_warps": 4}, last, what)


def _launch_narrow_rows(
    config: GemmConfig, x: Tensor, w: Tensor, out: Tensor, last: tuple[Tensor, Tensor, Tensor | None],
    strides: list[int], promote: bool,
) -> None:  # fmt: skip
    (m, k), n = x.shape, w.shape[0]
    depth = split_depth(config, m, n, k, multiprocessors(x.device.index))
    splits = ceil_div(ceil_div(k, 128), depth)
    whole = splits == 1
    kind = torch.int32 if x.dtype == torch.int8 else torch.float32
    sums = out if whole else empty((splits, m, n), kind, x.device)
    applied = last if whole else (None, None, None)
    arguments = (_gluon_tile(x, config.box, 128), _gluon_tile(w, 128, 128), sums, *applied, m, n, k, *strides, depth)
    programs, what = tiles_of(config, m, n) * splits, _what(config, x, sums, promote, n, k)
    constants, options = row_constants(config, promote, sums.element_size()), {"num_warps": config.warps}
    launch(narrow_row_gemm, programs, arguments, constants, options, (sums, *applied), what)
    if not whole:
        constants = {"SPLITS": 1 << (splits - 1).bit_length(), "BLOCK": SUM_BLOCK}
        programs, arguments = ceil_div(m * n, SUM_BLOCK), (sums, out, *last, m, n, splits, *strides)
        what = (x.device.index, constants["SPLITS"], n)
        launch(sum_row_splits, programs, arguments, constants, {"num_warps": 4}, (sums, out, *last), what)


def gluon_constants(config: GemmConfig, x_block: int, out_bytes: int) -> dict[str, Any]:
    """What the compiler of a Gluon kernel with scales inside the sum knows."""
    span = WHOLE_SPAN if x_block == ALL else max(x_block // 128, 1)
    subs = 1 if x_block == ALL else max(128 // x_block, 1)
    if config.variant == "narrow":
        return {"STAGES": config.stages, "SPAN": span, "SUBS": subs}
    return {**_warp_constants(config), "SPAN": span, "SUBS": subs, "BUFFERS": config.out_buffers(out_bytes, subs)}


def row_constants(config: GemmConfig, promote: bool, out_bytes: int) -> dict[str, Any]:
    """What the compiler of a Gluon kernel with scales at the end of the sum knows."""
    if config.variant == "narrow":
        return {"STAGES": config.stages, "PROMOTE": promote}
    return {**_warp_constants(config), "PROMOTE": promote, "BUFFERS": config.out_buffers(out_bytes, 0)}


def _warp_constants(config: GemmConfig) -> dict[str, Any]:
    waves = config.block_m // config.consumers // 64
    return {"CONSUMERS": config.consumers, "WAVES": waves, "STAGES": config.stages, "GROUP": config.group}


def _gluon_tiles(config: GemmConfig, x: Tensor, w: Tensor, out: Tensor) -> tuple[Any, ...]:
    """The operands as the warp-specialized kernels take them."""
    return _gluon_tile(x, config.box, 128), _gluon_tile(w, config.block_n, 128), _gluon_tile(out, 64, config.block_n)


def _gluon_tile(tensor: Tensor, rows: int, columns: int) -> Any:
    stride = tensor.shape[1]
    layout = gluon_layout(rows, columns, tensor.dtype)
    return descriptor(hopper.TensorDescriptor, tensor, [tensor.shape[0], stride], stride, [rows, columns], layout)


def _gluon_scales(x_scale: Tensor, rows: int) -> Any:
    """The transposed scales; one column alone may have any stride."""
    m, blocks = x_scale.shape
    stride = x_scale.stride(1) if blocks > 1 else ceil_div(m, 4) * 4
    return descriptor(hopper.TensorDescriptor, x_scale, [blocks, m], stride, [1, rows], scale_layout())


@cache
def gluon_layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """How a tile lies in shared memory: swizzled, as the tensor cores read it."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _GLUON_TYPES[dtype])


@cache
def scale_layout() -> Any:
    """How a box of scales lies in shared memory: one after the other."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def _tiles(config: GemmConfig, x: Tensor, w: Tensor, out: Tensor) -> tuple[Tensor | TensorDescriptor, ...]:
    """The operands as the portable variants take them."""
    if config.variant == "pointers":
        return x, w, out
    (m, k), n = x.shape, w.shape[0]
    return (
        descriptor(TensorDescriptor, x, [m, k], k, [config.block_m, config.block_k]),
        descriptor(TensorDescriptor, w, [n, k], k, [config.block_n, config.block_k]),
        descriptor(TensorDescriptor, out, [m, n], n, [config.block_m, config.block_n]),
    )


def _constants(config: GemmConfig, **last: Any) -> dict[str, Any]:
    sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    return {**sizes, "GROUP": config.group, **last}


def _options(config: GemmConfig) -> dict[str, int]:
    return {"num_warps": config.warps, "num_stages": config.stages}


def _what(config: GemmConfig, x: Tensor, out: Tensor, *numbers: int) -> tuple[Any, ...]:
    """What tells one compiled kernel from another, beside its pointers."""
    return config, x.dtype, out.dtype, x.device.index, *numbers
