"""The state dialect: caches that a graph appends to and attends over give causal attention, token by token."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.dialects.attention import causal
from qcompiler.dialects.state import append, attend
from qcompiler.errors import InputError, ParseError, QCompilerError, VerifyError
from qcompiler.interpreter import interpret
from qcompiler.ir import CacheType, DType, Format, Graph, parse_type
from qcompiler.ir.formats import FP8_ROW, FP8_TENSOR, INT8_ROW, INT8_TENSOR
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.runtime.caches import allocate, cache_types

KIND = CacheType(DType.f32, slots=3, heads=2, capacity=16, key=8, value=4)

HEAD = (
    "func @layer(%q: f32[s0, 4, s1, 8], %k: f32[s0, 2, s1, 8], %v: f32[s0, 2, s1, 4], %slots: i64[s0], "
    "%lengths: i64[s0]) -> (f32[s0, 4, s1, 4]) where s0 in 1.., s1 in 1.. {"
)
LAYER = f"""\
{HEAD}
  %c = state.cache() {{name = "layers.0"}} : {KIND}
  state.append(%c, %k, %v, %slots, %lengths)
  %o = state.attend(%c, %q, %slots, %lengths) {{scale = 0.25}} : f32[s0, 4, s1, 4]
  return %o
}}"""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_text_and_types_round_trip() -> None:
    graph = Graph.parse(LAYER)
    graph.verify()
    assert str(graph) == LAYER
    assert cache_types(graph) == {"layers.0": KIND}
    for element in (FP8_ROW, INT8_ROW, FP8_TENSOR, DType.bf16):
        kind = CacheType(element, 2, 3, 4, 5, 6)
        assert parse_type(str(kind)) == kind


def test_bytes_are_those_of_the_tensors() -> None:
    for element in (DType.f32, DType.bf16, FP8_ROW, INT8_ROW, INT8_TENSOR):
        kind = CacheType(element, 2, 3, 4, 5, 6)
        assert kind.bytes == sum(tensor.nbytes for tensor in allocate(kind, "cpu").tensors)
        within = CacheType(element, 2, 3, 4, 6, 5, within=True)
        assert parse_type(str(within)) == within
        stored = [*dict.fromkeys(tensor.data_ptr() for tensor in allocate(within, "cpu").tensors)]
        key, *rest = within.tensors
        assert within.bytes < kind.bytes and len(stored) == 1 + len(rest) and key.shape == (2, 3, 4, 6)
    assert CacheType(FP8_ROW, 16, 8, 8192, 128, 128).bytes == 16 * 8 * 8192 * 2 * (128 + 4)


@pytest.mark.parametrize("element", [DType.f32, FP8_ROW, INT8_ROW])
def test_values_within_the_keys_are_written_once(element: DType | Format) -> None:
    """As if the values were stored beside the keys, with the scales of the keys."""
    kind = CacheType(element, slots=2, heads=1, capacity=8, key=6, value=4)
    apart, within = allocate(kind, "cpu").tensors, allocate(replace(kind, within=True), "cpu").tensors
    slots, lengths, query = torch.tensor([1, 0]), torch.tensor([0, 0]), numbers(2, 3, 5, 6)
    key = numbers(2, 1, 5, 6, seed=1)
    for cache in (apart, within):
        append(cache, key, torch.full((2, 1, 5, 4), torch.nan), slots, lengths)
    assert torch.equal(within[0].float(), apart[0].float())
    apart[1] = apart[0][..., :4].contiguous()
    apart[3:] = apart[2:3]
    assert torch.equal(
        attend(within, query, slots, lengths, scale=0.5), attend(apart, query, slots, lengths, scale=0.5)
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "cache<bf16, slots = 2, heads = 1, capacity = 4, key = 8, value = 8, within = true>",
            "must be a part of them",
        ),
        ("cache<bf16, slots = 2, heads = 1, capacity = 4, key = 8, value = 4, within = 1>", "'within' of a cache"),
        ("cache<bf16, slots = 2, heads = 1, capacity = 4, key = 8>", "the value of a cache is missing"),
        ("cache<bf16, slots = 2, slots = 1, heads = 1, capacity = 4, key = 8, value = 8>", "given twice"),
        ("cache<bf16, slots = 0, heads = 1, capacity = 4, key = 8, value = 8>", "size 'slots' of a cache is wrong"),
        ("cache<bf16, slot = 2, heads = 1, capacity = 4, key = 8, value = 8>", "Did you mean 'slots'"),
        ("cache<i64, slots = 2, heads = 1, capacity = 4, key = 8, value = 8>", "cannot have this element type"),
        ("cache<#fp8_tile, slots = 2, heads = 1, capacity = 4, key = 8, value = 8>", "cannot have this element type"),
    ],
)
def test_malformed_cache_types(text: str, problem: str) -> None:
    with pytest.raises(ParseError, match=problem):
        parse_type(text)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 3}, {"softcap": 2.0}, {"window": 5, "softcap": 1.5}, {"chunk": 5}, {"chunk": 6, "window": 4}],
)
@pytest.mark.parametrize(("sinks", "slopes"), [(False, False), (True, False), (False, True), (True, True)])
def test_any_cut_equals_causal_attention(options: dict[str, float], sinks: bool, slopes: bool) -> None:
    random, graph = Random(0), Graph.parse(LAYER)
    attend_op = graph["o"].op
    graph.set_args(attend_op, attend_op.args, {**attend_op.attrs, **options})
    sink, slope = numbers(4, seed=4) if sinks else None, numbers(4, seed=5) if slopes else None
    beside = {name: given for name, given in (("sinks", sink), ("slopes", slope)) if given is not None}
    values = {name: graph.add_input(name, parse_type("f32[4]")) for name in beside}
    graph.set_args(attend_op, (*attend_op.args, values.get("sinks"), None, values.get("slopes")))
    graph.verify()
    q, k, v = numbers(2, 4, 16, 8, seed=1), numbers(2, 2, 16, 8, seed=2), numbers(2, 2, 16, 4, seed=3)
    want = causal(q, k, v, sink, slope, scale=0.25, **options)  # type: ignore[arg-type]  # window is an integer
    for _ in range(5):
        cuts = sorted({0, 16, *(random.randint(1, 15) for _ in range(random.randint(0, 15)))})
        caches, got = {"layers.0": allocate(KIND, "cpu")}, list[Tensor]()
        for start, end in pairwise(cuts):
            lengths, slots = torch.full((2,), start), torch.tensor([2, 0])
            part = [x[:, :, start:end] for x in (q, k, v)]
            got += interpret(graph, [*part, slots, lengths, *beside.values()], caches=caches)
        torch.testing.assert_close(torch.cat(got, 2), want, rtol=1e-5, atol=1e-6)


def test_rows_do_not_depend_on_their_neighbors() -> None:
    """Rows of different lengths in one call have the bits that each has alone."""
    lengths, slots = torch.tensor([5, 0, 11]), torch.tensor([1, 2, 0])
    old, q = numbers(2, 3, 2, 11, 8, seed=1), numbers(3, 4, 3, 8, seed=2)
    k, v = numbers(3, 2, 3, 8, seed=3), numbers(3, 2, 3, 4, seed=4)

    def run(rows: list[int]) -> Tensor:
        cache = allocate(KIND, "cpu").tensors
        append(cache, old[0], old[1][..., :4], torch.arange(3), torch.zeros(3, dtype=torch.int64))
        append(cache, k[rows], v[rows], slots[rows], lengths[rows])
        return attend(cache, q[rows], slots[rows], lengths[rows], scale=0.25, window=7)

    assert torch.equal(run([0, 1, 2]), torch.cat([run([0]), run([1]), run([2])]))


@pytest.mark.parametrize(("element", "limit"), [(FP8_ROW, 0.05), (INT8_ROW, 0.01)])
@pytest.mark.parametrize("new", [1, 4])
def test_a_quantized_cache_attends_over_the_dequantized_numbers(element: object, limit: float, new: int) -> None:
    kind = CacheType(element, 1, 2, 16, 8, 4)  # type: ignore[arg-type]  # a format
    cache, exact = allocate(kind, "cpu"), allocate(CacheType(DType.f32, 1, 2, 16, 8, 4), "cpu")
    k, v, q = numbers(1, 2, 12, 8, seed=1), numbers(1, 2, 12, 4, seed=2), numbers(1, 4, new, 8, seed=3)
    zero, length = torch.zeros(1, dtype=torch.int64), torch.tensor([12 - new])
    append(cache.tensors, k, v, zero, zero)
    append(exact.tensors, k, v, zero, zero)
    assert cache.key_scale is not None and cache.value_scale is not None
    plain = [cache.key.float() * cache.key_scale[..., None], cache.value.float() * cache.value_scale[..., None]]
    for got, want in zip(plain, exact.tensors, strict=True):
        assert 0 < (got - want).norm() / want.norm() < limit
    torch.testing.assert_close(
        attend(cache.tensors, q, zero, length, scale=0.3), attend(plain, q, zero, length, scale=0.3)
    )


def test_nothing_is_written_outside_the_cache() -> None:
    cache = allocate(KIND, "cpu").tensors
    k, v = numbers(2, 2, 3, 8), numbers(2, 2, 3, 4)
    for slots, lengths, problem in (
        ([0, 3], [0, 0], "a slot that the cache does not have; got: 3; need: 0..2"),
        ([0, 1], [0, 14], "row 1 does not fit into the cache; got: length 14 and 3 more positions; need: at most 16"),
    ):
        with pytest.raises(InputError) as error:
            append(cache, k, v, torch.tensor(slots), torch.tensor(lengths))
        for part in problem.split("; "):
            assert part.removeprefix("got: ").removeprefix("need: ") in str(error.value)
    assert not any(tensor.any() for tensor in cache)


def test_the_verifier_keeps_appends_before_attends() -> None:
    lines = LAYER.splitlines()
    late = Graph.parse("\n".join([*lines[:2], lines[3], lines[2], *lines[4:]]))
    with pytest.raises(VerifyError, match=r"V17: state.attend: %c is read before state.append writes it"):
        late.verify()
    twice = Graph.parse("\n".join([*lines[:3], lines[2], *lines[3:]]))
    with pytest.raises(VerifyError, match=r"V17: state.append: %c is already written by an earlier state.append"):
        twice.verify()
    given = Graph.parse(f"func @f(%c: {KIND}) -> () {{\nreturn\n}}")
    with pytest.raises(VerifyError, match=r"V17: core.input: %c is a cache, but core.input does not read state"):
        given.verify()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("%k: f32[s0, 2, s1, 8]", "%k: f32[s0, 1, s1, 8]", r"the key must be \[rows, 2, positions, 8\]"),
        (
            "%k: f32[s0, 2, s1, 8]",
            "%k: bf16[s0, 2, s1, 8]",
            "the key has elements of type bf16, but the cache holds f32",
        ),
        ("%q: f32[s0, 4, s1, 8]", "%q: f32[s0, 3, s1, 8]", "the query has 3 heads"),
        ("%slots: i64[s0]", "%slots: i32[s0]", r"the slots must be i64\[s0\], but are i32\[s0\]"),
        ("append(%c,", "append(%q,", "%q must be a cache"),
        (
            "%slots, %lengths) {scale",
            "%slots, %lengths, None, None, %q) {scale",
            r"the slopes must be f32\[4\], but are f32\[s0",
        ),
        ("cache<f32,", "cache<#fp8_tensor,", r"%c must have two static scales, f32\[1\] each, but has none"),
        ("state.cache()", "state.cache(%q, %k)", r"%c must have no static scales, but has f32\["),
    ],
)
def test_operands_of_wrong_types(old: str, new: str, problem: str) -> None:
    with pytest.raises(QCompilerError, match=problem):
        Graph.parse(LAYER.replace(old, new)).verify()


@pytest.mark.parametrize("format", [FP8_TENSOR, INT8_TENSOR])
def test_static_scales(format: Format) -> None:
    """Codes equal `numerics.quantize_static`'s, in any cut; attention reads the decoded cache."""
    kind, scales = CacheType(format, 3, 2, 16, 8, 4), (torch.tensor([0.01]), torch.tensor([0.02]))
    one, other = ([*allocate(kind, "cpu").tensors, *scales] for _ in range(2))
    key, value, query = numbers(2, 2, 5, 8), numbers(2, 2, 5, 4, seed=1), numbers(2, 4, 5, 8, seed=2)
    slots, zeros = torch.tensor([2, 0]), torch.zeros(2, dtype=torch.int64)
    append(one, key, value, slots, zeros)
    for start, end in ((0, 3), (3, 4), (4, 5)):
        append(other, key[:, :, start:end], value[:, :, start:end], slots, zeros + start)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(one, other, strict=True))
    want = numerics.quantize_static(key.reshape(-1, 8), scales[0][None], format).reshape(key.shape)
    assert torch.equal(one[0][slots, :, :5].float(), want.float())
    plain = [codes.float() * scale for codes, scale in zip(one, scales, strict=False)]
    for new in (5, 1):
        args = (query[:, :, 5 - new :], slots, zeros + 5 - new)
        torch.testing.assert_close(attend(one, *args, scale=0.3), attend(plain, *args, scale=0.3))


def test_no_cleanup_pass_touches_state() -> None:
    graph = Graph.parse(LAYER)
    assert not graph.is_constant(graph["c"]) and not graph.is_constant(graph["o"])
    graph.set_outputs([graph["q"]])
    run_pipeline(Pipeline.parse("canonicalize; fold-constants; share-quantize; dead-code"), graph)
    assert [op.name for op in graph.ops()] == ["state.cache", "state.append"]


def test_missing_caches_are_named() -> None:
    graph, one = Graph.parse(LAYER), torch.zeros(1, dtype=torch.int64)
    inputs = [numbers(1, 4, 1, 8), numbers(1, 2, 1, 8), numbers(1, 2, 1, 4), one, one]
    with pytest.raises(InputError, match=r"the cache 'layers.0' that the graph reads is missing"):
        interpret(graph, inputs, caches={})
