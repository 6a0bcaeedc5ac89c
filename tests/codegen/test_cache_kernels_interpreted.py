"""The KV cache kernels in Triton's interpreter on a CPU: lengths, splits, windows, sinks, head sizes and formats.

The reference attends in FP64 over the decoded cache. Positions that a row must not read hold NaN.
"""

import math
from typing import Any

import pytest
from triton_interpreter import needs_interpreter, prepare_interpreter, run_interpreted


def _reference(
    query: "Tensor", key: "Tensor", value: "Tensor", length: int, sinks: "Tensor | None", slopes: "Tensor | None",
    scale: float, window: int | None, softcap: float | None, chunk: int | None,
) -> "Tensor":  # fmt: skip
    """One row of the batch: query [heads, tokens, size], key and value [groups, capacity, size], all FP64."""
    repeats = query.shape[0] // key.shape[0]
    stop = length + query.shape[1]
    key, value = key[:, :stop].repeat_interleave(repeats, 0), value[:, :stop].repeat_interleave(repeats, 0)
    scores = query @ key.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    own, at = torch.arange(length, stop)[:, None], torch.arange(stop)
    if slopes is not None:
        scores = scores + slopes.double()[:, None, None] * (at - own)
    hidden = (at > own) if window is None else (at > own) | (at <= own - window)
    if chunk is not None:
        hidden |= at // chunk < own // chunk
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:2], 1)], -1)
    weights = torch.softmax(scores, -1)[..., :stop]
    return torch.where(weights[..., None] > 0, weights[..., None] * value[:, None], 0.0).sum(2)


def _cache(
    dtype: "torch.dtype", slots: int, groups: int, capacity: int, sizes: tuple[int, int], static: bool,
    within: bool = False,
) -> "tuple[Tensor, Tensor, Tensor | None, Tensor | None]":  # fmt: skip
    if within:
        key, _, scale, _ = _cache(dtype, slots, groups, capacity, sizes, static)
        return key, key[..., : sizes[1]], scale, scale
    key, value = (torch.randn(slots, groups, capacity, size) for size in sizes)
    if dtype.itemsize > 1:
        return key.to(dtype), value.to(dtype), None, None
    if static:
        scales = torch.tensor([0.02]), torch.tensor([3.7])
        key, value = (
            state.quantized(each * 40 * scale, scale, dtype) for each, scale in zip((key, value), scales, strict=True)
        )
        return key, value, *scales
    spread = torch.randn(slots, groups, capacity, 1).mul(4).exp()  # scales of neighbors differ by far
    (key, key_scale), (value, value_scale) = (
        numerics.quantize(each, numerics.format_of((1, -1), dtype)) for each in (key, value * spread)
    )
    return key, value, key_scale[..., 0].contiguous(), value_scale[..., 0].contiguous()


def _in_ring(
    cache: "tuple[Tensor, Tensor, Tensor | None, Tensor | None]", slots: "Tensor", ends: list[int], ring: int
) -> "tuple[Tensor, Tensor, Tensor | None, Tensor | None]":
    """A cache of the latest positions only; all other places hold NaN, or large codes."""
    made: list[Tensor | None] = []
    for tensor in cache:
        if tensor is None or tensor.dim() == 1:
            made.append(tensor)
            continue
        shape = (*tensor.shape[:2], ring, *tensor.shape[3:])
        held = torch.full(shape, 127 if tensor.itemsize == 1 else math.nan).to(tensor.dtype)
        for slot, end in zip(slots.tolist(), ends, strict=True):
            for position in range(max(end - ring, 0), end):
                held[slot, :, position % ring] = tensor[slot, :, position]
        made.append(held)
    key, value, key_scale, value_scale = made
    assert key is not None and value is not None
    return key, value, key_scale, value_scale


def _attend(
    dtype: "torch.dtype", lengths: list[int], tokens: int, repeats: int, sizes: tuple[int, int] = (64, 64), *,
    capacity: int = 50, splits: int = 1, window: int | None = None, softcap: float | None = None, sink: bool = False,
    groups: int = 2, block_m: int = 16, block_n: int = 16, query_dtype: "torch.dtype | None" = None,
    static: bool = False, slope: bool = False, chunk: int | None = None, ring: int | None = None, within: bool = False,
) -> None:  # fmt: skip
    batch, heads, scale = len(lengths), groups * repeats, sizes[0] ** -0.5
    cache = _cache(dtype, batch + 1, groups, capacity, sizes, static, within)
    slots = torch.randperm(batch + 1)[:batch]
    for row, length in enumerate(lengths):
        for tensor in cache:
            if tensor is not None and tensor.dim() > 1 and tensor.is_floating_point() and tensor.itemsize > 1:
                tensor[slots[row], :, length + tokens :] = math.nan
                tensor[slots[row], :, : max(length + 1 - (window or capacity), 0)] = math.nan
                tensor[slots[row], :, : length // (chunk or capacity) * (chunk or 0)] = math.nan
    query = torch.randn(batch, tokens, heads, sizes[0]).mul(3).bfloat16()  # float16 holds these up to a power of two
    query = query.to(query_dtype or torch.float32).transpose(1, 2)
    sinks = torch.randn(heads) if sink else None
    slopes = torch.rand(heads) if slope else None
    out = torch.full((batch + 1, tokens, heads, sizes[1]), 7.0)
    operands = AttendOperands(
        query, cache, slots, torch.tensor(lengths), sinks, out[:batch], scale, window, softcap, None, chunk, slopes
    )  # fmt: skip
    kind: Any = LatentConfig if within else AttendConfig
    config = kind(block_m, block_n, 4, 2, splits)
    ATTEND_TO_CACHE.family(HOPPER).launch(config, operands)
    if ring is not None:
        again, held = torch.empty_like(out[:batch]), _in_ring(cache, slots, [at + tokens for at in lengths], ring)
        in_ring = operands._replace(cache=held, out=again, capacity=capacity)
        ATTEND_TO_CACHE.family(HOPPER).launch(config, in_ring)
        assert torch.equal(again, out[:batch]), (dtype, lengths, tokens, ring)
    key, value = (codes.double() for codes in cache[:2])
    if cache[2] is not None and cache[3] is not None:
        key, value = key * cache[2][..., None].double(), value * cache[3][..., None].double()
    error = size = 0.0
    for row, length in enumerate(lengths):
        slot = int(slots[row])
        own = (query[row].double(), key[slot], value[slot], length)
        want = _reference(*own, sinks, slopes, scale, window, softcap, chunk)
        error = max(error, float((out[row].transpose(0, 1) - want).norm()))
        size = max(size, float(want.norm()))
    case = (dtype, lengths, tokens, repeats, sizes, splits, window, softcap, sink, slope, chunk)
    rounding = 2 if within and dtype.itemsize == 1 else dtype.itemsize  # codes become numbers of bfloat16
    assert error < size * {1: 5e-4, 2: 8e-3, 4: 1e-5}[rounding], (case, error / size)
    assert bool(out.isfinite().all()), (case, "not finite")
    assert bool((out[batch:] == 7.0).all()), (case, "wrote beyond the last row")


def _attend_and_quantize(
    sizes: tuple[int, int], tile: int, splits: int, heads: int = 4, tokens: int = 3, dtype: "torch.dtype | None" = None
) -> None:
    """The codes and scales of an operation that quantizes are those of its plain result, in both layouts of scales."""
    lengths, groups = [0, 40], 1
    batch, config = len(lengths), AttendConfig(16, 16, 4, 2, splits)
    cache = _cache(torch.float32 if dtype is None else dtype, batch, groups, 50, sizes, False)
    query = torch.randn(batch, tokens, heads, sizes[0]).to(dtype or torch.float32).transpose(1, 2)
    rest = (cache, torch.tensor([1, 0]), torch.tensor(lengths), None)
    out = torch.empty(batch, tokens, heads, sizes[1], dtype=query.dtype)
    family = ATTEND_TO_CACHE.family(HOPPER)
    family.launch(config, AttendOperands(query, *rest, out, 0.2))
    rows = out.flatten(2)
    for profile, layout in (("deepseek", "col_major"), ("ue8m0", "row_major")):
        want, want_scale = numerics.quantize(rows, numerics.format_of((1, tile), torch.int8, profile))
        codes = torch.full((batch + 1, *rows.shape[1:]), 7, dtype=torch.int8)
        size, strides = scale_sizes(rows.shape, tile, layout)
        scale = torch.full((1 + 2 * want_scale.numel() * 4,), 7.0).as_strided(size, strides or want_scale.stride())
        quantized = QuantizedRows(codes[:batch], scale, tile, profile)
        family.launch(config, AttendOperands(query, *rest, quantized, 0.2))
        case = (sizes, tile, splits, heads, profile)
        assert torch.equal(codes[:batch], want) and torch.equal(scale, want_scale), case
        assert bool((codes[batch:] == 7).all()), (case, "wrote beyond the last row")


def _append(
    dtype: "torch.dtype", source: "torch.dtype", lengths: list[int], slots: list[int], tokens: int,
    sizes: tuple[int, int], groups: int = 2, capacity: int = 9, static: float | None = None,
    ring: int | None = None, within: bool = False,
) -> None:  # fmt: skip
    """Compares with a loop over tokens; rows that do not fit change nothing."""
    batch, count = len(lengths), 4
    key, value = (
        torch.randn(batch, tokens, groups + 1, size + 3).to(source)[:, :, 1:, 1 : size + 1].transpose(1, 2)
        for size in sizes
    )
    if dtype == torch.float8_e4m3fn:  # needs no rounding: see test_kernels_interpreted
        key, value = (torch.where(each > 0, 14.0, -8.0).to(source) for each in (key, value))
    quantized = dtype.itemsize == 1
    held = ring or capacity
    cache = [torch.full((count, groups, held, size), 5.0).to(dtype) for size in sizes]
    pairs = [key, value]
    if within:
        cache[1], pairs = cache[0][..., : sizes[1]], [key]
    scales = [torch.full((count, groups, held), 5.0) for _ in sizes] if quantized else []
    if static is not None:
        scales = [torch.tensor([static]), torch.tensor([0.5 * static])]
    if within:
        scales = [scales[0], scales[0]] if scales else []
    want = [each.clone() for each in (*cache, *scales)]
    if within:
        want[1] = want[0][..., : sizes[1]]
        want[2:] = want[2:3] * 2
    for index, new in enumerate(pairs):
        codes, scale = new.to(dtype), None
        if static is not None:
            codes = state.quantized(new, scales[index], dtype)
        elif quantized:
            codes, scale = numerics.quantize(new, numerics.format_of((1, -1), dtype))
        for row in range(batch):
            for token in range(tokens):
                slot, position = slots[row], lengths[row] + token
                if 0 <= slot < count and 0 <= position < capacity:
                    want[index][slot, :, position % held] = codes[row, :, token]
                    if scale is not None:
                        want[2 + index][slot, :, position % held] = scale[row, :, token, 0]
    tensors = (cache[0], cache[1], *(scales or (None, None)))
    rows = torch.tensor(slots), torch.tensor(lengths)
    operands = AppendOperands(key, value, tensors, *rows, None if ring is None else capacity)
    config = APPEND_TO_CACHE.family(HOPPER).choose(AppendProblem(batch * groups * tokens, max(sizes)))
    APPEND_TO_CACHE.family(HOPPER).launch(config, operands)
    for got, need in zip((*cache, *scales), want, strict=True):
        assert torch.equal(got.float(), need.float()), (dtype, source, lengths, slots, tokens, sizes)


def _read(dtype: "torch.dtype", sizes: tuple[int, int], static: bool = False) -> None:
    """The first positions of two slots, as torch reads them."""
    cache, slots, end = _cache(dtype, 3, 2, 11, sizes, static), torch.tensor([2, 0]), 7
    key, value = (torch.full((3, 2, end, size), 7.0) for size in sizes)
    config = READ_CACHE.family(HOPPER).choose(ReadProblem(4 * end, max(sizes)))
    READ_CACHE.family(HOPPER).launch(config, ReadOperands(cache, slots, key[:2], value[:2]))
    want = stored([each for each in cache if each is not None], slots, end, torch.float32)
    for got, need in zip((key, value), want, strict=True):
        assert torch.equal(got[:2], need), (dtype, sizes, static)
        assert bool((got[2:] == 7.0).all()), (dtype, sizes, "wrote beyond the last row")


def _dot(
    _builder: object, a: "TensorHandle", b: "TensorHandle", sums: "TensorHandle", *_options: object
) -> "TensorHandle":
    """a @ b + sums: the interpreter's own version takes the bits of bfloat16 for integers."""
    one, other = (
        (each.data.astype("uint32") << 16).view("float32") if each.dtype == tl.bfloat16 else each.data.astype("float32")
        for each in (a, b)
    )
    return TensorHandle(one @ other + sums.data, sums.dtype.scalar)


def _run_within() -> None:
    """Caches with their values within the keys: attention over a latent."""
    f8, i8, b16, f32 = torch.float8_e4m3fn, torch.int8, torch.bfloat16, torch.float32
    for dtype in (f8, i8, b16, torch.float16, f32):
        for lengths, tokens, splits in (([0, 49], 1, 1), ([0, 37], 3, 3)):
            _attend(dtype, lengths, tokens, 5, (24, 16), splits=splits, groups=1, within=True)
    _attend(f8, [9, 31], 1, 4, (36, 20), query_dtype=b16, block_m=32, within=True)
    _attend(f8, [0, 40], 3, 3, (40, 24), splits=2, static=True, within=True)
    for dtype in (f8, i8, b16):
        _append(dtype, b16, [0, 7, 3], [2, 0, 1], 4, (80, 64), within=True)
    _append(i8, b16, [0, 7, 3], [2, 0, 1], 4, (80, 64), static=0.25, within=True)


def _run_all() -> None:
    f8, i8, b16, f32 = torch.float8_e4m3fn, torch.int8, torch.bfloat16, torch.float32
    for dtype in (f8, i8, b16, torch.float16, f32):
        _attend(dtype, [0, 49], 1, 4)
        _attend(dtype, [0, 37], 3, 2, splits=3, window=20, sink=True)
    for repeats in (1, 3, 5, 8):
        _attend(f32, [0, 16, 49], 1, repeats, splits=5)
    for sizes in ((80, 80), (96, 96), (192, 128), (24, 40)):
        _attend(f8, [3, 37], 2, 2, sizes, capacity=39, splits=2)
    for window in (1, 7, 16, 200):
        _attend(f32, [0, 3, 40], 9, 2, window=window, splits=2, groups=1)
    _attend(f32, [0, 61], 40, 2, (16, 16), capacity=101, window=30, block_m=32, block_n=32)
    _attend(f8, [0, 31], 12, 3, softcap=2.0, sink=True, block_m=32, splits=2)
    _attend(f8, [9, 31], 1, 4, query_dtype=b16)
    for dtype, splits in ((f32, 1), (f32, 3), (f8, 2)):
        _attend(dtype, [0, 37], 5, 2, slope=True, splits=splits, block_m=32)
        _attend(dtype, [5, 37], 1, 3, slope=True, splits=splits, sink=True, softcap=3.0, window=20)
        for chunk in (1, 12, 16, 99):
            _attend(dtype, [0, 12, 40], 9, 2, chunk=chunk, splits=splits, slope=chunk == 12, groups=1)
        _attend(dtype, [0, 13, 49], 1, 2, chunk=12, window=7, splits=splits)
    for splits in (1, 3):
        _attend_and_quantize((16, 64), 32, splits)
        _attend_and_quantize((16, 64), 64, splits, dtype=torch.float16)
        _attend_and_quantize((16, 96), 32, splits)
        _attend_and_quantize((16, 32), 128, splits, heads=6)  # the last tile of a row has two heads
    for dtype in (f8, b16):
        _attend(dtype, [0, 6, 49], 1, 4, window=9, ring=16, splits=3)
        _attend(
            dtype, [0, 7, 47], 3, 2, window=9, ring=11, sink=True, block_n=32
        )  # the least that fits; it wraps inside
    _attend(i8, [3, 89], 12, 2, (16, 16), capacity=101, window=30, ring=48, splits=2, static=True)
    _attend(b16, [0, 11, 45], 3, 2, chunk=9, ring=11, splits=2)
    for dtype, static in ((f8, None), (i8, 0.25), (b16, None)):
        _append(dtype, b16, [0, 7, 3], [2, 0, 1], 4, (80, 24), ring=6, static=static)
        _append(dtype, b16, [5, 8, -1], [2, 0, 1], 1, (16, 16), ring=4, static=static)
    for dtype, sources in ((f8, (f32, b16)), (i8, (f32, b16)), (b16, (b16,)), (f32, (f32,))):
        for source in sources:
            _append(dtype, source, [0, 7, 8], [3, 0, 1], 1, (64, 64))
            _append(dtype, source, [0, 7, 3], [2, 0, 1], 4, (80, 24))
    for dtype in (f8, i8):
        for tokens, splits in ((1, 1), (3, 2)):
            _attend(dtype, [0, 40], tokens, 3, (24, 40), splits=splits, static=True, sink=True)
        _append(dtype, b16, [0, 7, 3], [2, 0, 1], 4, (80, 24), static=0.25)
    for static in (0.01, 2.0**-70, 2.0**120):  # the last two need a true division
        _append(i8, b16, [0, 7], [2, 0], 2, (16, 24), static=static)
    _append(i8, f32, [-1, 2, 9, 0], [0, 4, 1, -1], 2, (16, 16))
    for dtype in (f8, i8, b16, f32):
        _read(dtype, (64, 64))
        _read(dtype, (24, 40))
    _read(f8, (24, 40), static=True)
    _run_within()
    print("all cases ran")


@needs_interpreter
@pytest.mark.timeout(240)
def test_cache_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


if __name__ == "__main__":
    import torch
    from torch import Tensor
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from codegen.operators.chunk_attention import stored
    from codegen.operators.quantize import scale_sizes
    from codegen.targets.hopper import HOPPER
    from codegen.templates.append_to_cache import APPEND_TO_CACHE, AppendOperands, AppendProblem
    from codegen.templates.attend_to_cache import ATTEND_TO_CACHE, AttendConfig, AttendOperands, QuantizedRows
    from codegen.templates.attend_to_latent import LatentConfig
    from codegen.templates.read_cache import READ_CACHE, ReadOperands, ReadProblem
    from qcompiler import numerics
    from qcompiler.dialects import state

    prepare_interpreter()
    InterpreterBuilder.create_dot = _dot
    torch.manual_seed(0)
    _run_all()
