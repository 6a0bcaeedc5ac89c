"""Triton kernel: gathers rows of codes and of their scales, such as the rows of tokens for each of their experts."""

import triton
import triton.language as tl

from codegen.kernels.overlap import inputs_ready, let_next_start


# The stride of a column-major scale depends on the number of rows.
@triton.jit(do_not_specialize=["m", "n", "scale_stride_k", "out_stride_k"])
def gather_codes(  # type: ignore[no-untyped-def]
    data, scale, rows, q, out_scale, m, n, data_stride, scale_stride_m, scale_stride_k, out_stride_m, out_stride_k,
    K: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """q[i] = data[rows[i]] and out_scale[i] = scale[rows[i]]. One program copies a tile of codes.

    The first program of some rows also copies their scales. A negative row counts from the end; a row that does not
    exist has the code 0 and the scale NaN.

    Args:
        data: int8 [m, K], whatever its codes are; rows `data_stride` elements apart, columns contiguous.
        scale: float32 [m, GROUPS] with any two strides, in elements.
        rows: int32 or int64 [n], contiguous.
        q: int8 [n, K], contiguous.
        out_scale: float32 [n, GROUPS] with any two strides.
        BLOCK_M: Rows of a tile, a power of two.
        BLOCK_K: Columns of a tile, a power of two.
        BLOCK_GROUPS: A power of two, at least GROUPS.
    """
    across = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0)
    places = (tile // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile % across * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = places < n
    if GROUPS > 1:  # not a scale per row, as weights may have
        let_next_start()
    inputs_ready()
    row = tl.load(rows + places, mask=inside, other=0).to(tl.int64)
    row = tl.where(row < 0, row + m, row)
    exists = inside & (row >= 0) & (row < m)
    in_row = (columns < K)[None, :]
    found = tl.load(data + row[:, None] * data_stride + columns[None, :], mask=exists[:, None] & in_row, other=0)
    if tile % across == 0:
        groups = tl.arange(0, BLOCK_GROUPS).to(tl.int64)
        known = (groups < GROUPS)[None, :]
        from_ = scale + row[:, None] * scale_stride_m + groups[None, :] * scale_stride_k
        factors = tl.load(from_, mask=exists[:, None] & known, other=float("nan"))
        into = out_scale + places[:, None] * out_stride_m + groups[None, :] * out_stride_k
        tl.store(into, factors, mask=inside[:, None] & known)
    tl.store(q + places[:, None] * K + columns[None, :], found, mask=inside[:, None] & in_row)
