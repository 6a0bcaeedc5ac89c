"""A Triton kernel: rows that a body computes from those of other tensors, quantized without being stored first.

The body is a function made by `codegen.bodies`; the codes and scales are those of `qcompiler.numerics.quantize` for its
result, bit for bit.
"""

import triton
import triton.language as tl

from codegen.kernels.encoding import amax_of_keys, codes, magnitude_keys, quotients, scale_of


@triton.jit
def load_operand(x, stride, rows, columns, inside, mask):  # type: ignore[no-untyped-def]
    """A tile of an operand, zeros outside of it: [rows, columns], or [1, columns] where the stride is None."""
    if stride is None:
        values = tl.load(x + columns, mask=inside, other=None if inside is None else 0.0)
    else:
        values = tl.load(x + rows[:, None] * stride + columns, mask=mask, other=None if mask is None else 0.0)
    return values


@triton.jit
def store_kept(kept, value, places, mask, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes a kept value, which may be [rows, 1] or [1, columns]."""
    tl.store(kept + places, tl.broadcast_to(value, (BLOCK_M, BLOCK_K)).to(kept.dtype.element_ty), mask=mask)


# What follows M must not be a reason to compile again: in the column-major layout the stride along K does.
@triton.jit(do_not_specialize=["m", "scale_stride_k"])
def fused_quantize(  # type: ignore[no-untyped-def]
    x0, x1, x2, x3, x4, x5, kept0, kept1, q, scale, m,
    x0_stride, x1_stride, x2_stride, x3_stride, x4_stride, x5_stride, scale_stride_m, scale_stride_k,
    K: tl.constexpr, BODY: tl.constexpr, AMAX_FLOOR: tl.constexpr, TOP: tl.constexpr, RECIPROCAL: tl.constexpr,
    UE8M0: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """q[m, K], scale[m, ceil(K / GROUP)] and the kept values of a body's result on x0, x1, …

    One program takes a tile of `BLOCK_M` rows and `BLOCK_K` columns, which for a body with a reduction cover the row.
    Programs that follow each other take neighbouring tiles of the same rows.

    Args:
        x0: bfloat16, float16 or float32: rows `x0_stride` elements apart with contiguous columns, or, where the stride
            is None, one contiguous row for all. So are the others; those that the body does not have are None.
        kept0: Contiguous, [m, K], in the element type of the value; or None. So is `kept1`.
        q: float8e4nv, float8e5 or int8, contiguous.
        scale: float32 with any two strides, in elements.
        K: Columns of the tensors. The compiler knows it, so it leaves out what of a tile is outside of the row: 5120
            columns cost 5 / 8 of the tile of 8192 that holds them.
        BODY: As `codegen.bodies.triton_function` makes it; it returns the result and the kept values.
        AMAX_FLOOR: The profile's floor.
        TOP: The format's largest value.
        RECIPROCAL: x * (1 / scale) in place of x / scale.
        UE8M0: Round the scale up to a power of two.
        BLOCK_M: Rows of a tile, a power of two.
        BLOCK_K: Columns of a tile, a power of two, a multiple of `GROUP`.
        GROUP: Columns that share a scale; `BLOCK_K`, covering the row, for one scale a row.
        VECTOR: Columns that follow each other in a thread, at most.
    """
    EVEN: tl.constexpr = K % BLOCK_K == 0
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    across = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0)
    rows = (tile // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tile % across * BLOCK_K
    columns = tl.max_contiguous((start + tl.arange(0, BLOCK_K))[None, :], (1, VECTOR))
    # Masks cost registers and instructions, so what cannot be outside has none: a single row, and even columns.
    inside = None if EVEN else columns < K
    mask = inside if BLOCK_M == 1 else (rows < m)[:, None] if EVEN else (rows < m)[:, None] & inside
    made = BODY(
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
    if kept0 is not None:
        store_kept(kept0, made[1], places, mask, BLOCK_M, BLOCK_K)
    if kept1 is not None:
        store_kept(kept1, made[2], places, mask, BLOCK_M, BLOCK_K)
    values = tl.broadcast_to(made[0], (BLOCK_M, BLOCK_K))
    if not EVEN:
        values = tl.where(inside, values, 0.0)
    groups = tl.reshape(values, (BLOCK_M, GROUPS, GROUP))
    s = scale_of(amax_of_keys(tl.max(magnitude_keys(groups), axis=2)), AMAX_FLOOR, TOP, UE8M0)
    # Dividing by a power of two is multiplying by its exact reciprocal.
    scaled = quotients(groups, s[:, :, None], RECIPROCAL or UE8M0)
    tl.store(q + places, tl.reshape(codes(scaled, TOP, q.dtype.element_ty), (BLOCK_M, BLOCK_K)), mask=mask)
    blocks = start // GROUP + tl.arange(0, GROUPS)
    scales = scale + rows[:, None] * scale_stride_m + blocks[None, :].to(tl.int64) * scale_stride_k
    tl.store(scales, s, mask=(rows < m)[:, None] & (blocks < tl.cdiv(K, GROUP))[None, :])
