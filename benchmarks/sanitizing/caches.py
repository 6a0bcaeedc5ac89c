"""Families of kernels over a key-value cache: appends, attention, reads."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.sanitizing.place import Place, draw
from benchmarks.sanitizing.rows import ROTARY
from codegen.operators.chunk_attention import stored, stored_on_gpu
from codegen.operators.operator import OPERATORS
from codegen.targets.hopper import HOPPER
from codegen.templates.attend_to_cache import ATTEND_TO_CACHE, AttendOperands, AttendProblem

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
DTYPES = (E4M3, torch.int8, BF16)

ATTENTION = 8e-3
"""Tolerance of attention: the kernel and the reference round weights and results to bf16, in different places."""

HELD, GROUPS, LENGTHS = 301, 2, (1, 65, 300)
"""Positions of a slot, KV heads, and the lengths of rows, new tokens included."""


def caches(
    dtype: torch.dtype, slots: int, groups: int, held: int, sizes: Sequence[int], *, static: bool = False
) -> Any:
    """An empty cache; `static` scales are numbers."""
    kind = torch.int8 if dtype.itemsize == 1 else dtype
    codes = [torch.zeros(slots, groups, held, size, dtype=kind).view(dtype) for size in sizes]
    if dtype.itemsize > 1:
        return codes
    shape = (1,) if static else (slots, groups, held)
    return [*codes, *(torch.full(shape, 0.02 if static else 0.0) for _ in sizes)]


def filled(
    dtype: torch.dtype, lengths: Sequence[int], groups: int, held: int, sizes: Sequence[int], *, within: bool = False
) -> tuple[list[Tensor], Tensor]:
    """A cache with keys and values of these lengths, and the slots; `within`: values are the first of the keys."""
    cache = caches(dtype, len(lengths) + 1, groups, held, sizes)
    if within:
        cache = [cache[0], cache[0][..., : sizes[1]], *cache[2:3] * 2]
    slots = torch.randperm(len(lengths) + 1)[: len(lengths)].contiguous()
    for row, length in enumerate(lengths):
        new = [draw(1, length, groups, size, seed=row).transpose(1, 2) for size in sizes]
        OPERATORS["append_to_cache"].on_cpu(cache, *new, slots[row : row + 1], torch.zeros(1, dtype=torch.int64))
    return cache, slots


def appends(place: Place) -> Iterator[str]:
    """Ragged rows; scales of positions, static scales, a ring, values within the keys."""
    for dtype in (*DTYPES, torch.float32):
        for tokens, sizes in ((1, (128, 128)), (37, (80, 96))):
            slots, lengths = torch.tensor([3, 0, 2]), torch.tensor([0, 7, 100 - tokens])
            key, value = (
                draw(3, tokens, GROUPS, size, seed=size, dtype=dtype if dtype.itemsize == 4 else BF16).transpose(1, 2)
                for size in sizes
            )
            for static in (False, True) if dtype.itemsize == 1 else (False,):
                cache = caches(dtype, 4, GROUPS, 100, sizes, static=static)
                place.compare("append_to_cache", cache, key, value, slots, lengths)
                yield f"{dtype}, {tokens} tokens, static scales: {static}"
            ring = caches(dtype, 4, GROUPS, 60, sizes)
            place.compare("append_to_cache", ring, key, value, slots, lengths, 4096)
            yield f"{dtype}, {tokens} tokens, a ring"
    cache, slots = filled(E4M3, (5, 9), 1, 40, (80, 64), within=True)
    new = [draw(2, 3, 1, size).transpose(1, 2) for size in (80, 64)]
    place.compare("append_to_cache", cache, *new, slots, torch.tensor([5, 9]))
    yield "values within the keys"


def fused_appends(place: Place) -> Iterator[str]:
    """One generated kernel rotates, and appends keys and values."""
    for dtype in DTYPES:
        for batch, tokens, capacity in ((3, 1, None), (3, 77, None), (3, 77, 4096)):
            qkv, value = draw(batch, tokens, 384), draw(batch, tokens, 2, 48, seed=1).transpose(1, 2)
            cos, sin = draw(batch, tokens, 64), draw(batch, tokens, 64, seed=1)
            cache = caches(dtype, batch + 1, 2, 100, (64, 48))
            slots, lengths = torch.tensor([3, 0, 2]), torch.tensor([0, 7, 20])
            keys = ROTARY.replace("64*i1 + i3", "64*i1 + i3 + 256")
            shapes = ["x0.0, 2, x0.1, 64", "x3.0, 2, x3.2, 48", "x0.0, 4, x0.1, 64"]
            expressions = [keys, "bf16(x3[i0, i1, i2, i3])", ROTARY]
            operands = [qkv, cos, sin, value]
            place.compare("fused_append", cache, slots, lengths, operands, expressions, shapes, capacity)
            yield f"{dtype}, {tokens} tokens, a ring: {capacity is not None}"


def reads(place: Place) -> Iterator[str]:
    """The first positions of some slots as contiguous keys and values."""
    for dtype in DTYPES:
        for batch, end, sizes in ((3, 237, (192, 128)), (2, 5, (80, 64))):
            cache, slots = filled(dtype, [end] * batch, GROUPS, HELD, sizes)
            place.compare_calls(stored_on_gpu, stored, cache, slots, end, BF16)
            yield f"{dtype}, {batch} x {end}"


def attention(dtype: torch.dtype, place: Place) -> Iterator[str]:
    """Single tokens and chunks, one split and several, each kind of mask."""
    heads, scale = GROUPS * 4, 0.1
    for tokens, sizes in ((1, (128, 128)), (33, (128, 128)), (5, (80, 96))):
        lengths = [max(length, tokens) for length in LENGTHS]
        cache, slots = filled(dtype, lengths, GROUPS, HELD, sizes)
        query, before = draw(len(lengths), tokens, heads, sizes[0]).transpose(1, 2), torch.tensor(lengths) - tokens
        sinks, slopes = torch.randn(heads), 0.5 ** torch.arange(1, heads + 1)
        whole = (None, None, None, scale, None, None, None)
        masked = (sinks, None, slopes, scale, 70, 9.0, None)
        chunked = (None, None, None, scale, None, None, 48)
        for rest in (whole, masked, chunked) if sizes == (128, 128) else (whole,):
            place.compare("attend_to_cache", cache, query, slots, before, *rest, tolerance=ATTENTION)
            yield f"{tokens} tokens, heads of {list(sizes)}, {rest}"
        yield from _splits(place, cache, query, slots, before, scale)
    ring, slots = caches(dtype, 4, GROUPS, 100, (128, 128)), torch.tensor([3, 0, 2])
    key, query = (draw(3, 1, number, 128).transpose(1, 2) for number in (GROUPS, heads))
    for length in range(250, 253):
        OPERATORS["append_to_cache"].on_cpu(ring, key, key, slots, torch.full((3,), length), 4096)
    windowed = (None, None, None, scale, 3, None, None, 4096)
    place.compare("attend_to_cache", ring, query, slots, torch.full((3,), 252), *windowed, tolerance=ATTENTION)
    yield "a ring"


def _splits(
    place: Place, cache: Sequence[Tensor], query: Tensor, slots: Tensor, before: Tensor, scale: float
) -> Iterator[str]:
    """The configuration for these operands, with other numbers of splits."""
    batch, heads, tokens, size = query.shape
    family = ATTEND_TO_CACHE.family(HOPPER)
    facts = (batch, GROUPS, heads // GROUPS, tokens, size, cache[1].shape[3], HELD, cache[0].element_size())
    config = family.choose(AttendProblem(*facts, None, HOPPER.limits.multiprocessors))
    rest: Any = (None, None, None, scale, None, None, None)
    want = OPERATORS["attend_to_cache"].on_cpu(cache, query, slots, before, *rest).transpose(1, 2)
    whole: Any = (*cache, None, None)
    for splits in (1, 7):
        out = torch.zeros(batch, tokens, heads, cache[1].shape[3], dtype=query.dtype)
        operands = AttendOperands(query, whole[:4], slots, before, None, out, scale)
        done = place.launch(family, replace(config, splits=splits), operands)
        assert isinstance(done.out, Tensor)
        place.close(done.out, want, ATTENTION)
        yield f"{config}, {splits} splits"


def quantized_attention(place: Place) -> Iterator[str]:
    """The kernel that writes the result quantizes it; the codes must equal its unquantized result, quantized."""
    for dtype in (E4M3, BF16):
        for value_size, tile in ((128, 128), (64, 32), (64, 128)):
            for rows, tokens in (((300, 2), 1), ((300, 33), 20), ((40, 5) * 40, 1)):
                lengths = [max(length, tokens) for length in rows]
                cache, slots = filled(dtype, lengths, 4, HELD, (128, value_size))
                query = draw(len(lengths), tokens, 8, 128).transpose(1, 2)
                given: Any = (cache, query, slots, torch.tensor(lengths) - tokens, None, None, None, 0.1, None, None)
                attended = place.run("attend_to_cache", *given, None, None).transpose(1, 2).flatten(2)
                quantization: Any = ([1, tile], E4M3, "deepseek", "col_major")
                want = OPERATORS["quantize"].on_cpu(attended, *quantization)
                got = place.run("fused_attend", *given, None, None, *quantization)
                for one, other in zip(got, want, strict=True):
                    # Heads that share a scale are added by other programs, which flips the last bits of a few results.
                    place.close(one.float(), other.float(), ATTENTION if tile <= value_size else 3e-2)
                yield f"{dtype}, {value_size} elements in tiles of {tile}, {len(lengths)} x {tokens} tokens"


def latents(place: Place) -> Iterator[str]:
    """Values within the keys."""
    for dtype in DTYPES:
        for heads, sizes, rows, tokens in (
            (128, (576, 512), (1, 65, 300), 1),
            (16, (576, 512), (70, 300), 33),
            (20, (320, 256), (5, 277), 3),
            (16, (576, 512), (65,) * 140, 1),
        ):
            lengths = [max(length, tokens) for length in rows]
            cache, slots = filled(dtype, lengths, 1, HELD, sizes, within=True)
            query, before = draw(len(lengths), tokens, heads, sizes[0]).transpose(1, 2), torch.tensor(lengths) - tokens
            rest: Any = (None, None, None, 0.05, None, None, None)
            place.compare("attend_to_cache", cache, query, slots, before, *rest, tolerance=ATTENTION)
            yield f"{dtype}, {heads} heads of {list(sizes)}, {len(lengths)} x {tokens} tokens"
