"""Quantization on a GPU of rows that a body computes from those of other tensors, in one kernel.

    block [1, b]     b in 32 … 512       any K, or up to LONGEST_ROW where the body has a reduction
    block [1, -1]                        K up to LONGEST_ROW

What the kernel refuses (see `why_not_fused`) is computed by torch's own operators, and then quantized.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codegen.bodies import triton_function
from codegen.gemm.tiling import ceil_div
from codegen.kernels.fused_quantize import fused_quantize
from codegen.launching.launch import FLOATS, as_rows, check_device, launch, on
from codegen.launching.replay import empty, replayed
from codegen.quantize.plain import check_layout, quantize_on_gpu, scale_sizes
from codegen.quantize.tiling import LONGEST_ROW, FusedConfig, fused_config
from codegen.support import TILE_COLUMNS
from qcompiler import numerics
from qcompiler.body import Body, parse
from qcompiler.numerics import ALL

MOST_OPERANDS = 6
MOST_KEPT = 2


def fused_quantize_on_gpu(
    operands: Sequence[Tensor], body: str, keep: Sequence[str], block: Sequence[int], dtype: torch.dtype, profile: str,
    scale_layout: str,
) -> list[Tensor]:  # fmt: skip
    """The meaning of `kernel.fused_quantize` on a CUDA device, with the scales in the given layout."""
    what = ("fused_quantize", body, *keep, *block, dtype, profile, scale_layout)
    return list(replayed(_run, what, operands, operands, body, tuple(keep), block, dtype, profile, scale_layout))


def why_not_fused(operands: Sequence[Tensor], made: Body, keep: Sequence[str], block: Sequence[int]) -> str | None:
    """Why the kernel does not run it, in one sentence without a final stop, or None if it does."""
    x = operands[0]
    if len(operands) > MOST_OPERANDS or len(keep) > MOST_KEPT:
        return f"it has {len(operands)} operands and {len(keep)} kept values, not {MOST_OPERANDS} and {MOST_KEPT}"
    if x.dim() == 0 or any(y.shape not in (x.shape, x.shape[-1:]) for y in operands):
        return "its operands are neither of one shape nor vectors of the last dimension"
    if any(y.dtype not in FLOATS or y.device != x.device for y in operands):
        return "its operands are not all bfloat16, float16 or float32 on one device"
    if block[0] != 1 or block[1] not in (ALL, *TILE_COLUMNS):
        return f"it is quantized in {list(block)} blocks"
    if (made.across or block[1] == ALL) and x.shape[-1] > LONGEST_ROW:
        return f"a program cannot hold rows of {x.shape[-1]} columns"
    return None


def _run(
    operands: Sequence[Tensor], body: str, keep: tuple[str, ...], block: Sequence[int], dtype: torch.dtype,
    profile: str, scale_layout: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    made, x = parse(body), operands[0]
    check_device(x.device)
    check_layout(block, scale_layout)
    rule, top = numerics.profile(profile), numerics.FORMAT_MAX.get(dtype)
    if top is None or x.numel() == 0 or why_not_fused(operands, made, keep, block):
        result, *others = made.run({f"x{place}": y for place, y in enumerate(operands)}, keep)
        return (*quantize_on_gpu(result, block, dtype, profile, scale_layout, None), *others)
    q = empty(x.shape, dtype, x.device)
    sizes, strides = scale_sizes(x.shape, block[1], scale_layout)
    scale = empty(sizes, torch.float32, x.device, strides)
    kept = [empty(x.shape, made.dtype(name), x.device) for name in keep]
    m, k = x.numel() // x.shape[-1], x.shape[-1]
    held = max(y.element_size() for y in operands)
    tile = fused_config(m, k, block[1], whole_rows=made.across, operand_bytes=held, kept=len(keep))
    constants = {
        "K": k, "BODY": triton_function(body, keep),
        "AMAX_FLOOR": rule.amax_floor(dtype), "TOP": top,
        "RECIPROCAL": rule.division == "reciprocal", "UE8M0": rule.scale_format == "ue8m0",
    }  # fmt: skip
    with on(x.device):
        _launch([_rows(y) for y in operands], kept, q, scale, constants, tile, (m, k), (body, keep))
    return q, scale, *kept


def _rows(x: Tensor) -> Tensor:
    """As rows, or a contiguous vector as it is."""
    return x.contiguous() if x.dim() == 1 else as_rows(x)


def _launch(
    operands: Sequence[Tensor], kept: Sequence[Tensor], q: Tensor, scale: Tensor, constants: dict[str, Any],
    tile: FusedConfig, sizes: tuple[int, int], body: tuple[str, tuple[str, ...]],
) -> None:  # fmt: skip
    (m, k), none = sizes, [None] * (MOST_OPERANDS - len(operands))
    strides = [None if x.dim() == 1 else x.stride(0) for x in operands] + none
    scale_stride_m = scale.stride(-2) if scale.dim() > 1 else 1
    constants |= {
        "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "GROUP": tile.group, "VECTOR": tile.vector,
    }  # fmt: skip
    tensors = (*operands, *none, *kept, *[None] * (MOST_KEPT - len(kept)), q, scale)
    arguments = (*tensors, m, *strides, scale_stride_m, scale.stride(-1))
    known = [value for name, value in constants.items() if name != "BODY"]
    what = (q.device.index, *body, *known, tile.warps, *strides, scale_stride_m)
    options = {"num_warps": tile.warps, "enable_fp_fusion": False}
    programs = ceil_div(m, tile.block_m) * ceil_div(k, tile.block_k)
    launch(fused_quantize, programs, arguments, constants, options, tensors, what)
