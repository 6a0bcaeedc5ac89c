"""Portable Triton kernels: the FP8 GEMM of rows quantized in tiles and weights quantized in 128 x 128 blocks.

    out[m, n] = sum over steps s of K:  (a[m, s] . w[n, s]) * a_scale[m, s] * w_scale[n / 128, s]   (+ bias[n])

A step is 128 of K, or the width of the activation's tiles if that is less. Hopper's FP8 tensor cores keep about 14 bits
while they accumulate, so each step is one `tl.dot` into fresh registers, which is then scaled and added in FP32: the
promotion that the scales require anyway. If an activation's scale spans all of K, it is multiplied once, at the end.

One program computes one tile of the output. Tiles are ordered in columns of `GROUP` tiles, so that concurrent tiles
share their operands in L2. There are two variants: `scaled_gemm_tma` moves tiles with the copy engine, clipped to the
tensors by their descriptors; `scaled_gemm_pointers` supports any alignment and any sizes.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row and the column of tiles that this program computes."""
    program = tl.program_id(0)
    height, width = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = program // (GROUP * width) * GROUP
    rows = tl.minimum(height - first, GROUP)
    return first + program % (GROUP * width) % rows, program % (GROUP * width) // rows


@triton.jit
def _block(step, STEP: tl.constexpr, SPAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The block of SPAN columns that contains a step of STEP columns."""
    return step if STEP == SPAN else step // (SPAN // STEP)


@triton.jit(do_not_specialize=["m", "a_scale_stride_k"])
def scaled_gemm_tma(  # type: ignore[no-untyped-def]
    a, w, out, a_scale, w_scale, bias, m, n, k,
    a_scale_stride_m, a_scale_stride_k, w_scale_stride_n, w_scale_stride_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, X_BLOCK: tl.constexpr,
):  # fmt: skip
    """out[m, n] of a[m, k] and w[n, k], all three as tensor descriptors with the tile as their block.

    Args:
        a: float8e4nv descriptor, block [BLOCK_M, BLOCK_K].
        w: float8e4nv descriptor, block [BLOCK_N, BLOCK_K].
        out: bfloat16, float16 or float32 descriptor, block [BLOCK_M, BLOCK_N].
        a_scale: float32 [m, ceil(k / X_BLOCK)], or [m, 1], any strides.
        w_scale: float32 [ceil(n / 128), ceil(k / 128)], any strides.
        bias: [n] in any floating dtype, or None.
        BLOCK_M: Rows of a tile; at least 64, or the tensor cores are not fully used.
        BLOCK_N: Columns of a tile; divides 128, so that a tile has one weight scale a block.
        BLOCK_K: Depth of a step: 128, or X_BLOCK if that is less.
        GROUP: Consecutive rows of tiles.
        X_BLOCK: Columns that share a scale of the activation, or -1 for all of them.
    """
    tl.static_assert(128 % BLOCK_K == 0 and 128 % BLOCK_N == 0 and (X_BLOCK == -1 or X_BLOCK % BLOCK_K == 0))
    tile_m, tile_n = tile_of(m, n, BLOCK_M, BLOCK_N, GROUP)
    row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
    rows = row + tl.arange(0, BLOCK_M)
    a_scales = a_scale + rows.to(tl.int64) * a_scale_stride_m
    w_scales = w_scale + (column // 128).to(tl.int64) * w_scale_stride_n

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(tl.cdiv(k, BLOCK_K)):
        left = a.load([row, block * BLOCK_K])
        right = w.load([column, block * BLOCK_K])
        w_place = w_scales + _block(block, BLOCK_K, 128) * w_scale_stride_k
        if X_BLOCK == -1:
            total += tl.dot(left, right.T) * tl.load(w_place)
        else:
            place = tl.cast(_block(block, BLOCK_K, X_BLOCK), tl.int64) * a_scale_stride_k
            scale = tl.load(a_scales + place, mask=rows < m, other=0.0) * tl.load(w_place)
            total += tl.dot(left, right.T) * scale[:, None]
    if X_BLOCK == -1:
        total *= tl.load(a_scales, mask=rows < m, other=0.0)[:, None]
    if bias is not None:
        columns = column + tl.arange(0, BLOCK_N)
        total += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    out.store([row, column], total.to(out.dtype))


@triton.jit(do_not_specialize=["m", "a_scale_stride_k"])
def scaled_gemm_pointers(  # type: ignore[no-untyped-def]
    a, w, out, a_scale, w_scale, bias, m, n, k,
    a_scale_stride_m, a_scale_stride_k, w_scale_stride_n, w_scale_stride_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, X_BLOCK: tl.constexpr,
):  # fmt: skip
    """`scaled_gemm_tma` on pointers to contiguous a[m, k], w[n, k] and out[m, n]; stays within their bounds."""
    tl.static_assert(128 % BLOCK_K == 0 and 128 % BLOCK_N == 0 and (X_BLOCK == -1 or X_BLOCK % BLOCK_K == 0))
    tile_m, tile_n = tile_of(m, n, BLOCK_M, BLOCK_N, GROUP)
    # 64 bits: row times stride exceeds 2^31 in tensors that fit on a GPU.
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    lefts = a + rows[:, None] * k + depth[None, :]
    rights = w + columns[:, None] * k + depth[None, :]
    a_scales = a_scale + rows * a_scale_stride_m
    w_scales = w_scale + (tile_n * BLOCK_N // 128).to(tl.int64) * w_scale_stride_n

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    blocks = tl.cdiv(k, BLOCK_K)
    # One block ahead: few and narrow tiles, which run here, otherwise wait for their scales in every step (measured:
    # 1.6 times the speed for 64 x 32). The other kernel has several tiles per multiprocessor and became slower by it.
    a_next, w_next = tl.load(a_scales, mask=rows < m, other=0.0), tl.load(w_scales)
    for block in range(blocks):
        scale = w_next if X_BLOCK == -1 else a_next * w_next
        following = tl.minimum(block + 1, blocks - 1)
        if X_BLOCK != -1:
            place = tl.cast(_block(following, BLOCK_K, X_BLOCK), tl.int64) * a_scale_stride_k
            a_next = tl.load(a_scales + place, mask=rows < m, other=0.0)
        w_next = tl.load(w_scales + _block(following, BLOCK_K, 128) * w_scale_stride_k)
        deep = (depth < k - block * BLOCK_K)[None, :]
        left = tl.load(lefts + block * BLOCK_K, mask=(rows < m)[:, None] & deep, other=0.0)
        right = tl.load(rights + block * BLOCK_K, mask=(columns < n)[:, None] & deep, other=0.0)
        total += tl.dot(left, right.T) * (scale if X_BLOCK == -1 else scale[:, None])
    if X_BLOCK == -1:
        total *= a_next[:, None]
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    places = out + rows[:, None] * n + columns[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])
