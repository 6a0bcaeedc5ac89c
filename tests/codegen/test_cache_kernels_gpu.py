"""The KV cache operators on a Hopper GPU: codes equal `numerics` bit for bit, attention equals an FP64 reference."""

import math

import pytest
import torch
from torch import Tensor

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.direct import kernels
from codegen.operators.chunk_attention import stored, stored_on_gpu
from codegen.targets.hopper import HOPPER
from codegen.templates.attend_to_cache import ATTEND_TO_CACHE, AttendConfig, AttendOperands
from qcompiler import numerics
from qcompiler.dialects import state

pytestmark = pytest.mark.gpu

E4M3, I8, B16, F16, F32 = torch.float8_e4m3fn, torch.int8, torch.bfloat16, torch.float16, torch.float32
ERRORS = {E4M3: 3e-3, I8: 3e-3, B16: 4e-3, F16: 8e-4, F32: 1e-5}  # of a bfloat16, bfloat16, …, float32 result


def caches(
    dtype: torch.dtype, slots: int, groups: int, capacity: int, sizes: tuple[int, int] = (128, 128)
) -> list[Tensor]:
    """An empty cache full of NaN, or the largest codes with NaN scales."""
    shape = (slots, groups, capacity)
    if dtype.itemsize > 1:
        return [torch.full((*shape, size), math.nan, dtype=dtype, device="cuda") for size in sizes]
    codes = [torch.full((*shape, size), 127, dtype=I8, device="cuda").view(dtype) for size in sizes]
    return [*codes, *(torch.full(shape, math.nan, device="cuda") for _ in sizes)]


def query_dtype(dtype: torch.dtype) -> torch.dtype:
    return B16 if dtype.itemsize == 1 else dtype


def filled(
    dtype: torch.dtype, lengths: list[int], groups: int, capacity: int, sizes: tuple[int, int] = (128, 128)
) -> tuple[list[Tensor], Tensor]:
    """A cache that holds random keys and values of these lengths, appended in one call per row, and the slots."""
    cache = caches(dtype, len(lengths) + 1, groups, capacity, sizes)
    slots = torch.randperm(len(lengths) + 1, device="cuda")[: len(lengths)]
    for row, length in enumerate(lengths):
        key, value = (
            torch.randn(1, length, groups, size, device="cuda").to(query_dtype(dtype)).transpose(1, 2) for size in sizes
        )
        kernels.append_to_cache(
            cache, key, value, slots[row : row + 1], torch.zeros(1, dtype=torch.int64, device="cuda")
        )
    return cache, slots


def reference(
    cache: list[Tensor], query: Tensor, slots: Tensor, lengths: Tensor, sinks: Tensor | None = None,
    slopes: Tensor | None = None, *,
    scale: float, window: int | None = None, softcap: float | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """The state dialect in FP64 on the CPU, over the decoded cache."""
    key, value = (tensor.cpu().double() for tensor in cache[:2])
    if len(cache) > 2:
        key, value = key * cache[2].cpu()[..., None], value * cache[3].cpu()[..., None]
    given, biases = (None if each is None else each.cpu() for each in (sinks, slopes))
    return state.attend(
        [key, value], query.cpu().double(), slots.cpu(), lengths.cpu(), given, None, biases, scale=scale,
        window=window, softcap=softcap, chunk=chunk,
    )  # fmt: skip


def error(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().double() - want).norm() / want.norm())


def check(
    dtype: torch.dtype, lengths: list[int], tokens: int, repeats: int, *, groups: int = 2, capacity: int = 3001,
    sizes: tuple[int, int] = (128, 128), sink: bool = False, window: int | None = None, softcap: float | None = None,
    slope: bool = False, chunk: int | None = None,
) -> None:  # fmt: skip
    """Lengths include the new tokens, which are already appended."""
    cache, slots = filled(dtype, lengths, groups, capacity, sizes)
    heads = groups * repeats
    query = torch.randn(len(lengths), tokens, heads, sizes[0], device="cuda").to(query_dtype(dtype)).transpose(1, 2)
    before = torch.tensor(lengths, device="cuda") - tokens
    sinks = torch.randn(heads, device="cuda") if sink else None
    slopes = 0.5 ** torch.arange(1, heads + 1, device="cuda") if slope else None
    scale = sizes[0] ** -0.5
    for _ in range(3):  # the second call is recorded, the third replayed
        got = kernels.attend_to_cache(cache, query, slots, before, sinks, None, slopes, scale, window, softcap, chunk)
        want = reference(
            cache, query, slots, before, sinks, slopes, scale=scale, window=window, softcap=softcap, chunk=chunk
        )
        assert got.shape == want.shape and got.dtype == query.dtype
        assert error(got, want) < ERRORS[dtype], (dtype, lengths, tokens, repeats, sizes)


@pytest.mark.parametrize("dtype", [E4M3, I8, B16, F16, F32])
def test_decoding_over_ragged_lengths(dtype: torch.dtype) -> None:
    check(dtype, [1, 2, 63, 64, 65, 129, 1000, 3001], 1, 4)
    check(dtype, [2500], 1, 8)
    check(dtype, [2500, 17] * 40, 1, 1, groups=8)


@pytest.mark.parametrize("dtype", [E4M3, B16])
@pytest.mark.parametrize("repeats", [1, 2, 3, 5, 8, 16])
def test_chunks_from_any_position(dtype: torch.dtype, repeats: int) -> None:
    for tokens in (2, 5, 16, 100, 300):
        check(dtype, [tokens, tokens + 1, tokens + 777], tokens, repeats)


@pytest.mark.parametrize("dtype", [E4M3, I8, B16])
@pytest.mark.parametrize("sizes", [(64, 64), (80, 80), (96, 96), (192, 128), (256, 256), (576, 512), (24, 40)])
def test_other_head_sizes(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    for tokens in (1, 40):
        check(dtype, [70, 333], tokens, 3, sizes=sizes, capacity=401)


def latents(
    dtype: torch.dtype, lengths: list[int], sizes: tuple[int, int], capacity: int = 3001
) -> tuple[list[Tensor], Tensor]:
    """A cache with its values within the keys, filled by appends of keys alone, and the slots."""
    key, _, *scales = caches(dtype, len(lengths) + 1, 1, capacity, sizes)
    cache = [key, key[..., : sizes[1]], *scales[:1] * 2]
    slots = torch.randperm(len(lengths) + 1, device="cuda")[: len(lengths)]
    for row, length in enumerate(lengths):
        new = torch.randn(1, length, 1, sizes[0], device="cuda").to(query_dtype(dtype)).transpose(1, 2)
        unused = torch.full_like(new[..., : sizes[1]], math.nan)
        zero = torch.zeros(1, dtype=torch.int64, device="cuda")
        kernels.append_to_cache(cache, new, unused, slots[row : row + 1], zero)
    return cache, slots


@pytest.mark.parametrize("dtype", [E4M3, I8, B16, F16, F32])
@pytest.mark.parametrize(
    ("heads", "sizes", "lengths", "tokens"),
    [
        (128, (576, 512), [1, 64, 65, 3000], 1),
        (128, (576, 512), [70, 129, 1000], 33),
        (16, (576, 512), [1, 2999], 2),
        (16, (576, 512), [2048] * 40, 1),
        (20, (320, 256), [5, 777], 3),
        (4, (20, 16), [5, 300], 3),
    ],
)
def test_attention_to_a_latent(
    dtype: torch.dtype, heads: int, sizes: tuple[int, int], lengths: list[int], tokens: int
) -> None:
    if dtype == F32 and sizes[0] > 512:
        lengths = lengths[:2]
    lengths = [max(length, tokens) for length in lengths]
    cache, slots = latents(dtype, lengths, sizes)
    query = torch.randn(len(lengths), tokens, heads, sizes[0], device="cuda").to(query_dtype(dtype)).transpose(1, 2)
    before = torch.tensor(lengths, device="cuda") - tokens
    want = reference(cache, query, slots, before, scale=0.05)
    for _ in range(3):  # the second call is recorded, the third replayed
        got = kernels.attend_to_cache(cache, query, slots, before, None, None, None, 0.05, None, None, None)
        assert error(got, want) < ERRORS[query_dtype(dtype)]


@pytest.mark.parametrize("dtype", [E4M3, B16])
def test_windows_sinks_and_soft_caps(dtype: torch.dtype) -> None:
    for window in (1, 7, 64, 1000):
        check(dtype, [64, 65, 2222], 1, 4, window=window)
        check(dtype, [64, 65, 2222], 33, 4, window=window, sink=True)
    for tokens in (1, 64):
        check(dtype, [64, 2222], tokens, 4, sink=True)
        check(dtype, [64, 2222], tokens, 4, softcap=2.0)


@pytest.mark.parametrize("dtype", [E4M3, I8, B16, F32])
def test_slopes_and_chunks(dtype: torch.dtype) -> None:
    for tokens in (1, 33, 64):
        check(dtype, [64, 65, 2222], tokens, 4, slope=True)
        check(dtype, [64, 65, 2222], tokens, 4, slope=True, window=100, sink=True, softcap=9.0)
        for chunk in (1, 48, 64, 1000, 4096):
            check(dtype, [64, 65, 2222], tokens, 4, chunk=chunk)
        check(dtype, [64, 65, 2222], tokens, 3, chunk=100, window=70, slope=True)


@pytest.mark.parametrize("dtype", [E4M3, B16])
def test_every_configuration_gives_the_same_numbers(dtype: torch.dtype) -> None:
    cache, slots = filled(dtype, [1500, 3], 2, 2000)
    query = torch.randn(2, 8, 1, 128, device="cuda", dtype=B16)
    before = torch.tensor([1499, 2], device="cuda")
    want = reference(cache, query, slots, before, scale=0.1)
    tensors = (cache[0], cache[1], *(cache[2:] or (None, None)))
    for block_n in (32, 64, 128):
        for warps, stages in ((4, 2), (4, 3), (8, 2)):
            for splits in (1, 2, 7, 50):
                out = torch.empty(2, 1, 8, 128, device="cuda", dtype=B16)
                operands = AttendOperands(query, tensors, slots, before, None, out, 0.1)
                ATTEND_TO_CACHE.family(HOPPER).launch(AttendConfig(16, block_n, warps, stages, splits), operands)
                assert error(out.transpose(1, 2), want) < ERRORS[dtype], (block_n, warps, stages, splits)


@pytest.mark.parametrize("layout", ["row_major", "col_major"])
@pytest.mark.parametrize("dtype", [E4M3, B16])
@pytest.mark.parametrize(("value_size", "tile"), [(128, 128), (128, 32), (64, 64), (64, 128), (96, 32)])
def test_attention_that_quantizes_equals_both_kernels(
    dtype: torch.dtype, value_size: int, tile: int, layout: str
) -> None:
    """Bit for bit, if the same programs add the splits; else up to the order of additions."""
    quantization = ([1, tile], E4M3, "deepseek", layout)
    for lengths, tokens in (([700, 2], 1), ([700, 33], 20), ([300, 5] * 40, 1), ([600], 600)):
        cache, slots = filled(dtype, lengths, 8, 1024, (128, value_size))
        query = torch.randn(len(lengths), tokens, 24, 128, device="cuda", dtype=B16).transpose(1, 2)
        before = torch.tensor(lengths, device="cuda") - tokens
        given = (cache, query, slots, before, None, 0 if tokens == 600 else None, None, 0.1, None, None, None, None)
        want_codes, want_scales = kernels.quantize(
            kernels.attend_to_cache(*given).transpose(1, 2).flatten(2), *quantization
        )
        for _ in range(3):  # the second call is recorded, the third replayed
            codes, scales = kernels.fused_attend(*given, *quantization)
            assert codes.shape == want_codes.shape and scales.stride() == want_scales.stride()
            if tile <= value_size:
                assert torch.equal(codes.view(I8), want_codes.view(I8)) and torch.equal(scales, want_scales)
            else:
                assert error(scales.double(), want_scales.cpu().double()) < 1e-2
                assert float((codes.view(I8) != want_codes.view(I8)).float().mean()) < 1e-2


@pytest.mark.parametrize("dtype", [E4M3, I8, B16, F32])
def test_appended_codes_equal_numerics(dtype: torch.dtype) -> None:
    for tokens, sizes in ((1, (128, 128)), (37, (80, 96)), (300, (192, 128))):
        mine = caches(dtype, 5, 3, 400, sizes)
        theirs = [tensor.cpu() for tensor in mine]
        source = query_dtype(dtype)
        both = torch.randn(4, tokens, 3, sum(sizes), device="cuda").mul(torch.rand(4, tokens, 3, 1, device="cuda") * 9)
        key, value = both.to(source).transpose(1, 2).split(list(sizes), -1)
        slots, lengths = torch.tensor([4, 0, 2, 1]), torch.tensor([0, 1, 99, 400 - tokens])
        for _ in range(3):
            kernels.append_to_cache(mine, key, value, slots.cuda(), lengths.cuda())
        state.append(theirs, key.cpu(), value.cpu(), slots, lengths)
        for got, want in zip(mine, theirs, strict=True):
            assert torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))


def test_nothing_is_written_outside_the_cache() -> None:
    cache = caches(E4M3, 3, 2, 10)
    before = [tensor.clone().view(torch.uint8) for tensor in cache]
    key = torch.randn(4, 2, 5, 128, device="cuda")
    slots, lengths = torch.tensor([0, 3, -1, 1], device="cuda"), torch.tensor([10, 0, 0, -5], device="cuda")
    kernels.append_to_cache(cache, key, key, slots, lengths)
    assert all(torch.equal(old, tensor.view(torch.uint8)) for old, tensor in zip(before, cache, strict=True))
    lengths[0] = 8  # two of five tokens fit
    kernels.append_to_cache(cache, key, key, slots, lengths)
    assert bool(cache[2][0, :, 8:].isfinite().all()) and bool(cache[2][0, :, :8].isnan().all())
    assert bool(cache[2][1:].isnan().all())


def test_a_graph_follows_lengths_on_the_device() -> None:
    cache, slots = filled(E4M3, [500, 1], 8, 1024)
    query, key = (
        torch.randn(2, 32, 1, 128, device="cuda", dtype=B16),
        torch.randn(2, 8, 1, 128, device="cuda", dtype=B16),
    )
    lengths = torch.tensor([500, 1], device="cuda")

    def step() -> Tensor:
        kernels.append_to_cache(cache, key, key, slots, lengths)
        result: Tensor = kernels.attend_to_cache(cache, query, slots, lengths, None, None, None, 0.1, None, None, None)
        return result

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(5):
        graph.replay()
        assert error(out, reference(cache, query, slots, lengths, scale=0.1)) < ERRORS[E4M3]
        again = out.clone()
        graph.replay()
        assert torch.equal(again, out), "not deterministic"
        key.normal_()
        lengths += 1


@pytest.mark.parametrize("dtype", [E4M3, I8, B16, F32])
@pytest.mark.parametrize(("window", "ring"), [(100, 399), (128, 1024)])
def test_rings_give_equal_bits(dtype: torch.dtype, window: int, ring: int) -> None:
    """Ragged rows that wrap around several times, in chunks and single tokens, with padding on the right."""
    capacity, slots = 4096, torch.tensor([2, 0, 3], device="cuda")
    full, held = caches(dtype, 4, 2, capacity), caches(dtype, 4, 2, ring)
    lengths, sinks = torch.tensor([0, 0, 0], device="cuda"), torch.randn(8, device="cuda")
    for tokens in (300, 1, 1, 37, 300, 299, 1, 1, 1, 16, 300, 300, 1):
        key, query = (
            torch.randn(3, tokens, heads, 128, device="cuda").to(query_dtype(dtype)).transpose(1, 2) for heads in (2, 8)
        )
        kernels.append_to_cache(full, key, key, slots, lengths)
        kernels.append_to_cache(held, key, key, slots, lengths, capacity)
        rest = (query, slots, lengths, sinks, None, None, 0.1, window, None, None)
        want, got = kernels.attend_to_cache(full, *rest), kernels.attend_to_cache(held, *rest, capacity)
        assert bool(want.isfinite().all()) and torch.equal(got, want), (tokens, lengths.tolist())
        lengths = lengths + torch.tensor([tokens, max(tokens - 30, 1), (tokens + 1) // 2], device="cuda")
    assert lengths.tolist()[0] > 3 * ring // 2


def test_a_large_cache_needs_64_bit_offsets() -> None:
    slots, groups, capacity = 40, 8, 65536
    cache = caches(I8, slots, groups, capacity)
    assert cache[0].numel() > 2**31
    key = torch.randn(1, groups, 300, 128, device="cuda", dtype=B16)
    slot, lengths = torch.tensor([slots - 1], device="cuda"), torch.tensor([capacity - 300], device="cuda")
    kernels.append_to_cache(cache, key, key, slot, lengths)
    codes, _ = numerics.quantize(key.cpu(), state.FORMATS[I8])
    assert torch.equal(cache[0][-1, :, -300:].cpu(), codes[0])
    out = kernels.attend_to_cache(cache, key[:, :, -1:], slot, lengths + 299, None, None, None, 0.1, 300, None, None)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("dtype", [E4M3, I8, B16, F16])
def test_long_chunks_with_a_known_start(dtype: torch.dtype) -> None:
    """By torch's kernels: keys and values of codes are rounded to bfloat16."""
    for start, tokens in ((0, 512), (0, 1111), (512, 700), (1237, 513)):
        cache, slots = filled(dtype, [start + tokens] * 2, 2, 3001)
        query = torch.randn(2, tokens, 8, 128, device="cuda").to(query_dtype(dtype)).transpose(1, 2)
        lengths = torch.full((2,), start, device="cuda")
        got = kernels.attend_to_cache(cache, query, slots, lengths, None, start, None, 0.1, None, None, None)
        want = reference(cache, query, slots, lengths, scale=0.1)
        assert got.shape == want.shape and got.dtype == query.dtype and got.transpose(1, 2).is_contiguous()
        assert error(got, want) < max(ERRORS[dtype], 5e-3 if dtype.itemsize == 1 else 0.0), (dtype, start, tokens)


@pytest.mark.parametrize("dtype", [E4M3, I8, B16, F16])
def test_a_chunk_reads_what_the_cache_stores(dtype: torch.dtype) -> None:
    for batch, end, sizes in ((1, 700, (128, 128)), (3, 1237, (192, 128)), (2, 5, (80, 64))):
        cache, slots = filled(dtype, [end] * batch, 2, 1500, sizes)
        got = stored_on_gpu(cache, slots, end, query_dtype(dtype))
        for one, other in zip(got, stored(cache, slots, end, query_dtype(dtype)), strict=True):
            assert torch.equal(one, other), (dtype, batch, end, sizes)
