"""Triton kernel that computes rows from other tensors by a fused expression and quantizes them without storing them.

`codegen.fused_expressions` compiles the expression; codes and scales are bit-equal to `qcompiler.numerics.quantize` of
its result.
"""

import triton
import triton.language as tl

from codegen.kernels.encoding import amax_of_keys, codes, magnitude_keys, quotients, scale_of
from codegen.kernels.overlap import inputs_ready, let_next_start, prefetch


@triton.jit
def load_operand(x, stride, rows, columns, inside, mask):  # type: ignore[no-untyped-def]
    """A tile of an operand, zeros outside it: [rows, columns], or [1, columns] if the stride is None."""
    if stride is None:
        values = tl.load(x + columns, mask=inside, other=None if inside is None else 0.0)
    else:
        values = tl.load(x + rows[:, None] * stride + columns, mask=mask, other=None if mask is None else 0.0)
    return values


@triton.jit
def _prefetch_vector(x, stride, start, K: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Moves the columns of a vector that a tile reads to the L2 cache, such as the gains of a norm."""
    if x is not None and stride is None:
        LINE: tl.constexpr = 1024 // x.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = triton.next_power_of_2((BLOCK_K + LINE - 1) // LINE)
        prefetch(x + tl.minimum(start + tl.arange(0, LINES) * LINE, K - 1))


@triton.jit
def store_residual(residual, value, places, mask, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes a residual output, which may be [rows, 1] or [1, columns]."""
    tl.store(residual + places, tl.broadcast_to(value, (BLOCK_M, BLOCK_K)).to(residual.dtype.element_ty), mask=mask)


# Parameters after M must not cause recompilation: in the column-major layout, the stride along K depends on M.
@triton.jit(do_not_specialize=["m", "scale_stride_k"])
def fused_quantize(  # type: ignore[no-untyped-def]
    x0, x1, x2, x3, x4, x5, residual0, residual1, q, scale, m,
    x0_stride, x1_stride, x2_stride, x3_stride, x4_stride, x5_stride, scale_stride_m, scale_stride_k,
    K: tl.constexpr, EXPRESSION: tl.constexpr, AMAX_FLOOR: tl.constexpr, TOP: tl.constexpr, RECIPROCAL: tl.constexpr,
    UE8M0: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """q[m, K], scale[m, ceil(K / GROUP)] and the residual outputs of a fused expression over x0, x1, …

    One program processes a tile of `BLOCK_M` rows and `BLOCK_K` columns, which span the row if the expression has a
    reduction. Consecutive programs process neighboring tiles of the same rows.

    Args:
        x0: bfloat16, float16 or float32: rows `x0_stride` elements apart with contiguous columns, or, if the stride is
            None, one contiguous row for all. The same holds for the others; unused ones are None.
        residual0: Contiguous, [m, K], in the element type of the value; or None. Likewise `residual1`.
        q: float8e4nv, float8e5 or int8, contiguous.
        scale: float32 with any two strides, in elements.
        K: Columns of the tensors. The compiler knows it, so it omits the part of a tile outside the row: 5120 columns
            cost 5 / 8 of the tile of 8192 that holds them.
        EXPRESSION: From `codegen.fused_expressions.triton_function`; it returns the result and the residual outputs.
        AMAX_FLOOR: The profile's floor.
        TOP: The format's largest value.
        RECIPROCAL: x * (1 / scale) instead of x / scale.
        UE8M0: Round the scale up to a power of two.
        BLOCK_M: Rows of a tile, a power of two.
        BLOCK_K: Columns of a tile, a power of two, a multiple of `GROUP`.
        GROUP: Columns that share a scale; `BLOCK_K`, spanning the row, for one scale per row.
        VECTOR: Maximum consecutive columns per thread.
        AHEAD: Move vectors to the L2 cache while earlier kernels run: nothing else may have read them for long.
    """
    EVEN: tl.constexpr = K % BLOCK_K == 0
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    across = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0)
    rows = (tile // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tile % across * BLOCK_K
    columns = tl.max_contiguous((start + tl.arange(0, BLOCK_K))[None, :], (1, VECTOR))
    # Masks cost registers and instructions, so they are omitted where nothing is out of bounds.
    inside = None if EVEN else columns < K
    mask = inside if BLOCK_M == 1 else (rows < m)[:, None] if EVEN else (rows < m)[:, None] & inside
    if GROUPS > 1:  # not a scale per row, as weights may have
        let_next_start()
    if AHEAD:
        _prefetch_vector(x0, x0_stride, start, K, BLOCK_K)
        _prefetch_vector(x1, x1_stride, start, K, BLOCK_K)
        _prefetch_vector(x2, x2_stride, start, K, BLOCK_K)
        _prefetch_vector(x3, x3_stride, start, K, BLOCK_K)
        _prefetch_vector(x4, x4_stride, start, K, BLOCK_K)
        _prefetch_vector(x5, x5_stride, start, K, BLOCK_K)
    inputs_ready()
    made = EXPRESSION(
        x0=None if x0 is None else load_operand(x0, x0_stride, rows, columns, inside, mask),
        x1=None if x1 is None else load_operand(x1, x1_stride, rows, columns, inside, mask),
        x2=None if x2 is None else load_operand(x2, x2_stride, rows, columns, inside, mask),
        x3=None if x3 is None else load_operand(x3, x3_stride, rows, columns, inside, mask),
        x4=None if x4 is None else load_operand(x4, x4_stride, rows, columns, inside, mask),
        x5=None if x5 is None else load_operand(x5, x5_stride, rows, columns, inside, mask),
        inside=inside,
        columns=K,
    )
    places = rows[:, None] * K + columns
    if residual0 is not None:
        store_residual(residual0, made[1], places, mask, BLOCK_M, BLOCK_K)
    if residual1 is not None:
        store_residual(residual1, made[2], places, mask, BLOCK_M, BLOCK_K)
    values = tl.broadcast_to(made[0], (BLOCK_M, BLOCK_K))
    if not EVEN:
        values = tl.where(inside, values, 0.0)
    groups = tl.reshape(values, (BLOCK_M, GROUPS, GROUP))
    s = scale_of(amax_of_keys(tl.max(magnitude_keys(groups), axis=2)), AMAX_FLOOR, TOP, UE8M0)
    # Dividing by a power of two equals multiplying by its exact reciprocal.
    scaled = quotients(groups, s[:, :, None], RECIPROCAL or UE8M0)
    tl.store(q + places, tl.reshape(codes(scaled, TOP, q.dtype.element_ty), (BLOCK_M, BLOCK_K)), mask=mask)
    blocks = start // GROUP + tl.arange(0, GROUPS)
    scales = scale + rows[:, None] * scale_stride_m + blocks[None, :].to(tl.int64) * scale_stride_k
    tl.store(scales, s, mask=(rows < m)[:, None] & (blocks < tl.cdiv(K, GROUP))[None, :])
