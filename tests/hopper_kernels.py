"""Kernels of target sm_90a for tests: every configuration can be launched, and some can be compiled ahead of time.

Operands for compilation are on the "meta" device. Their sizes give the compiler the same facts as large sizes do, and
strides of scales are not multiples of 16.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codegen.launching.launch import KernelCall
from codegen.machine_code import MachineCode
from codegen.operators.quantize import scale_like
from codegen.targets.hopper import HOPPER
from codegen.templates import next_tokens
from codegen.templates.append_to_cache import APPEND_TO_CACHE, AppendOperands, AppendProblem
from codegen.templates.attend_to_cache import (
    ATTEND_TO_CACHE,
    AttendConfig,
    AttendOperands,
    AttendProblem,
    QuantizedRows,
)
from codegen.templates.fused import FUSED_GEMM, FusedGemmConfig, FusedGemmProblem, FusedOperands
from codegen.templates.fused_expression import expression_call
from codegen.templates.fused_quantize import (
    FUSED_QUANTIZE,
    FusedQuantizeConfig,
    FusedQuantizeOperands,
    FusedQuantizeProblem,
    RankSum,
    Terms,
)
from codegen.templates.gemm import GEMM, GemmConfig, GemmOperands, GemmProblem, Kind
from codegen.templates.gemm_template import GemmTemplate
from codegen.templates.grouped import GROUPED_GEMM, GroupedConfig, GroupedGemm, GroupedOperands, GroupedProblem
from codegen.templates.peers import PROGRAMS
from codegen.templates.quantize import QUANTIZE, QuantizeConfig, QuantizeOperands, QuantizeProblem
from codegen.templates.read_cache import READ_CACHE, ReadOperands, ReadProblem
from qcompiler import numerics
from qcompiler.dialects.fused_expression import parse
from qcompiler.numerics import ALL

E4M3 = torch.float8_e4m3fn
GLUON = ("warp", "split", "narrow", "team")
WARP = ("warp", "split")
MANY_ROWS = 1 << 20

choose, refusal, estimated_time = GEMM.family(HOPPER).choose, GEMM.family(HOPPER).why_not, GEMM.family(HOPPER).time


def gemm_template(config: GemmConfig) -> GemmTemplate:
    found = GEMM.family(HOPPER).template(config)
    assert isinstance(found, GemmTemplate)
    return found


def grouped_memory(config: GroupedConfig, out_bytes: int = 2, groups: int = 256) -> int:
    found = GROUPED_GEMM.family(HOPPER).template(config)
    assert isinstance(found, GroupedGemm)
    return found.shared_memory(config, out_bytes, groups)


def shared_memory(config: GemmConfig, out_bytes: int = 2, stage_scales: int = 1) -> int:
    return gemm_template(config).shared_memory(config, out_bytes, stage_scales)


def all_configs(kind: Kind = "tiles", x_block: int = 128) -> tuple[GemmConfig, ...]:
    return GEMM.family(HOPPER).configs(GemmProblem(1, 1, 1, kind=kind, x_block=x_block))


def all_fused_configs() -> tuple[FusedGemmConfig, ...]:
    found = FUSED_GEMM.family(HOPPER).configs(FusedGemmProblem(1, 1, 1, 1))
    return tuple(config for config in found if isinstance(config, FusedGemmConfig))


GROUPED_CONFIGS = GROUPED_GEMM.family(HOPPER).configs(GroupedProblem(1))
TALL = next(config for config in GROUPED_CONFIGS if config.block_m == 192)


def choose_grouped(mean: float, out_bytes: int = 2) -> GroupedConfig:
    return GROUPED_GEMM.family(HOPPER).choose(GroupedProblem(mean, out_bytes=out_bytes))


def launch_gemm(
    config: GemmConfig, x: Tensor, w: Tensor, out: Tensor, xs: Tensor, ws: Tensor, bias: Tensor | None,
    x_block: int = 128,
) -> None:  # fmt: skip
    """Scales inside the sum."""
    GEMM.family(HOPPER).launch(config, GemmOperands(x, w, out, xs, ws, bias, x_block))


def launch_row_gemm(
    config: GemmConfig, x: Tensor, w: Tensor, out: Tensor, xs: Tensor, ws: Tensor, bias: Tensor | None,
    promote: bool | None = None,
) -> None:  # fmt: skip
    """Scales at the end of the sum."""
    GEMM.family(HOPPER).launch(config, GemmOperands(x, w, out, xs, ws, bias, None, promote))


def launch_grouped(config: GroupedConfig, *operands: Any) -> None:
    GROUPED_GEMM.family(HOPPER).launch(config, GroupedOperands(*operands))


def launch_fused(
    config: FusedGemmConfig, expression: str, x: Tensor, w: Tensor, xs: Tensor, ws: Tensor, bias: Tensor | None,
    others: Sequence[Tensor], out: Tensor, out_scale: Tensor | None = None, profile: str = "deepseek",
) -> None:  # fmt: skip
    operands = FusedOperands(expression, GemmOperands(x, w, out, xs, ws, bias), others, out_scale, profile)
    FUSED_GEMM.family(HOPPER).launch(config, operands)


def launch_quantize(x: Tensor, q: Tensor, scale: Tensor, block: Sequence[int], *last: Any, known: bool = False) -> None:
    """The operator's launches; profile and prescale come last."""
    config = QUANTIZE.family(HOPPER).choose(QuantizeProblem(x.shape[0], x.shape[1], (block[0], block[1]), known))
    QUANTIZE.family(HOPPER).launch(config, QuantizeOperands(x, q, scale, block, *last))


# Ahead of time

M, N, K = 768, 768, 640


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def maybe(dtype: torch.dtype | None, *shape: int) -> Tensor | None:
    return None if dtype is None else meta(*shape, dtype=dtype)


def unaligned(tensor: Tensor) -> Tensor:
    """A tensor with the same layout, shifted by one element from a 16-byte boundary."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return meta(extent + 2, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride(), 1)


def compiled(call: KernelCall) -> MachineCode:
    return HOPPER.compile(call)


def compile_gemm(
    config: GemmConfig, *, out_dtype: torch.dtype = torch.bfloat16, bias_dtype: torch.dtype | None = None,
    scale_layout: str = "col_major", aligned: bool = True, x_block: int = 128,
) -> MachineCode:  # fmt: skip
    """The GEMM with scales inside the sum."""
    n, k = (N, K) if aligned else (N - 1, K - 1)
    x, w, out = meta(M, k, dtype=E4M3), meta(n, k, dtype=E4M3), meta(M, n, dtype=out_dtype)
    scale, bias = scale_like(x, x_block, scale_layout), maybe(bias_dtype, n)
    w_scale = meta(-(-n // 128), -(-k // 128))
    if not aligned:
        x, w, out, scale, w_scale = map(unaligned, (x, w, out, scale, w_scale))
    return compiled(GEMM.family(HOPPER).calls(config, GemmOperands(x, w, out, scale, w_scale, bias, x_block))[0])


def compile_row_gemm(
    config: GemmConfig, kind: Kind = "rows_f8", *, out_dtype: torch.dtype = torch.bfloat16,
    bias_dtype: torch.dtype | None = None, aligned: bool = True, promote: bool | None = None, partial: bool = False,
) -> MachineCode:  # fmt: skip
    """The GEMM with scales at the end of the sum; if `partial`, the kernel that writes the sums of a split of K."""
    dtype = torch.int8 if kind == "rows_i8" else E4M3
    m, n, k = (16, 128, 8192) if partial else (M, N, K) if aligned else (M, N - 1, K - 1)
    x, w, out = meta(m, k, dtype=dtype), meta(n, k, dtype=dtype), meta(m, n, dtype=out_dtype)
    x_scale, w_scale, bias = meta(m, 1), meta(n, 1), maybe(bias_dtype, n)
    if not aligned:
        x, w, out, x_scale, w_scale = map(unaligned, (x, w, out, x_scale, w_scale))
    calls = GEMM.family(HOPPER).calls(config, GemmOperands(x, w, out, x_scale, w_scale, bias, None, promote))
    assert len(calls) == (2 if partial else 1)
    return compiled(calls[0])


def compile_sum_splits(
    splits: int, kind: Kind = "tiles", *, out_dtype: torch.dtype = torch.bfloat16,
    bias_dtype: torch.dtype | None = None,
) -> MachineCode:  # fmt: skip
    """The kernel that adds the K splits of a narrow tile."""
    dtype, x_block = (E4M3, 128) if kind == "tiles" else (torch.int8 if kind == "rows_i8" else E4M3, None)
    config = next(each for each in all_configs(kind) if each.variant == "narrow")
    k = 512 * splits
    x, w, out = meta(16, k, dtype=dtype), meta(128, k, dtype=dtype), meta(16, 128, dtype=out_dtype)
    scales = (scale_like(x, 128, "col_major"), meta(1, k // 128)) if x_block else (meta(16, 1), meta(128, 1))
    _, last = GEMM.family(HOPPER).calls(config, GemmOperands(x, w, out, *scales, maybe(bias_dtype, 128), x_block))
    assert last.constants["SPLITS"] == splits
    return compiled(last)


def compile_fused(
    config: FusedGemmConfig, expression: str, *, others: Sequence[torch.dtype] = (),
    bias_dtype: torch.dtype | None = None, out_dtype: torch.dtype | None = None, columns: int = 640,
    scale_layout: str = "col_major", profile: str = numerics.DEFAULT_PROFILE,
) -> MachineCode:  # fmt: skip
    """The GEMM with a fused expression; if `out_dtype` is given, it quantizes the result."""
    rows = config.parts * columns
    x, w = meta(M, K, dtype=E4M3), meta(rows, K, dtype=E4M3)
    out = meta(M, columns, dtype=out_dtype or parse(expression).dtype())
    scales = scale_like(x, 128, "col_major"), meta(-(-rows // 128), K // 128)
    product = GemmOperands(x, w, out, *scales, maybe(bias_dtype, rows))
    more = [meta(M, columns, dtype=dtype) for dtype in others]
    scale = None if out_dtype is None else scale_like(out, 128, scale_layout)
    return compiled(
        FUSED_GEMM.family(HOPPER).calls(config, FusedOperands(expression, product, more, scale, profile))[0]
    )


def compile_expression(expression: str, dtype: torch.dtype = torch.bfloat16) -> MachineCode:
    made = parse(expression)
    sums, others = ([meta(M, N, dtype=dtype) for name in made.operands if name[0] == kind] for kind in "yx")
    return compiled(expression_call(expression, sums, others, meta(M, N, dtype=made.dtype())))


def compile_grouped(
    config: GroupedConfig, *, out_dtype: torch.dtype = torch.bfloat16, groups: int = 256, masked: bool = False
) -> MachineCode:
    x, w = meta(M, K, dtype=E4M3), meta(groups, N, K, dtype=E4M3)
    scales = scale_like(x, 128, "col_major"), meta(groups, N // 128, K // 128)
    out, offsets = meta(M, N, dtype=out_dtype), meta(groups, dtype=torch.int32)
    operands = GroupedOperands(x, w, out, *scales, offsets, M if masked else None)
    return compiled(GROUPED_GEMM.family(HOPPER).calls(config, operands)[0])


def quantize_calls(
    dtype: torch.dtype, m: int, k: int, block: tuple[int, int], out_dtype: torch.dtype, *,
    profile: str = numerics.DEFAULT_PROFILE, scale_layout: str = "row_major", prescale: bool = False,
    known: bool = False, config: QuantizeConfig | None = None,
) -> Sequence[KernelCall]:  # fmt: skip
    x, q = meta(m, k, dtype=dtype), meta(m, k, dtype=out_dtype)
    scale = meta(1, 1) if block[0] == ALL else scale_like(x, block[1], scale_layout)
    operands = QuantizeOperands(x, q, scale, block, profile, meta(k) if prescale else None)
    tile = config or QUANTIZE.family(HOPPER).choose(QuantizeProblem(m, k, block, known))
    return QUANTIZE.family(HOPPER).calls(tile, operands)


def compile_quantize(
    dtype: torch.dtype = torch.bfloat16, *, block_k: int = 128, out_dtype: torch.dtype = E4M3, **rest: Any
) -> MachineCode:
    """Tiles of `block_k` columns."""
    return compiled(quantize_calls(dtype, MANY_ROWS, 5 * block_k, (1, block_k), out_dtype, **rest)[0])


def compile_tokens(
    k: int, dtype: torch.dtype = torch.bfloat16, *, m: int = MANY_ROWS, out_dtype: torch.dtype = E4M3, **rest: Any
) -> MachineCode:
    """One scale per row of `k` columns."""
    return compiled(quantize_calls(dtype, m, k, (1, ALL), out_dtype, **rest)[0])


def compile_known(
    dtype: torch.dtype = torch.bfloat16, *, m: int = MANY_ROWS, out_dtype: torch.dtype = E4M3,
    block_k: int | None = None, **rest: Any,
) -> MachineCode:  # fmt: skip
    """A given (static) scale: for tiles of `block_k` columns, or for the whole tensor."""
    block = (ALL, ALL) if block_k is None else (1, block_k)
    if block_k is not None:
        rest["scale_layout"] = "col_major"
    return compiled(quantize_calls(dtype, m, K, block, out_dtype, known=True, **rest)[0])


def compile_amax(dtype: torch.dtype = torch.bfloat16, *, m: int = MANY_ROWS, prescale: bool = False) -> MachineCode:
    """The amax of a tensor of `m` rows."""
    return compiled(quantize_calls(dtype, m, K, (ALL, ALL), E4M3, prescale=prescale)[0])


def compile_scale() -> MachineCode:
    """The kernel that computes a tensor's scale from the amaxes of its parts."""
    return compiled(quantize_calls(torch.bfloat16, MANY_ROWS, K, (ALL, ALL), E4M3)[1])


def compile_fused_quantize(
    expression: str, operands: tuple[torch.dtype, ...], k: int, *, m: int = MANY_ROWS, vectors: tuple[int, ...] = (),
    keep: tuple[str, ...] = (), block_k: int = 128, out_dtype: torch.dtype = E4M3,
    profile: str = numerics.DEFAULT_PROFILE, scale_layout: str = "col_major", config: FusedQuantizeConfig | None = None,
    terms: int = 0, term_group: int = 128, term_dtype: torch.dtype = E4M3, summed: int | None = None, ranks: int = 2,
) -> MachineCode:  # fmt: skip
    """Quantization of a fused expression; `vectors` are the positions of vector operands, y0 is a sum of `terms`.

    The operand `summed` is a sum over `ranks`.
    """
    made, widest = parse(expression), 4 if terms else max(dtype.itemsize for dtype in operands)
    given = [meta(*([k] if i in vectors else [m, k]), dtype=dtype) for i, dtype in enumerate(operands)]
    kept, q = [meta(m, k, dtype=made.dtype(name)) for name in keep], meta(m, k, dtype=out_dtype)
    problem = FusedQuantizeProblem(m, k, (1, block_k), made.across, len(operands), widest, len(keep))
    tile = config or FUSED_QUANTIZE.family(HOPPER).choose(problem)
    blocks = 1 if term_group == numerics.ALL else -(-k // term_group)
    added = Terms(meta(terms, m, k, dtype=term_dtype), meta(terms, m, blocks), term_group) if terms else None
    scale = scale_like(q, block_k, scale_layout)
    memories, steps = meta(ranks, dtype=torch.int64), meta(PROGRAMS, dtype=torch.int32)
    rank_sum = None if summed is None else RankSum(summed, memories, steps, 0, 600 * 10**9)
    operands_ = FusedQuantizeOperands(expression, keep, given, kept, q, scale, profile, added, rank_sum)
    return compiled(FUSED_QUANTIZE.family(HOPPER).calls(tile, operands_)[0])


CAPACITY = 8192


def meta_cache(
    dtype: torch.dtype,
    groups: int,
    sizes: tuple[int, int],
    slots: int = 16,
    *,
    static: bool = False,
    held: int = CAPACITY,
    within: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    key, value = (meta(slots, groups, held, size, dtype=dtype) for size in sizes)
    shape = (1,) if static else (slots, groups, held)
    scales = [meta(*shape) if dtype.itemsize == 1 else None for _ in sizes]
    if within:
        return key, key[..., : sizes[1]], scales[0], scales[0]
    return key, value, scales[0], scales[1]


def choose_attend(batch: int, tokens: int = 1, *, dtype: torch.dtype = torch.bfloat16, **rest: Any) -> AttendConfig:
    """The configuration for 8 KV heads of 4 query heads each, with a capacity of 8192 positions."""
    sizes = {"groups": 8, "repeats": 4, "size": 128, "value_size": 128, "capacity": CAPACITY, "window": None}
    problem = {"multiprocessors": 132, "element_bytes": dtype.itemsize, **sizes, **rest}
    return ATTEND_TO_CACHE.family(HOPPER).choose(AttendProblem(batch=batch, tokens=tokens, **problem))


def attend_calls(
    dtype: torch.dtype = torch.bfloat16, *, batch: int = 16, tokens: int = 1, groups: int = 8, repeats: int = 4,
    sizes: tuple[int, int] = (128, 128), config: AttendConfig | None = None, window: int | None = None,
    softcap: float | None = None, sinks: bool = False, static: bool = False, tile: int | None = None,
    slopes: bool = False, chunk: int | None = None, ring: int | None = None, within: bool = False,
) -> Sequence[KernelCall]:  # fmt: skip
    """Attention over a cache whose elements, unless they are codes, have the dtype of the query.

    With a `tile`, the result is quantized. With a `ring`, the cache holds that many positions.
    """
    query_dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    heads, rows = groups * repeats, meta(batch, dtype=torch.int64)
    query = meta(batch, tokens, heads, sizes[0], dtype=query_dtype).transpose(1, 2)
    out: torch.Tensor | QuantizedRows = meta(batch, tokens, heads, sizes[1], dtype=query_dtype)
    if tile is not None:
        width = heads * sizes[1]
        scale = meta(batch, width // tile, tokens).transpose(1, 2)
        out = QuantizedRows(meta(batch, tokens, width, dtype=E4M3), scale, tile, "deepseek")
    cache = meta_cache(dtype, groups, sizes, static=static, held=ring or CAPACITY, within=within)
    given = meta(heads, dtype=query_dtype) if sinks else None
    chosen = config or choose_attend(
        batch, tokens, dtype=dtype, groups=groups, repeats=repeats, size=sizes[0], value_size=sizes[1],
        window=window or chunk, within=within,
    )  # fmt: skip
    capacity, biases = CAPACITY if ring else None, meta(heads, dtype=torch.float32) if slopes else None
    operands = AttendOperands(
        query, cache, rows, rows, given, out, sizes[0] ** -0.5, window, softcap, capacity, chunk, biases
    )  # fmt: skip
    return ATTEND_TO_CACHE.family(HOPPER).calls(chosen, operands)


def compile_attend(dtype: torch.dtype = torch.bfloat16, **rest: Any) -> MachineCode:
    return compiled(attend_calls(dtype, **rest)[0])


def compile_combine(batch: int = 1, **rest: Any) -> MachineCode:
    """The kernel that adds the splits of a decode step."""
    return compiled(attend_calls(batch=batch, **rest)[-1])


def compile_append(
    dtype: torch.dtype = torch.bfloat16,
    *,
    batch: int = 16,
    tokens: int = 1,
    sizes: tuple[int, int] = (128, 128),
    static: bool = False,
    ring: int | None = None,
    within: bool = False,
) -> MachineCode:
    """Appending to 8 KV heads; keys and values are slices of one matrix, as after a merged linear."""
    size = sum(sizes)
    both = meta(batch, tokens, 8, size, dtype=torch.bfloat16).transpose(1, 2)
    rows = meta(batch, dtype=torch.int64)
    cache = meta_cache(dtype, 8, sizes, static=static, held=ring or CAPACITY, within=within)
    capacity = CAPACITY if ring else None
    operands = AppendOperands(both[..., : sizes[0]], both[..., sizes[0] :], cache, rows, rows, capacity)
    config = APPEND_TO_CACHE.family(HOPPER).choose(AppendProblem(batch * tokens * 8, max(sizes)))
    return compiled(APPEND_TO_CACHE.family(HOPPER).calls(config, operands)[0])


def compile_read(dtype: torch.dtype = torch.bfloat16, sizes: tuple[int, int] = (128, 128)) -> MachineCode:
    """Reading 4096 positions of 8 KV heads of two slots."""
    rows = meta(2, dtype=torch.int64)
    key, value = (meta(2, 8, 4096, size, dtype=torch.bfloat16) for size in sizes)
    config = READ_CACHE.family(HOPPER).choose(ReadProblem(2 * 8 * 4096, max(sizes)))
    calls = READ_CACHE.family(HOPPER).calls(config, ReadOperands(meta_cache(dtype, 8, sizes), rows, key, value))
    return compiled(calls[0])


def compile_next_tokens(rows: int, columns: int, first: int = 0, ranks: int = 1) -> list[MachineCode]:
    """Ranking the columns of one rank, and entering the largest logits of all ranks."""
    own, every = (meta(each * -(-columns // next_tokens.PART), rows, dtype=torch.int64) for each in (1, ranks))
    given = next_tokens.RankPartsOperands(meta(rows, columns, dtype=torch.bfloat16), own, first)
    tables = next_tokens.EnterTokensOperands(every, *(meta(rows, dtype=torch.int64) for _ in range(6)))
    ranking = next_tokens.RANK_PARTS.family(HOPPER).calls(next_tokens.RankPartsConfig(next_tokens.PART, 4), given)
    entering = next_tokens.ENTER_TOKENS.family(HOPPER).calls(next_tokens.EnterTokensConfig(1), tables)
    return [HOPPER.compile(call) for call in (*ranking, *entering)]
