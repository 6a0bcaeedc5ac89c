"""Triton kernel that computes rows from other tensors by a fused expression and quantizes them without storing them.

`codegen.fused_expressions` compiles the expression; codes and scales are bit-equal to `qcompiler.numerics.quantize` of
its result. An operand may also be a sum: of quantized terms, or over the GPUs of a host.
"""

import triton
import triton.language as tl

from codegen.kernels.encoding import amax_of_keys, codes, magnitude_keys, quotients, scale_of
from codegen.kernels.overlap import inputs_ready, let_next_start, prefetch
from codegen.kernels.peers import sum_over_ranks


@triton.jit
def load_operand(x, stride, rows, columns, inside, mask):  # type: ignore[no-untyped-def]
    """A tile of an operand, zeros outside it: [rows, columns], or [1, columns] if the stride is None."""
    if stride is None:
        values = tl.load(x + columns, mask=inside, other=None if inside is None else 0.0)
    else:
        values = tl.load(x + rows[:, None] * stride + columns, mask=mask, other=None if mask is None else 0.0)
    return values


@triton.jit
def sum_of_terms(  # type: ignore[no-untyped-def]
    terms, scales, rows, start, columns, mask, m,
    K: tl.constexpr, TERMS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum of a tile of dequantized terms, first to last, in FP32: [BLOCK_M, BLOCK_K]."""
    WIDTH: tl.constexpr = GROUP if GROUP < BLOCK_K else BLOCK_K
    GROUPS: tl.constexpr = BLOCK_K // WIDTH
    ACROSS: tl.constexpr = (K + GROUP - 1) // GROUP
    blocks = start // GROUP + tl.arange(0, GROUPS)[None, :]
    known = (rows < m)[:, None] & (blocks < ACROSS)
    total = tl.zeros((BLOCK_M, GROUPS, WIDTH), tl.float32)
    for term in tl.static_range(TERMS):
        at = (rows + term * m)[:, None]
        codes = tl.load(terms + at * K + columns, mask=mask, other=None if mask is None else 0.0)
        scale = tl.load(scales + at * ACROSS + blocks, mask=known, other=0.0)
        values = tl.reshape(codes.to(tl.float32), (BLOCK_M, GROUPS, WIDTH)) * scale[:, :, None]
        total = values if term == 0 else total + values
    return tl.reshape(total, (BLOCK_M, BLOCK_K))


@triton.jit
def _operand(  # type: ignore[no-untyped-def]
    x, stride, rows, columns, inside, mask, m, memories, steps, rank, patience,
    K: tl.constexpr, IS_SUM: tl.constexpr, RANKS: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of an operand, or of its sum over ranks."""
    tile = load_operand(x, stride, rows, columns, inside, mask)
    if IS_SUM:
        places = tl.arange(0, BLOCK_M)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        exists = (rows < m)[:, None] & (columns < K)
        total = sum_over_ranks(tile, places, exists, memories, steps, rank, patience, RANKS, PROGRAMS)
        tile = total.to(x.dtype.element_ty)
    return tile


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
@triton.jit(do_not_specialize=["m", "rank", "patience", "scale_stride_k"])
def fused_quantize(  # type: ignore[no-untyped-def]
    x0, x1, x2, x3, x4, x5, terms, term_scales, memories, steps, residual0, residual1, q, scale, m, rank, patience,
    x0_stride, x1_stride, x2_stride, x3_stride, x4_stride, x5_stride, scale_stride_m, scale_stride_k,
    K: tl.constexpr, EXPRESSION: tl.constexpr, AMAX_FLOOR: tl.constexpr, TOP: tl.constexpr, RECIPROCAL: tl.constexpr,
    UE8M0: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    AHEAD: tl.constexpr, TERMS: tl.constexpr, TERM_GROUP: tl.constexpr, SUMMED: tl.constexpr, RANKS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """q[m, K], scale[m, ceil(K / GROUP)] and the residual outputs of a fused expression over x0, x1, …, and y0

    The operand y0 is the sum of `TERMS` quantized terms, if there are any. The operand `SUMMED` is a sum over ranks,
    rounded once: then each program exchanges its tile with the others' (see `codegen.kernels.peers`).

    One program processes a tile of `BLOCK_M` rows and `BLOCK_K` columns, which span the row if the expression has a
    reduction. Consecutive programs process neighboring tiles of the same rows.

    Args:
        x0: bfloat16, float16 or float32: rows `x0_stride` elements apart with contiguous columns, or, if the stride is
            None, one contiguous row for all. The same holds for the others; unused ones are None.
        terms: Codes [TERMS, m, K] in an 8-bit type, contiguous; or None.
        term_scales: float32 [TERMS, m, ceil(K / TERM_GROUP)], contiguous; or None.
        memories: See `codegen.kernels.peers.exchange`, or None; so are steps, rank, patience, RANKS, and PROGRAMS.
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
        TERMS: The number of terms.
        TERM_GROUP: Columns of a term that share a scale, a power of two; at least K for one scale per row.
        SUMMED: The number of the operand that is summed over ranks; negative for none.
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
        x0=None if x0 is None else _operand(
            x0, x0_stride, rows, columns, inside, mask, m, memories, steps, rank, patience,
            K, SUMMED == 0, RANKS, PROGRAMS, BLOCK_M, BLOCK_K,
        ),
        x1=None if x1 is None else _operand(
            x1, x1_stride, rows, columns, inside, mask, m, memories, steps, rank, patience,
            K, SUMMED == 1, RANKS, PROGRAMS, BLOCK_M, BLOCK_K,
        ),
        x2=None if x2 is None else _operand(
            x2, x2_stride, rows, columns, inside, mask, m, memories, steps, rank, patience,
            K, SUMMED == 2, RANKS, PROGRAMS, BLOCK_M, BLOCK_K,
        ),
        x3=None if x3 is None else _operand(
            x3, x3_stride, rows, columns, inside, mask, m, memories, steps, rank, patience,
            K, SUMMED == 3, RANKS, PROGRAMS, BLOCK_M, BLOCK_K,
        ),
        x4=None if x4 is None else _operand(
            x4, x4_stride, rows, columns, inside, mask, m, memories, steps, rank, patience,
            K, SUMMED == 4, RANKS, PROGRAMS, BLOCK_M, BLOCK_K,
        ),
        x5=None if x5 is None else _operand(
            x5, x5_stride, rows, columns, inside, mask, m, memories, steps, rank, patience,
            K, SUMMED == 5, RANKS, PROGRAMS, BLOCK_M, BLOCK_K,
        ),
        y0=None if terms is None else sum_of_terms(
            terms, term_scales, rows, start, columns, mask, m, K, TERMS, TERM_GROUP, BLOCK_M, BLOCK_K
        ),
        inside=inside,
        columns=K,
    )  # fmt: skip
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
