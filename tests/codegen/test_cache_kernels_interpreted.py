"""The KV cache kernels in Triton's interpreter on a CPU: lengths, splits, windows, sinks, head sizes and formats.

The reference attends in FP64 over the decoded cache. Positions that a row must not read hold NaN.
"""

import math

import pytest
from triton_interpreter import needs_interpreter, round_fma_once, run_interpreted


def _reference(
    query: "Tensor", key: "Tensor", value: "Tensor", length: int, sinks: "Tensor | None", scale: float,
    window: int | None, softcap: float | None,
) -> "Tensor":  # fmt: skip
    """One row of the batch: query [heads, tokens, size], key and value [groups, capacity, size], all FP64."""
    repeats = query.shape[0] // key.shape[0]
    stop = length + query.shape[1]
    key, value = key[:, :stop].repeat_interleave(repeats, 0), value[:, :stop].repeat_interleave(repeats, 0)
    scores = query @ key.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    own, at = torch.arange(length, stop)[:, None], torch.arange(stop)
    hidden = (at > own) if window is None else (at > own) | (at <= own - window)
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:2], 1)], -1)
    weights = torch.softmax(scores, -1)[..., :stop]
    return torch.where(weights[..., None] > 0, weights[..., None] * value[:, None], 0.0).sum(2)


def _cache(
    dtype: "torch.dtype", slots: int, groups: int, capacity: int, sizes: tuple[int, int], static: bool
) -> "tuple[Tensor, Tensor, Tensor | None, Tensor | None]":
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


def _attend(
    dtype: "torch.dtype", lengths: list[int], tokens: int, repeats: int, sizes: tuple[int, int] = (64, 64), *,
    capacity: int = 50, splits: int = 1, window: int | None = None, softcap: float | None = None, sink: bool = False,
    groups: int = 2, block_m: int = 16, block_n: int = 16, query_dtype: "torch.dtype | None" = None,
    static: bool = False,
) -> None:  # fmt: skip
    batch, heads, scale = len(lengths), groups * repeats, sizes[0] ** -0.5
    cache = _cache(dtype, batch + 1, groups, capacity, sizes, static)
    slots = torch.randperm(batch + 1)[:batch]
    for row, length in enumerate(lengths):
        for tensor in cache:
            if tensor is not None and tensor.dim() > 1 and tensor.is_floating_point() and tensor.itemsize > 1:
                tensor[slots[row], :, length + tokens :] = math.nan
                tensor[slots[row], :, : max(length + 1 - (window or capacity), 0)] = math.nan
    query = torch.randn(batch, tokens, heads, sizes[0]).mul(3).bfloat16()  # float16 holds these up to a power of two
    query = query.to(query_dtype or torch.float32).transpose(1, 2)
    sinks = torch.randn(heads) if sink else None
    out = torch.full((batch + 1, tokens, heads, sizes[1]), 7.0)
    operands = AttendOperands(
        query, cache, slots, torch.tensor(lengths), sinks, out[:batch], scale, window, softcap
    )  # fmt: skip
    ATTEND_TO_CACHE.family(HOPPER).launch(AttendConfig(block_m, block_n, 4, 2, splits), operands)
    key, value = (codes.double() for codes in cache[:2])
    if cache[2] is not None and cache[3] is not None:
        key, value = key * cache[2][..., None].double(), value * cache[3][..., None].double()
    error = size = 0.0
    for row, length in enumerate(lengths):
        slot = int(slots[row])
        want = _reference(query[row].double(), key[slot], value[slot], length, sinks, scale, window, softcap)
        error = max(error, float((out[row].transpose(0, 1) - want).norm()))
        size = max(size, float(want.norm()))
    case = (dtype, lengths, tokens, repeats, sizes, splits, window, softcap, sink)
    assert error < size * {1: 5e-4, 2: 8e-3, 4: 1e-5}[dtype.itemsize], (case, error / size)
    assert bool((out[batch:] == 7.0).all()), (case, "wrote beyond the last row")


def _append(
    dtype: "torch.dtype", source: "torch.dtype", lengths: list[int], slots: list[int], tokens: int,
    sizes: tuple[int, int], groups: int = 2, capacity: int = 9, static: float | None = None,
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
    cache = [torch.full((count, groups, capacity, size), 5.0).to(dtype) for size in sizes]
    scales = [torch.full((count, groups, capacity), 5.0) for _ in sizes] if quantized else []
    if static is not None:
        scales = [torch.tensor([static]), torch.tensor([0.5 * static])]
    want = [each.clone() for each in (*cache, *scales)]
    for index, new in enumerate((key, value)):
        codes, scale = new.to(dtype), None
        if static is not None:
            codes = state.quantized(new, scales[index], dtype)
        elif quantized:
            codes, scale = numerics.quantize(new, numerics.format_of((1, -1), dtype))
        for row in range(batch):
            for token in range(tokens):
                slot, position = slots[row], lengths[row] + token
                if 0 <= slot < count and 0 <= position < capacity:
                    want[index][slot, :, position] = codes[row, :, token]
                    if scale is not None:
                        want[2 + index][slot, :, position] = scale[row, :, token, 0]
    tensors = (cache[0], cache[1], *(scales or (None, None)))
    operands = AppendOperands(key, value, tensors, torch.tensor(slots), torch.tensor(lengths))
    config = APPEND_TO_CACHE.family(HOPPER).choose(AppendProblem(batch * groups * tokens, max(sizes)))
    APPEND_TO_CACHE.family(HOPPER).launch(config, operands)
    for got, need in zip((*cache, *scales), want, strict=True):
        assert torch.equal(got.float(), need.float()), (dtype, source, lengths, slots, tokens, sizes)


def _dot(
    _builder: object, a: "TensorHandle", b: "TensorHandle", sums: "TensorHandle", *_options: object
) -> "TensorHandle":
    """a @ b + sums: the interpreter's own version takes the bits of bfloat16 for integers."""
    one, other = (
        (each.data.astype("uint32") << 16).view("float32") if each.dtype == tl.bfloat16 else each.data.astype("float32")
        for each in (a, b)
    )
    return TensorHandle(one @ other + sums.data, sums.dtype.scalar)


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
        _attend(f32, [0, 3, 40], 9, 2, window=window, splits=2)
    _attend(f32, [0, 61], 40, 2, (16, 16), capacity=101, window=30, block_m=32, block_n=32)
    _attend(f8, [0, 31], 12, 3, softcap=2.0, sink=True, block_m=32, splits=2)
    _attend(f8, [9, 31], 1, 4, query_dtype=b16)
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

    from codegen.targets.hopper import HOPPER
    from codegen.templates.append_to_cache import APPEND_TO_CACHE, AppendOperands, AppendProblem
    from codegen.templates.attend_to_cache import ATTEND_TO_CACHE, AttendConfig, AttendOperands
    from qcompiler import numerics
    from qcompiler.dialects import state

    round_fma_once()
    InterpreterBuilder.create_dot = _dot
    torch.manual_seed(0)
    _run_all()
