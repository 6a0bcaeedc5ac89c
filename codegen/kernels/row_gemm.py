"""Portable Triton kernel: the GEMM of two operands whose scales do not depend on K.

    out[m, n] = (a[m] . w[n]) * a_scale[m] * w_scale[n]   (+ bias[n])

a and w are both FP8 or both INT8; a scale of stride 0 applies to the whole tensor. The tensor cores sum INT8 products
exactly, in 32 bits. Hopper's FP8 tensor cores keep about 14 bits while they accumulate, so with `PROMOTE` each step of
K is one `tl.dot` into fresh registers, which is then added in FP32.

Tiles are ordered as in `scaled_gemm`. This kernel supports any alignment and any sizes; if the copy engine can address
the operands, `warp_row_gemm` and `narrow_row_gemm` run instead.
"""

import triton
import triton.language as tl

from codegen.kernels.scaled_gemm import tile_of


@triton.jit
def _rescaled(  # type: ignore[no-untyped-def]
    total, a_scale, w_scale, bias, rows, columns, m, n, a_scale_stride, w_scale_stride
):
    """The sums in FP32, times the product of both scales (which stays in range), plus the bias."""
    left = tl.load(a_scale + rows.to(tl.int64) * a_scale_stride, mask=rows < m, other=0.0)
    right = tl.load(w_scale + columns.to(tl.int64) * w_scale_stride, mask=columns < n, other=0.0)
    result = total.to(tl.float32) * (left[:, None] * right[None, :])
    if bias is not None:
        result += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    return result


@triton.jit(do_not_specialize=["m", "a_scale_stride", "w_scale_stride"])
def row_gemm_pointers(  # type: ignore[no-untyped-def]
    a, w, out, a_scale, w_scale, bias, m, n, k, a_scale_stride, w_scale_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PROMOTE: tl.constexpr,
):  # fmt: skip
    """out[m, n] of a[m, k] and w[n, k], pointers to contiguous memory; nothing outside it is accessed.

    Args:
        a: float8e4nv or int8.
        w: The same dtype.
        out: Any floating dtype.
        a_scale: float32; the scale of row m is at m times the stride.
        w_scale: float32; the scale of row n is at n times the stride.
        bias: [n] in any floating dtype, or None.
        BLOCK_M: Rows of a tile; at least 64, or the tensor cores are not fully used.
        BLOCK_N: Columns of a tile.
        BLOCK_K: Depth of a step.
        GROUP: Consecutive rows of tiles.
        PROMOTE: Add each step in FP32 registers; for FP8.
    """
    tile_m, tile_n = tile_of(m, n, BLOCK_M, BLOCK_N, GROUP)
    # 64 bits: row times stride exceeds 2^31 in tensors that fit on a GPU.
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    lefts = a + rows[:, None] * k + depth[None, :]
    rights = w + columns[:, None] * k + depth[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32)
    for step in range(tl.cdiv(k, BLOCK_K)):
        deep = (depth < k - step * BLOCK_K)[None, :]
        left = tl.load(lefts + step * BLOCK_K, mask=(rows < m)[:, None] & deep, other=0.0)
        right = tl.load(rights + step * BLOCK_K, mask=(columns < n)[:, None] & deep, other=0.0)
        if PROMOTE:
            total += tl.dot(left, right.T)
        else:
            total = tl.dot(left, right.T, total, out_dtype=total.dtype)
    result = _rescaled(total, a_scale, w_scale, bias, rows, columns, m, n, a_scale_stride, w_scale_stride)
    places = out + rows[:, None] * n + columns[None, :]
    tl.store(places, result.to(out.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])
