"""Caches that hold the latest positions only: types, checks, and equal bits to caches of all positions."""

import pytest
import torch
from torch import Tensor

from codegen.cpu import cache as cpu
from qcompiler.dialects import state
from qcompiler.dialects.cache_positions import in_order, pieces
from qcompiler.errors import InputError, ParseError, QCompilerError
from qcompiler.ir import CacheType, DType, Format, Graph, parse_type
from qcompiler.ir.formats import FP8_ROW, FP8_TENSOR, INT8_ROW, INT8_TENSOR
from qcompiler.runtime.caches import Ring, allocate, rings

WINDOW, RING, CAPACITY = 5, 9, 64
ELEMENTS = (DType.f32, DType.bf16, FP8_ROW, INT8_ROW, FP8_TENSOR, INT8_TENSOR)
KIND = CacheType(DType.f32, 3, 2, CAPACITY, 8, 4, RING)
LAYER = f"""\
func @layer(%q: f32[s0, 4, s1, 8], %k: f32[s0, 2, s1, 8], %v: f32[s0, 2, s1, 4], %slots: i64[s0], %lengths: i64[s0]) \
-> (f32[s0, 4, s1, 4]) where s0 in 1.., s1 in 1.. {{
  %c = state.cache() {{name = "layers.0"}} : {KIND}
  state.append(%c, %k, %v, %slots, %lengths) {{capacity = 64}}
  %o = state.attend(%c, %q, %slots, %lengths) {{capacity = 64, scale = 0.25, window = 5}} : f32[s0, 4, s1, 4]
  return %o
}}"""


def caches(element: DType | Format, ring: int | None) -> list[Tensor]:
    kind = CacheType(element, 3, 2, CAPACITY, 8, 4, ring)
    scales = [torch.tensor([0.02]), torch.tensor([0.04])] if kind.is_static else []
    return [*allocate(kind, "cpu").tensors, *scales]


def test_text_types_and_bytes() -> None:
    graph = Graph.parse(LAYER)
    graph.verify()
    assert str(graph) == LAYER and str(KIND).endswith("key = 8, value = 4, ring = 9>")
    for element in ELEMENTS:
        kind = CacheType(element, 2, 3, 400, 5, 6, 40)
        assert parse_type(str(kind)) == kind
        assert kind.bytes * 10 == CacheType(element, 2, 3, 400, 5, 6).bytes  # static scales are weights
        assert kind.bytes == sum(tensor.nbytes for tensor in allocate(kind, "cpu").tensors)


@pytest.mark.parametrize("ring", ["0", "64", "65"])
def test_malformed_types(ring: str) -> None:
    with pytest.raises(ParseError, match=r"size 'ring' of a cache is wrong: got \d+; need a positive integer below"):
        parse_type(str(KIND).replace("ring = 9", f"ring = {ring}"))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("%lengths) {capacity = 64}", "%lengths)", "'capacity' must be 64, because the cache is a ring of 9 positions"),
        ("{capacity = 64, scale", "{scale", "must be 64, because the cache is a ring of 9 positions, but is None"),
        (", ring = 9", "", "'capacity' must be left out, because the cache is not a ring, but is 64"),
        (", window = 5", "", "the window must be at most the ring of 9 positions, but is None"),
        (", window = 5", ", window = 10", "the window must be at most the ring of 9 positions, but is 10"),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit(old: str, new: str, problem: str) -> None:
    assert old in LAYER
    with pytest.raises(QCompilerError, match=problem):
        Graph.parse(LAYER.replace(old, new)).verify()


@pytest.mark.parametrize("mask", ["window", "chunk"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_equal_bits_in_every_format(element: DType | Format, mask: str) -> None:
    """Ragged rows, padding on the right, and the most tokens that fit: the definition and the kernels of a CPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if element is DType.bf16 else torch.float32
    full, ring, mine = caches(element, None), caches(element, RING), caches(element, RING)
    slots, lengths = torch.tensor([2, 0]), torch.tensor([0, 0])
    window, chunk = (WINDOW, None) if mask == "window" else (None, WINDOW)
    for step in range(21):
        tokens = (1, RING - WINDOW + 1, 3)[step % 3]
        key, value, query = (
            torch.randn(2, tokens, heads, size).to(dtype).transpose(1, 2) for heads, size in ((2, 8), (2, 4), (4, 8))
        )
        rows, sinks = (slots, lengths), torch.randn(4)
        state.append(full, key, value, *rows)
        state.append(ring, key, value, *rows, capacity=CAPACITY)
        cpu.append(mine, key, value, *rows, CAPACITY)
        want = state.attend(full, query, *rows, sinks, scale=0.3, window=window, chunk=chunk)
        got = state.attend(ring, query, *rows, sinks, scale=0.3, window=window, chunk=chunk, capacity=CAPACITY)
        assert torch.equal(got, want)
        assert torch.equal(
            cpu.attend(mine, query, *rows, sinks, None, None, 0.3, window, None, chunk, CAPACITY),
            cpu.attend(full, query, *rows, sinks, None, None, 0.3, window, None, chunk),
        )
        assert all(torch.equal(one.float(), other.float()) for one, other in zip(mine, ring, strict=True))
        lengths = lengths + torch.tensor([tokens, max(tokens - 2, 1)])  # the other tokens of the second row are padding
    assert lengths.tolist() == [63, 35]


def test_longer_calls_and_longer_sequences_are_refused() -> None:
    zero, cache = torch.zeros(1, dtype=torch.int64), caches(DType.f32, RING)
    for append, attend in ((state.append, state.attend), (cpu.append, cpu.attend)):
        new = torch.ones(1, 2, RING + 1, 8), torch.ones(1, 2, RING + 1, 4)
        with pytest.raises(
            InputError, match="got 10 tokens per row; need at most 9, because the ring holds 9 positions"
        ):
            append(cache, *new, zero, zero, capacity=CAPACITY)
        with pytest.raises(InputError, match="row 0 does not fit into the cache: got length 60 and 5 more positions"):
            append(cache, new[0][:, :, :5], new[1][:, :, :5], zero, zero + 60, capacity=CAPACITY)
        options = {"scale": 1.0, "window": WINDOW, "softcap": None, "chunk": None, "capacity": CAPACITY}
        query, need = torch.ones(1, 4, 6, 8), "need at most 5, because the ring holds 9 positions and a token reads 5"
        with pytest.raises(InputError, match=f"got 6 tokens per row; {need}"):
            attend(cache, query, zero, zero, None, None, None, **options)  # type: ignore[arg-type]  # of different types
    assert not any(tensor.any() for tensor in cache)


def test_where_positions_are() -> None:
    assert pieces(3, 2, 8) == [(3, 2, 0)] and pieces(19, 5, 8) == [(3, 5, 0)]
    assert pieces(22, 5, 8) == [(6, 2, 0), (0, 3, 2)]
    slot = torch.arange(8)[None]  # position p is at p % 8
    assert in_order(slot, 22, 5).tolist() == [[6, 7, 0, 1, 2]]
    assert in_order(slot, 3, 2).data_ptr() == slot[:, 3:].data_ptr(), "a view"


def test_what_a_ring_keeps() -> None:
    (ring,) = rings(Graph.parse(LAYER))
    assert ring == Ring(RING, WINDOW) and ring.chunk == 5
    for written in range(1, 30):
        kept = set(range(max(written - RING, 0), written))
        for start in range(written + 1):
            needed = set(range(max(start - WINDOW + 1, 0), start))
            assert ring.keeps(start, written) == (needed <= kept), (start, written)
